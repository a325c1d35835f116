"""Reading, drawing and editing with OpenUni, beside what test_inference.py tests of every family."""

from dataclasses import replace

import pytest
import torch
from loud import CAPTIONS, NEW_TOKENS, PROMPTS, loud_model

from infotok_lit.errors import SettingsError
from infotok_lit.models.openuni.diffusion import RandomNumbers, random_numbers, walk
from infotok_lit.models.openuni.family import FAMILY, SamplingConfig
from infotok_lit.models.openuni.model import OpenUni
from infotok_lit.models.openuni.processor import KEEP_PROMPT
from infotok_lit.scenes import Scenes


@pytest.fixture(scope="module")
def model() -> OpenUni:
    return loud_model("openuni")


def test_the_system_prompt_is_part_of_the_conversation(model, images, monkeypatch) -> None:
    before = model.describe(images, PROMPTS, NEW_TOKENS)
    monkeypatch.setattr(model.processor, "system", "answer in one word")
    assert model.describe(images, PROMPTS, NEW_TOKENS) != before


def test_guidance_leads_away_from_the_negative_prompt(model) -> None:
    """Guidance is linear: without one iteration's difference between prompts and negatives it changes nothing."""
    guided = replace(model.config.sampling, guidance=3.0, negative_prompt=CAPTIONS[0])
    plain = replace(model.config.sampling, guidance=1.0)
    found = model.generate([CAPTIONS[0]], 0, guided)
    torch.testing.assert_close(found, model.generate([CAPTIONS[0]], 0, plain), rtol=0, atol=2e-4)
    assert (model.generate([CAPTIONS[1]], 0, guided) - model.generate([CAPTIONS[1]], 0, plain)).abs().max() > 0.01


def test_a_redrawn_picture_is_its_source_its_instruction_and_its_seed(model, images) -> None:
    instructions = [KEEP_PROMPT, "make it red", "make it blue", "add a circle"]
    together = model.edit(images, instructions, seed=2)
    for i, instruction in enumerate(instructions):
        alone = model.edit(images[i : i + 1], [instruction], seed=2 + i)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=2e-4)
    assert (together - model.edit(images.flip(0), instructions, seed=2)).abs().max() > 1e-3


@pytest.mark.parametrize(("iterations", "time_shift"), [(600, 3.0), (20, 60.0)])
def test_the_walk_begins_at_its_start_where_timesteps_repeat(iterations, time_shift) -> None:
    """Along the straight line from noise to an image the velocity is the same everywhere, and so it leads there."""
    image, start, steps = torch.rand(1, 2, 3, 3), torch.randn(1, 2, 3, 3), []
    sampling = SamplingConfig(iterations=iterations, guidance=1.0, time_shift=time_shift)

    def velocity(latents, timestep):
        steps.append(int(timestep))
        return start - image

    found = walk(velocity, start, sampling)
    assert len(steps) == iterations and steps[0] == steps[1] == 999
    torch.testing.assert_close(found, image, rtol=0, atol=5e-3)


@torch.no_grad()
def test_the_loss_is_taken_at_shifted_times(model, monkeypatch) -> None:
    """By hand: 6 t / (1 + 5 t / 1000) of 1000, 400 and 100 thousandths is 1000, 800 and 400."""
    condition = torch.randn(3, model.config.num_queries, model.config.transformer.caption_width)
    latents, noise = torch.randn(2, 3, model.latent_width, 4, 4)
    expected = model.flow_loss(latents, condition, RandomNumbers(noise, torch.tensor([0.0005, 0.2005, 0.6005])))
    monkeypatch.setattr(model, "config", replace(model.config, training_time_shift=6.0))
    found = model.flow_loss(latents, condition, RandomNumbers(noise, torch.tensor([0.0005, 0.6005, 0.9005])))
    torch.testing.assert_close(found, expected)
    with pytest.raises(SettingsError, match="training_time_shift must be positive, not 0"):
        replace(model.config, training_time_shift=0.0)


@torch.no_grad()
def test_an_image_at_several_noise_levels_counts_as_so_many_images(model, monkeypatch) -> None:
    """The same batch with each sample three times, at the same noise."""
    sample = Scenes().sample("generation", 0)
    once, thrice = model.processor.generation([sample]), model.processor.generation([sample] * 3)
    shape = torch.Size((3, model.latent_width, 4, 4))
    random = random_numbers(shape, torch.device("cpu"), draws=3)
    expected = model.generation(thrice, random=random)
    monkeypatch.setattr(model, "config", replace(model.config, noise_draws=3))
    found = model.generation(once, random=random)
    assert found.loss_count == expected.loss_count and len(found.tokens) == len(found.latents) == 1
    torch.testing.assert_close(found.loss_sum, expected.loss_sum)


def test_the_noise_levels_of_an_image_are_spread_evenly_and_uniform() -> None:
    uniform = random_numbers(torch.Size((4000, 1, 1, 1)), torch.device("cpu"), draws=4).uniform.view(1000, 4)
    assert uniform.min() >= 0 and uniform.max() < 1
    torch.testing.assert_close(uniform.sort(dim=1).values.diff(dim=1), torch.full((1000, 3), 0.25))
    # Each alone is uniform: a Kolmogorov-Smirnov distance above this is seen once in a million.
    distance = (uniform.sort(dim=0).values - torch.arange(1000).unsqueeze(1) / 1000).abs().max()
    assert distance < 2.7 / 1000**0.5


def test_the_input_size_is_a_setting_that_takes_the_same_weights(model) -> None:
    wider = replace(model.config, vision=replace(model.config.vision, input_size=48))
    other = FAMILY.build(wider, "scenes32")
    other.load_state_dict(model.state_dict())
    assert FAMILY.differing_parts(model.config, wider) == []
    source = Scenes(num_samples=1)
    batch = other.processor.understanding([source.sample("understanding", 0, None)])
    assert batch.pixel_values.shape == (1, 3, 48, 48)
    output = other.eval().understanding(batch)
    assert output.tokens.shape[1] == output.layout.num_tokens == 36 and output.layout.grid == (6, 6)
    assert len(other.describe(batch.pixel_values, ["why?"], 2)) == 1
    with pytest.raises(SettingsError, match=r"vision\.input_size: 36 is not a multiple of 8 pixels"):
        replace(model.config.vision, input_size=36)
