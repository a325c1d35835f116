"""Drawing and answering of a Harmon golden, replayed with the recorded random draws."""

import pytest
import torch
from golden import DECODED_IMAGE, SAMPLING_CHAIN, Golden
from harmon_replay import (
    RecordedNoise,
    build,
    grid_of,
)
from torch import Tensor

from infotok_lit.models.common.autoencoders import from_tokens
from infotok_lit.models.common.sampling import DrawingOptions
from infotok_lit.models.harmon import model as harmon_model
from infotok_lit.models.harmon.diffusion import make_schedule
from infotok_lit.models.harmon.family import HarmonConfig, SamplingConfig
from infotok_lit.models.harmon.model import Harmon
from infotok_lit.models.harmon.sampling import sample_tokens


@pytest.fixture(scope="module")
def golden(harmon_golden: Golden) -> Golden:
    return harmon_golden


@pytest.fixture(scope="module")
def model(golden: Golden) -> Harmon:
    return build(golden)


@pytest.mark.parametrize("name", ["cfg1", "cfg3", "std5_cfg1", "std5_cfg3"])
def test_token_sampling(golden: Golden, model: Harmon, name: str) -> None:
    case = f"token_sample_{name}"
    guidance = golden.argument(case, "cfg")
    initial, noise = golden.input(case, "noise_init"), golden.input(case, "noise")
    visited: list[Tensor] = []
    sampled = sample_tokens(
        model.token_diffusion.given(golden.input(case, "z")),
        lambda count: torch.cat([initial[None], noise[:, : len(initial)]])[:count],
        make_schedule(golden.argument(case, "timestep_respacing")),
        golden.argument(case, "temperature"),
        guidance,
        visited.append,
    )
    check_conditional(torch.stack(visited), golden.output(case, "x_steps")[:, : len(initial)])
    check_conditional(sampled, golden.output(case, "sample")[: len(initial)])


def check_conditional(actual: Tensor, expected: Tensor) -> None:
    """Under guidance the recorded unconditional half ends with other step noise, and nothing reads it."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= SAMPLING_CHAIN * max(1, float(expected.abs().max()))


@pytest.mark.parametrize("name", ["cfg1", "cfg3", "cfg3_linear_grid", "std5_cfg3"])
@torch.no_grad()
def test_image_sampling(golden: Golden, model: Harmon, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = f"sample_{name}"
    guidance = golden.argument(case, "cfg")
    guided = guidance != 1
    grid = grid_of(golden, case, model)
    seen: dict[str, list[Tensor]] = {"tokens": [], "x_enc": [], "z": [], "sampled": [], "scale": []}
    watch_sampling(model, seen, monkeypatch)
    noise = RecordedNoise(golden, case, guided)
    drawing = SamplingConfig(
        iterations=golden.argument(case, "num_iter"),
        guidance=guidance,
        guidance_schedule=golden.argument(case, "cfg_schedule"),
        temperature=golden.argument(case, "temperature"),
    )
    tokens = model.sample_latents(
        golden.input(case, "input_ids"),
        golden.input(case, "attention_mask"),
        noise,
        DrawingOptions(drawing, grid),
        golden.argument(case, "timestep_respacing"),
    )
    assert not noise.queue
    for iteration in range(drawing.iterations):
        # Both halves see the same tokens, which are encoded once.
        seen_tokens = seen["tokens"][iteration].unflatten(1, grid).repeat(noise.halves, 1, 1, 1)
        golden.check(case, f"step{iteration}_tokens", seen_tokens, SAMPLING_CHAIN)
        golden.check(case, f"step{iteration}_x_enc", seen["x_enc"][iteration], SAMPLING_CHAIN)
        golden.check(case, f"step{iteration}_z", seen["z"][iteration], SAMPLING_CHAIN)
        golden.check(case, f"step{iteration}_cfg", seen["scale"][iteration], SAMPLING_CHAIN)
        sampled = seen["sampled"][iteration]
        check_conditional(sampled, golden.output(case, f"step{iteration}_sampled")[: len(sampled)])
    latents = torch.cat([tokens] * noise.halves).unflatten(1, grid)
    golden.check(case, "latents", latents, SAMPLING_CHAIN)
    if "image" in golden.outputs(case):
        image = model.decode_images(from_tokens(tokens, grid, model.config.mar.patch_size))
        golden.check(case, "image", image, DECODED_IMAGE)
        levels = (127.5 * image + 128).clamp(0, 255).to(torch.uint8).int()
        assert (levels - golden.output(case, "image_uint8").int()).abs().max() <= 1


def watch_sampling(model: Harmon, seen: dict[str, list[Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Record what passes between the parts while an image is drawn."""
    encode, decode, given = model.encoder.forward, model.decoder.forward, model.token_diffusion.given

    def watched_encoder(latents, grid, visible=None):
        seen["tokens"].append(latents.clone())
        return encode(latents, grid, visible)

    def watched_decoder(tokens, grid, visible):
        seen["x_enc"].append(tokens)
        return decode(tokens, grid, visible)

    def watched_given(z, denoiser):
        seen["z"].append(z)
        return given(z, denoiser)

    def watched_sample(network, draw, schedule, temperature, guidance):
        seen["scale"].append(torch.tensor(float(guidance)))
        seen["sampled"].append(sample_tokens(network, draw, schedule, temperature, guidance))
        return seen["sampled"][-1]

    monkeypatch.setattr(model.encoder, "forward", watched_encoder)
    monkeypatch.setattr(model.decoder, "forward", watched_decoder)
    monkeypatch.setattr(model.token_diffusion, "given", watched_given)
    monkeypatch.setattr(harmon_model, "sample_tokens", watched_sample)


@pytest.mark.parametrize(("name", "penalty"), [("tokens", 1.0), ("tokens_rep_penalty", None)])
@torch.no_grad()
def test_describing(
    golden: Golden, model: Harmon, name: str, penalty: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = "i2t_generate"
    monkeypatch.setattr(model, "config", HarmonConfig(**{**vars(model.config), "repetition_penalty": penalty or 1.1}))
    monkeypatch.setattr(model.processor, "end_id", golden.argument(case, "eos_token_id"))
    monkeypatch.setattr(model.processor, "pad_id", golden.argument(case, "pad_token_id"))
    ids = golden.input(case, "input_ids")
    latents, grid = model.latent_tokens(golden.input(case, "pixel_values"))
    embeds = model.embed_with_images(ids, model.project_for_llm(model.encoder(latents, grid)))
    answer = model.answer(embeds, torch.ones_like(ids), golden.argument(case, "max_new_tokens"))
    golden.check(case, name, answer)
