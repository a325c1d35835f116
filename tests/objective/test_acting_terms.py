"""Terms that act: what sufficiency takes from the tokens, and the settings that make it take more."""

import math
from dataclasses import replace

import pytest
import torch
from branch_outputs import changed

from infotok_lit.objective.alignment import TEMPERATURE_RANGE, Alignment, info_nce
from infotok_lit.objective.compactness import compactness
from infotok_lit.objective.config import ObjectiveConfig
from infotok_lit.objective.report import inert_message
from infotok_lit.objective.sufficiency import (
    DecoderConfig,
    LatentDecoder,
    TextDecoder,
    hidden_places,
    other_images,
)
from infotok_lit.objective.term import PAPER_TERMS

SMALL = DecoderConfig(width=16, depth=1, heads=2)


def test_the_gap_counts_the_places_that_are_hidden_of_the_own_image(make_infotok, make_inputs):
    config = ObjectiveConfig(terms=PAPER_TERMS, decoder=replace(SMALL, latents="hidden"))
    infotok, inputs, noise = make_infotok(config).eval(), make_inputs(batch=4), torch.randn(4, 5, 64)
    gaps = infotok("generation", inputs, step=0, noise=noise).sufficiency_gaps
    head, hidden, following = infotok.heads["generation"], hidden_places(inputs), [1, 2, 3, 0]
    sample = head.projection(inputs.tokens).rsample(noise)
    swapped = changed(inputs, token_index=inputs.token_index[following])
    assert not torch.equal(hidden_places(swapped), hidden)
    nats = []
    for z, output in ((sample, inputs), (sample[following], swapped)):
        mean, log_variance = head.decoder.predict(z, output, inputs.latent_grid)
        density = torch.distributions.Normal(mean, (log_variance / 2).exp()).log_prob(inputs.latents)
        nats.append(-(density.sum(2) * hidden).sum(1))
    torch.testing.assert_close(gaps, (nats[1] - nats[0]) / (5 * hidden.sum(1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("branch", ["understanding", "generation"])
def test_the_gap_is_the_loss_with_another_images_sample_minus_the_own(branch, make_infotok, make_inputs):
    infotok, inputs, noise = (
        make_infotok(ObjectiveConfig(terms=PAPER_TERMS)),
        make_inputs(batch=4),
        torch.randn(4, 5, 64),
    )
    assert infotok(branch, inputs, step=0, noise=noise).sufficiency_gaps is None, "only validation pays for it"
    gaps = infotok.eval()(branch, inputs, step=0, noise=noise).sufficiency_gaps
    head = infotok.heads[branch]
    sample = head.projection(inputs.tokens).rsample(noise)
    for image in range(4):
        other = (image + 1) % 4
        swapped = changed(inputs, token_index=inputs.token_index[[other] * 4])
        own, wrong = head.decoder(sample, inputs), head.decoder(sample[[other] * 4], swapped)
        expected = (wrong.per_image - own.per_image)[image] / own.elements[image]
        torch.testing.assert_close(gaps[image], expected, rtol=1e-4, atol=1e-5)


def test_another_image_has_another_answer(make_inputs):
    inputs = make_inputs(batch=4)
    inputs.text.ids[:] = torch.tensor([[3, 7, 0, 0, 0], [4, 7, 0, 0, 0], [3, 8, 0, 0, 0], [5, 7, 0, 0, 0]])
    mask = torch.tensor([[True, True, False, False, False]]).expand(4, -1)
    inputs = changed(inputs, text_mask=mask, target_mask=mask & (torch.arange(5) == 1))
    rows, differs = other_images("understanding", inputs)
    assert rows.tolist() == [2, 2, 3, 2] and differs.all()
    same = changed(inputs, text_ids=inputs.text.ids[[0, 1, 3, 0]])
    assert not other_images("understanding", same)[1].any()
    rows, differs = other_images("generation", changed(inputs, text_key=torch.tensor([5, 5, 6, 5])))
    assert rows.tolist() == [2, 2, 3, 2] and differs.all()


def test_the_same_answer_to_a_longer_question_is_no_other_answer(make_inputs):
    text_ids = torch.tensor([[3, 7, 9, 0, 0], [3, 4, 7, 9, 0], [4, 4, 4, 7, 0], [5, 7, 9, 0, 0]])
    position, questions, answers = torch.arange(5), torch.tensor([1, 2, 3, 1]), torch.tensor([2, 2, 1, 2])
    text_mask = position < (questions + answers)[:, None]
    target_mask = text_mask & (position >= questions[:, None])
    inputs = changed(make_inputs(batch=4), text_ids=text_ids, text_mask=text_mask, target_mask=target_mask)
    spoken = [tuple(row[mask].tolist()) for row, mask in zip(text_ids, target_mask, strict=True)]
    rows, differs = other_images("understanding", inputs)
    assert differs.all()
    assert all(spoken[row] != spoken[image] for image, row in enumerate(rows.tolist())), (spoken, rows)


def test_inertness_is_said_in_words():
    assert inert_message("understanding", 0.2, 0.01) is None
    assert inert_message("generation", 0.004, 0.001) is None
    for branch, gap, error in (("understanding", 0.005, 0.0001), ("generation", 0.002, 0.001)):
        message = inert_message(branch, gap, error)
        assert f"{branch}: sufficiency is inert" in message and "decoder.teacher_forcing" in message
    # Batches of one image, or of images that all have one answer, have nothing to compare; one number has no error.
    assert inert_message("understanding", math.nan, math.nan) is inert_message("generation", 0.002, math.nan) is None


def test_accuracy_counts_the_true_texts_that_win():
    similarity = torch.tensor([[2.0, 1.0, 0.0], [3.0, 1.0, 0.0], [0.0, 5.0, 1.0]])
    everyone = torch.ones(3, dtype=torch.bool)
    contrast = info_nce(similarity, torch.arange(3), ~torch.eye(3, dtype=torch.bool), everyone)
    assert contrast.found.tolist() == [True, False, False]


def test_free_bits_are_free_per_token():
    kl = torch.tensor([[[0.2, 0.1], [0.6, 0.9]]], requires_grad=True)
    term = compactness(kl, free_nats=1.0)
    torch.testing.assert_close(term.per_image, torch.tensor([1.0 + 1.5]))
    term.per_image.sum().backward()
    assert kl.grad.tolist() == [[[0.0, 0.0], [1.0, 1.0]]]


def test_free_bits_are_a_setting_in_bits(make_infotok, make_inputs):
    noise, inputs = torch.randn(3, 5, 64), make_inputs()
    rates = make_infotok(ObjectiveConfig(terms=PAPER_TERMS))("generation", inputs, step=0, noise=noise).token_rates
    limit = rates.median().item()
    infotok = make_infotok(ObjectiveConfig(terms=PAPER_TERMS, free_bits=limit))
    objective = infotok("generation", inputs, step=0, noise=noise)
    expected = 0.1 * rates.clamp(min=limit).sum(1).mean() * math.log(2) / 8
    torch.testing.assert_close(objective.terms["compactness"], expected)


def test_compactness_may_warm_up_alone(make_infotok, make_inputs):
    noise, inputs = torch.randn(3, 5, 64), make_inputs()
    infotok = make_infotok(ObjectiveConfig(terms=PAPER_TERMS, compactness_warmup_steps=4))
    full, quarter = (infotok("generation", inputs, step=step, noise=noise).terms for step in (4, 1))
    torch.testing.assert_close(quarter["compactness"], full["compactness"] / 4)
    torch.testing.assert_close(quarter["sufficiency"], full["sufficiency"])


def test_without_teacher_forcing_no_answer_word_tells_another(make_inputs):
    torch.manual_seed(0)
    decoder = TextDecoder(replace(SMALL, teacher_forcing=False), latent_width=16, text_width=12, num_extra=2)
    torch.nn.init.normal_(decoder.words_out.weight)
    inputs = make_inputs()
    ids = inputs.text.ids.clone()
    ids[2, 1] = (ids[2, 1] + 1) % 20  # the first answer word of three
    other = changed(inputs, text_ids=ids)
    before, after = (decoder.token_nats(inputs.tokens, i) for i in (inputs, other))
    torch.testing.assert_close(before[2, 2:], after[2, 2:])
    ids[2, 0] = (ids[2, 0] + 1) % 20  # the question
    asked = decoder.token_nats(inputs.tokens, changed(inputs, text_ids=ids))
    assert not torch.isclose(after[2, 2], asked[2, 2])


def test_hidden_latents_are_those_of_hidden_tokens(make_inputs):
    """A grid of 2 x 3 tokens after 2 extra ones, over 4 x 3 latents: a token is two latents high."""
    inputs = make_inputs(tokens=5)
    hidden = hidden_places(inputs)
    for image in range(3):
        shown = set(inputs.token_index[image].tolist())
        expected = [2 + 3 * (row // 2) + column not in shown for row in range(4) for column in range(3)]
        assert hidden[image].tolist() == expected
    torch.manual_seed(0)
    everything, some = (
        LatentDecoder(replace(SMALL, latents=target), latent_width=16, latent_channels=5, num_extra=2)
        for target in ("all", "hidden")
    )
    some.load_state_dict(everything.state_dict())
    mean, log_variance = everything.predict(inputs.tokens, inputs, inputs.latent_grid)
    density = torch.distributions.Normal(mean, (log_variance / 2).exp()).log_prob(inputs.latents).sum(2)
    term = some(inputs.tokens, inputs)
    torch.testing.assert_close(term.per_image, -(density * hidden).sum(1))
    assert term.elements.tolist() == (5 * hidden.sum(1)).tolist()


def test_a_model_that_hides_nothing_is_named(make_inputs):
    decoder = LatentDecoder(replace(SMALL, latents="hidden"), latent_width=16, latent_channels=5, num_extra=2)
    inputs = make_inputs(tokens=8)
    with pytest.raises(ValueError, match="this model hides no tokens; set it to all or coarse"):
        decoder(inputs.tokens, inputs)


def test_coarse_latents_are_means_of_blocks(make_inputs):
    decoder = LatentDecoder(replace(SMALL, latents="coarse"), latent_width=16, latent_channels=5, num_extra=2)
    inputs = make_inputs()
    latents = inputs.latents.view(3, 4, 3, 5)
    blocks = [latents[:, row : row + 2, column : column + 2].mean((1, 2)) for row in (0, 2) for column in (0, 2)]
    mean, log_variance = decoder.predict(inputs.tokens, inputs, (2, 2))
    density = torch.distributions.Normal(mean, (log_variance / 2).exp()).log_prob(torch.stack(blocks, 1))
    term = decoder(inputs.tokens, inputs)
    torch.testing.assert_close(term.per_image, -density.sum((1, 2)))
    assert term.elements.tolist() == 3 * [2 * 2 * 5]


def test_a_learned_temperature_starts_where_it_is_told_learns_and_stays_in_its_range(make_inputs):
    head = Alignment(12, 8, 0.2, learn_temperature=True)
    assert head.temperature.item() == pytest.approx(0.2, rel=1e-4)
    optimiser = torch.optim.SGD([head.place], lr=1e3)
    for direction in (1, -1):
        for _ in range(50):
            optimiser.zero_grad()
            (direction * head.temperature).backward()
            optimiser.step()
        low, high = TEMPERATURE_RANGE
        assert low * 0.999 <= head.temperature.item() <= high * 1.001
    head(torch.randn(3, 4, 8), make_inputs()).nats.sum().backward()
    assert head.place.grad is not None
    assert not any("place" in name for name, _ in Alignment(12, 8, 0.2).named_parameters())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ObjectiveConfig(free_bits=-1.0), "free_bits is -1.0"),
        (lambda: ObjectiveConfig(compactness_warmup_steps=-1), "compactness_warmup_steps is -1"),
        (lambda: ObjectiveConfig(temperature=2.0, learn_temperature=True), "start between 0.01 and 1.0"),
        (lambda: DecoderConfig(latents="some"), "'some' is not known"),
    ],
)
def test_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
