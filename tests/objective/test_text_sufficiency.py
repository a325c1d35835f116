"""The text decoder: what it may see, what it is asked, and the entropy that it must not beat."""

import math

import pytest
import torch
from branch_outputs import branch_output, changed

from infotok_lit.batch import BranchOutput
from infotok_lit.objective.sufficiency import DecoderConfig, TextDecoder

DECODER = DecoderConfig(width=16, depth=2, heads=2)


@pytest.fixture
def decoder() -> TextDecoder:
    torch.manual_seed(0)
    decoder = TextDecoder(DECODER, latent_width=16, text_width=12, num_extra=2)
    torch.nn.init.normal_(decoder.words_out.weight)  # as after training: predictions depend on the input
    return decoder


def other_word(inputs: BranchOutput, row: int, position: int) -> BranchOutput:
    ids = inputs.text.ids.clone()
    ids[row, position] = (ids[row, position] + 1) % 20
    return changed(inputs, text_ids=ids)


def test_later_words_do_not_reach_earlier_ones(decoder, make_inputs):
    inputs = make_inputs()
    before, after = (decoder.token_nats(inputs.tokens, i) for i in (inputs, other_word(inputs, 2, 2)))
    torch.testing.assert_close(before[2, :2], after[2, :2])
    assert not torch.isclose(before[2, 2], after[2, 2]) and not torch.isclose(before[2, 3], after[2, 3])


def test_the_question_is_visible_and_not_asked(decoder, make_inputs):
    inputs = make_inputs()
    before, after = (decoder.token_nats(inputs.tokens, i) for i in (inputs, other_word(inputs, 1, 0)))
    assert (before[:, 0] == 0).all()
    assert not torch.isclose(before[1, 1], after[1, 1])


def test_the_image_is_visible(decoder, make_inputs):
    inputs = make_inputs()
    targets = inputs.text.target_mask
    before, after = (decoder.token_nats(z, inputs)[targets] for z in (inputs.tokens, inputs.tokens.flip(-1)))
    assert not torch.isclose(before, after).any()


def test_padding_says_nothing(decoder, make_inputs):
    inputs = make_inputs()
    garbage = inputs.text.ids.masked_fill(~inputs.text.mask, -100)
    torch.testing.assert_close(
        decoder(inputs.tokens, inputs).per_image, decoder(inputs.tokens, changed(inputs, text_ids=garbage)).per_image
    )


def test_nats_are_summed_over_the_answer_and_zero_without_one(decoder, make_inputs):
    inputs = make_inputs()
    inputs.text.target_mask[1] = False
    term = decoder(inputs.tokens, inputs)
    torch.testing.assert_close(term.per_image, decoder.token_nats(inputs.tokens, inputs).sum(1))
    assert term.per_image[1] == 0 and term.elements.tolist() == [1, 0, 3]


def test_a_batch_without_any_answer_still_has_a_graph(decoder, make_inputs):
    inputs = make_inputs()
    inputs.text.target_mask[:] = False
    decoder(inputs.tokens, inputs).per_image.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in decoder.parameters())


def test_an_empty_question_works(decoder, make_inputs):
    inputs = make_inputs()
    inputs.text.target_mask.copy_(inputs.text.mask)
    term = decoder(inputs.tokens, inputs)
    assert torch.isfinite(term.per_image).all() and term.elements.tolist() == [2, 3, 4]


def test_probabilities_over_the_vocabulary_sum_to_one(decoder, make_inputs):
    inputs = make_inputs(batch=1)
    words = [changed(inputs, text_ids=torch.tensor([[3, word, 0, 0, 0]])) for word in range(20)]
    probabilities = [math.exp(-decoder.token_nats(inputs.tokens, i)[0, 1].item()) for i in words]
    assert math.isclose(sum(probabilities), 1.0, rel_tol=1e-5)


def test_order_of_the_tokens_does_not_matter_but_their_place_does(decoder, make_inputs):
    inputs = make_inputs()
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = changed(inputs, token_index=inputs.token_index[:, order])
    expected = decoder(inputs.tokens, inputs).per_image
    torch.testing.assert_close(decoder(inputs.tokens[:, order], shuffled).per_image, expected)
    assert not torch.isclose(decoder(inputs.tokens, shuffled).per_image, expected).any()


def test_logits_in_pieces_give_the_same_numbers_and_gradients(decoder, make_inputs, monkeypatch):
    inputs = make_inputs()
    results = []
    for rows in (1024, 2):
        monkeypatch.setattr("infotok_lit.objective.sufficiency.LOGIT_ROWS", rows)
        nats = decoder(inputs.tokens, inputs).per_image
        results.append((nats, *torch.autograd.grad(nats.sum(), [inputs.tokens, decoder.words_out.weight])))
    torch.testing.assert_close(*results)
    assert inputs.text.target_mask.sum() > 4


RIGHT, WRONG = 0.85, 0.05


def noisy_sum_inputs(batch: int, shown: int) -> BranchOutput:
    """The truth is x in 0..3, the question is q in {0, 1}; the answer is x + q mod 4 with probability 0.85.

    Args:
        shown: the tokens tell x divided by this: with 1, x itself; with 2, only its upper half; with 4, nothing.
    """
    x, question = torch.randint(4, (batch,)), torch.randint(2, (batch,))
    wrong = torch.where(torch.rand(batch) < RIGHT, 0, torch.randint(1, 4, (batch,)))
    answer = (x + question + wrong) % 4
    answered = torch.tensor([False, True]).expand(batch, 2)
    return branch_output(
        tokens=torch.nn.functional.one_hot(x // shown, 4).float()[:, None],
        token_index=torch.zeros(batch, 1, dtype=torch.int64),
        num_extra=0,
        grid=(1, 1),
        text_ids=torch.stack([4 + question, answer], dim=1),
        text_mask=torch.ones_like(answered),
        target_mask=answered,
        text_key=torch.zeros(batch, dtype=torch.int64),
        text_embedding=torch.eye(6),
    )


def entropy_of_the_answer(shown: int) -> float:
    """H(answer | tokens, question) in nats: `shown` of the four answers share the chance to be right."""
    likely = (RIGHT + (shown - 1) * WRONG) / shown
    return -shown * likely * math.log(likely) - (4 - shown) * WRONG * math.log(WRONG)


@pytest.mark.parametrize("shown", [1, 2, 4])
def test_a_trained_decoder_reaches_the_entropy_of_its_source_and_does_not_beat_it(shown):
    """H(Y) - S is then I(Z; Y): log 4 minus the entropy, from 0.80 nats down to 0."""
    torch.manual_seed(0)
    decoder = TextDecoder(DecoderConfig(width=16, depth=1, heads=2), latent_width=4, text_width=6, num_extra=0)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    for _ in range(300):
        inputs = noisy_sum_inputs(128, shown)
        optimizer.zero_grad()
        decoder(inputs.tokens, inputs).per_image.mean().backward()
        optimizer.step()
    inputs, entropy = noisy_sum_inputs(8192, shown), entropy_of_the_answer(shown)
    with torch.no_grad():
        nats = decoder(inputs.tokens, inputs).per_image
    error = (nats.std() / len(nats) ** 0.5).item()
    assert entropy - 3 * error < nats.mean().item() < entropy + 3 * error + 0.03
