"""Further negatives and fewer: the queue against a history kept by hand, limits against a loop."""

import math

import pytest
import torch
from branch_outputs import changed

from infotok_lit.objective.alignment import Alignment, NegativesConfig, TextQueue, choose
from infotok_lit.objective.config import BranchWeights, ObjectiveConfig

VOCABULARY = 20


def head(**settings) -> Alignment:
    torch.manual_seed(1)
    return Alignment(text_width=12, latent_width=8, temperature=0.2, negatives=NegativesConfig(**settings))


def batch_of(make_inputs, seed: int, keys: list[int]):
    """A batch whose texts are one word each, the word of their key."""
    ids = torch.tensor(keys)[:, None].expand(-1, 5).clone()
    mask = (torch.arange(5) == 0).expand(len(keys), 5).clone()
    table = torch.randn(VOCABULARY, 12, generator=torch.Generator().manual_seed(9))
    inputs = changed(make_inputs(batch=len(keys), seed=seed), text_ids=ids, text_embedding=table)
    return changed(inputs, text_mask=mask, target_mask=mask, text_key=torch.tensor(keys))


def loop_nats(alignment: Alignment, mean, table, own: list[int], candidates: list[list[int]]) -> torch.Tensor:
    """-log softmax of each row's own word among its own and its negatives, as plain sums."""
    rows = []
    for image, word, others in zip(mean.mean(1), own, candidates, strict=True):
        scores = [
            torch.cosine_similarity(image, alignment.text_map(table[w]), dim=0).item() / 0.2 for w in [word, *others]
        ]
        rows.append(math.log(sum(math.exp(s) for s in scores)) - scores[0])
    return torch.tensor(rows)


def test_the_queue_adds_the_last_texts_that_differ(make_inputs):
    alignment, means = head(queue_size=5), torch.randn(3, 3, 4, 8)
    batches = [[0, 1, 2], [3, 0, 4], [1, 5, 3]]
    past: list[int] = []
    for seed, (keys, mean) in enumerate(zip(batches, means, strict=True)):
        inputs = batch_of(make_inputs, seed, keys)
        contrast = alignment(mean, inputs)
        everyone = keys + past[-5:]
        others = [[k for k in everyone if k != own] for own in keys]
        expected = loop_nats(alignment, mean, inputs.text_embedding.weight, keys, others)
        torch.testing.assert_close(contrast.nats, expected, rtol=1e-4, atol=1e-5)
        assert [round(math.exp(v)) for v in contrast.log_k.tolist()] == [1 + len(row) for row in others]
        past += keys


def test_texts_of_the_past_are_seen_through_todays_map(make_inputs):
    alignment, mean = head(queue_size=3), torch.randn(3, 4, 8)
    alignment(mean, batch_of(make_inputs, 0, [0, 1, 2]))
    torch.nn.init.normal_(alignment.text_map.weight)
    inputs = batch_of(make_inputs, 1, [3, 4, 5])
    contrast = alignment(mean, inputs)
    others = [[4, 5, 0, 1, 2], [3, 5, 0, 1, 2], [3, 4, 0, 1, 2]]
    expected = loop_nats(alignment, mean, inputs.text_embedding.weight, [3, 4, 5], others)
    torch.testing.assert_close(contrast.nats, expected, rtol=1e-4, atol=1e-5)
    contrast.nats.sum().backward()  # the queue moved since the forward pass, and that does no harm
    assert alignment.text_map.weight.grad.any()


def test_rows_without_text_are_queued_as_nothing(make_inputs):
    alignment, mean = head(queue_size=4), torch.randn(3, 4, 8)
    inputs = batch_of(make_inputs, 0, [0, 1, 2])
    inputs.text.mask[1] = False
    alignment(mean, inputs)
    contrast = alignment(mean, batch_of(make_inputs, 1, [3, 4, 5]))
    assert [round(math.exp(v)) for v in contrast.log_k.tolist()] == [5, 5, 5]


def test_evaluation_reads_the_queue_and_leaves_it(make_inputs):
    alignment, mean = head(queue_size=4), torch.randn(3, 4, 8)
    alignment(mean, batch_of(make_inputs, 0, [0, 1, 2]))
    before = {name: value.clone() for name, value in alignment.queue.state_dict().items()}
    contrast = alignment.eval()(mean, batch_of(make_inputs, 1, [3, 4, 5]))
    assert [round(math.exp(v)) for v in contrast.log_k.tolist()] == [6, 6, 6]
    torch.testing.assert_close(alignment.queue.state_dict(), before, rtol=0, atol=0)


def test_a_resumed_run_contrasts_with_the_same_texts(make_inputs):
    first, second, mean = head(queue_size=4), head(queue_size=4), torch.randn(3, 4, 8)
    first(mean, batch_of(make_inputs, 0, [0, 1, 2]))
    second.load_state_dict(first.state_dict())
    inputs = batch_of(make_inputs, 1, [3, 4, 5])
    assert torch.equal(first(mean, inputs).nats, second(mean, inputs).nats)


def test_a_batch_larger_than_the_queue_leaves_its_last_rows():
    queue = TextQueue(2, 1)
    queue.push(torch.arange(5.0)[:, None], torch.arange(5), torch.tensor([True, True, True, True, False]))
    assert queue.texts.flatten().tolist() == [3, 4] and queue.keys.tolist() == [3, 4]
    assert queue.present.tolist() == [True, False]


def test_nearest_keeps_the_texts_most_like_the_own_one(make_inputs):
    alignment, mean = head(limit=2, kept="nearest"), torch.randn(6, 4, 8)
    keys = [0, 1, 2, 3, 4, 0]
    inputs = batch_of(make_inputs, 0, keys)
    table = inputs.text_embedding.weight

    def nearest(own: int) -> list[int]:
        others = [k for k in keys if k != own]
        return sorted(others, key=lambda k: -torch.cosine_similarity(table[own], table[k], dim=0).item())[:2]

    expected = loop_nats(alignment, mean, table, keys, [nearest(key) for key in keys])
    torch.testing.assert_close(alignment(mean, inputs).nats, expected, rtol=1e-4, atol=1e-5)


def test_random_keeps_any_eligible_text_equally_often():
    torch.manual_seed(0)
    eligible = torch.tensor([[False, True, True, True, True], [True, False, False, False, False]]).repeat(2000, 1)
    chosen = choose(eligible, torch.zeros(4000, 1), torch.zeros(5, 1), NegativesConfig(limit=2))
    assert not (chosen & ~eligible).any()
    assert (chosen[0::2].sum(1) == 2).all() and (chosen[1::2].sum(1) == 1).all()
    share = chosen[0::2].float().mean(0)[1:]
    assert (share - 0.5).abs().max() < 4 * 0.5 / 2000**0.5


@pytest.mark.parametrize("kept", ["random", "nearest"])
def test_a_limit_leaves_the_bound_as_it_is_and_takes_fewer_candidates(kept, make_inputs):
    mean, inputs = torch.randn(6, 4, 8), batch_of(make_inputs, 0, [0, 1, 2, 3, 4, 0])
    full, limited = head()(mean, inputs), head(limit=2, kept=kept)(mean, inputs)
    torch.testing.assert_close(limited.bound, full.bound)
    torch.testing.assert_close(limited.log_k, torch.full((6,), math.log(3)))
    assert (limited.nats < full.nats).all()


def test_a_limit_that_nothing_exceeds_changes_nothing(make_inputs):
    mean, inputs = torch.randn(3, 4, 8), batch_of(make_inputs, 0, [0, 1, 2])
    assert torch.equal(head()(mean, inputs).nats, head(limit=2, kept="nearest")(mean, inputs).nats)


def test_the_queue_is_in_the_checkpoint_of_the_branches_that_align(make_infotok):
    infotok = make_infotok(ObjectiveConfig(negatives=NegativesConfig(queue_size=7)))
    names = {name for name in infotok.state_dict() if "queue" in name}
    branches = ("understanding", "generation")
    assert names == {f"heads.{b}.alignment.queue.{part}" for b in branches for part in ("texts", "keys", "present")}
    assert not any("queue" in name for name in make_infotok(ObjectiveConfig()).state_dict())


def with_false_texts(inputs, words: list[list[int]]):
    """Adds, per image, false texts of one word each."""
    most = max(map(len, words))
    ids = torch.tensor([[[word, 0] for word in row] + [[0, 0]] * (most - len(row)) for row in words])
    mask = torch.tensor([[[i < len(row), False] for i in range(most)] for row in words])
    return changed(inputs, negative_ids=ids, negative_mask=mask)


FALSE = [[11, 12], [], [13], [14, 15, 16]]


@pytest.mark.parametrize("from_data", [1, 2, 9])
def test_false_texts_are_contrasted_with_their_own_image_only(make_inputs, from_data):
    alignment, mean = head(from_data=from_data), torch.randn(4, 4, 8)
    keys = [0, 1, 2, 0]
    inputs = with_false_texts(batch_of(make_inputs, 0, keys), FALSE)
    contrast = alignment(mean, inputs)
    others = [[k for k in keys if k != own] + FALSE[i][:from_data] for i, own in enumerate(keys)]
    expected = loop_nats(alignment, mean, inputs.text_embedding.weight, keys, others)
    torch.testing.assert_close(contrast.nats, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(contrast.log_k, torch.tensor([1.0 + len(row) for row in others]).log())


def test_false_texts_come_beside_a_limit_and_a_queue(make_inputs):
    alignment, mean = head(from_data=3, limit=1, kept="nearest", queue_size=3), torch.randn(4, 4, 8)
    alignment(mean, batch_of(make_inputs, 1, [5, 6, 7, 8]))
    keys = [0, 1, 2, 3]
    inputs = with_false_texts(batch_of(make_inputs, 0, keys), FALSE)
    table = inputs.text_embedding.weight

    def nearest(own: int) -> int:
        others = [k for k in [*keys, 6, 7, 8] if k != own]
        return max(others, key=lambda k: torch.cosine_similarity(table[own], table[k], dim=0).item())

    others = [[nearest(own), *FALSE[i]] for i, own in enumerate(keys)]
    expected = loop_nats(alignment, mean, table, keys, others)
    torch.testing.assert_close(alignment(mean, inputs).nats, expected, rtol=1e-4, atol=1e-5)


def test_the_bound_is_without_texts_that_were_made_to_be_false(make_inputs):
    """They are not drawn from the distribution of texts, which the bound needs."""
    inputs, mean = batch_of(make_inputs, 0, [0, 1, 2, 3]), torch.randn(4, 4, 8)
    torch.testing.assert_close(
        head(from_data=3)(mean, with_false_texts(inputs, FALSE)).bound, head()(mean, inputs).bound
    )


def test_unless_asked_for_false_texts_are_ignored(make_inputs):
    inputs, mean = batch_of(make_inputs, 0, [0, 1, 2, 3]), torch.randn(4, 4, 8)
    given, without = head()(mean, with_false_texts(inputs, FALSE)), head()(mean, inputs)
    asked = head(from_data=2)(mean, inputs)
    assert torch.equal(given.nats, without.nats) and torch.equal(asked.nats, without.nats)


def test_an_image_without_text_is_no_anchor_for_false_texts_either(make_inputs):
    inputs, mean = with_false_texts(batch_of(make_inputs, 0, [0, 1, 2, 3]), FALSE), torch.randn(4, 4, 8)
    inputs.text.mask[0] = False
    contrast = head(from_data=2)(mean, inputs)
    assert contrast.nats[0] == contrast.log_k[0] == 0 and contrast.nats[3] > 0


def test_gradients_reach_the_map_and_the_image_through_false_texts(make_inputs):
    alignment, mean = head(from_data=2), torch.randn(1, 4, 8, requires_grad=True)
    contrast = alignment(mean, with_false_texts(batch_of(make_inputs, 0, [0]), [[11, 12]]))
    contrast.nats.sum().backward()
    assert mean.grad.any() and alignment.text_map.weight.grad.any()
    assert torch.isfinite(mean.grad).all()


def test_which_branches_ask_the_data():
    asked = NegativesConfig(from_data=3)
    config = ObjectiveConfig(negatives=asked, branches=("generation",))
    assert [config.negatives_from_data(b) for b in ("understanding", "generation")] == [0, 3]
    for off in ({"terms": ("compactness",)}, {"estimator": "hsic"}, {"generation": BranchWeights(alpha=0.0)}):
        assert ObjectiveConfig(negatives=asked, **off).negatives_from_data("generation") == 0


def test_false_texts_of_another_shape_are_refused(make_inputs, make_infotok):
    inputs = with_false_texts(batch_of(make_inputs, 0, [0, 1, 2, 3]), [[1, 2], [3], [4]])
    with pytest.raises(ValueError, match=r"text.negatives.ids must have shape \(4, 2, 2\), not \(3, 2, 2\)"):
        make_infotok(ObjectiveConfig())("generation", inputs, step=0)
