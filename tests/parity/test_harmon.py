"""Passes and losses of a Harmon golden, replayed with the recorded random draws."""

import math

import pytest
import torch
from golden import DECODED_IMAGE, Golden
from harmon_replay import (
    build,
    check_gradients,
    check_recorded_gradients,
    grid_of,
    joint_norm,
    no_text,
)
from torch import Tensor

from infotok_lit.batch import GenerationBatch, UnderstandingBatch
from infotok_lit.models.common.autoencoders import from_tokens, to_tokens
from infotok_lit.models.common.language_model import places_where
from infotok_lit.models.harmon.diffusion import make_schedule
from infotok_lit.models.harmon.family import HarmonConfig
from infotok_lit.models.harmon.model import Harmon
from infotok_lit.models.harmon.sampling import RandomNumbers


@pytest.fixture(scope="module")
def golden(harmon_golden: Golden) -> Golden:
    return harmon_golden


@pytest.fixture(scope="module")
def model(golden: Golden) -> Harmon:
    return build(golden)


def shown(golden: Golden, case: str) -> Tensor:
    mask = golden.input(case, "mask") == 0
    return places_where(mask, int(mask[0].sum()))


@torch.no_grad()
def test_autoencoder(golden: Golden, model: Harmon) -> None:
    network = model.autoencoder.network
    posterior = network.encode(golden.input("vae", "image")).latent_dist
    golden.check("vae", "mean", posterior.mean)
    golden.check("vae", "std", posterior.std)
    golden.check("vae", "mode", model.autoencoder.encode(golden.input("vae", "image")))
    golden.check("vae", "decoded", model.autoencoder.decode(golden.input("vae", "z")), DECODED_IMAGE)


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [1, 2])
def test_latent_tokens(golden: Golden, model: Harmon, patch_size: int) -> None:
    scale = model.config.latent_scale
    tokens, grid = to_tokens(model.autoencoder.encode(golden.input("encode", "image")) * scale, patch_size)
    golden.check("encode", f"latents_p{patch_size}", tokens.unflatten(1, grid))
    decoded = model.autoencoder.decode(from_tokens(tokens, grid, patch_size) / scale)
    golden.check("encode", f"decoded_p{patch_size}", decoded, DECODED_IMAGE)


@torch.no_grad()
@pytest.mark.parametrize("case", ["visual", "visual_grid", "visual_small", "visual_masked"])
def test_visual_feature(golden: Golden, model: Harmon, case: str) -> None:
    latents = golden.input(case, "latents").flatten(1, 2)
    visible = shown(golden, case) if case == "visual_masked" else None
    tokens = model.encoder(latents, grid_of(golden, case, model), visible)
    golden.check(case, "x_enc", tokens)
    golden.check(case, "z_enc", model.project_for_llm(tokens))


@torch.no_grad()
@pytest.mark.parametrize("case", ["mae", "mae_grid", "mae_allmasked"])
@pytest.mark.parametrize("cached", [False, True])
def test_text_conditioned_passes(golden: Golden, model: Harmon, case: str, cached: bool) -> None:
    grid = grid_of(golden, case, model)
    visible = shown(golden, case)
    tokens = model.encoder(golden.input(case, "latents").flatten(1, 2), grid, visible)
    golden.check(case, "x_enc_pre", tokens)
    golden.check(case, "z_enc", model.project_for_llm(tokens))
    ids, mask = golden.input(case, "input_ids"), golden.input(case, "attention_mask")
    if cached:
        conditioned = model.condition_on_cache(tokens, model.text_cache(ids), mask)
    else:
        conditioned = model.condition_on(tokens, model.text_embedding(ids), mask)
    golden.check(case, "x_enc", conditioned)
    golden.check(case, "z", model.decoder(conditioned, grid, visible))


def test_token_diffusion_loss(golden: Golden, model: Harmon) -> None:
    case = "diffloss"
    z = golden.input(case, "z").requires_grad_()
    t, noise, target = (golden.input(case, name) for name in ("t", "noise", "target"))
    model.zero_grad(set_to_none=True)
    squared_error, bound = model.token_diffusion.losses(target, z, t, noise)
    golden.check(case, "mse", squared_error)
    golden.check(case, "vb", bound)
    losses = squared_error + bound
    golden.check(case, "loss_per_token", losses)
    golden.check(case, "loss_nomask", losses.mean())
    mask = golden.input(case, "mask")
    loss = (losses * mask).sum() / mask.sum()
    golden.check(case, "loss", loss)
    coefficients = make_schedule().at(t)
    x_t = coefficients.signal * target + coefficients.noise * noise
    golden.check(case, "x_t", x_t)
    golden.check(case, "model_output", model.token_diffusion(x_t, t, model.token_diffusion.condition_embed(z)))
    loss.backward()
    golden.check(case, "grad_z", z.grad)
    golden.check(case, "grad_final_weight", model.token_diffusion.output.weight.grad)
    golden.check(case, "grad_final_bias", model.token_diffusion.output.bias.grad)


@pytest.mark.parametrize("case", ["t2i_loss", "t2i_loss_grid"])
def test_generation_loss(golden: Golden, model: Harmon, case: str) -> None:
    ids = golden.input(case, "input_ids")
    hidden = golden.input(case, "mask").bool()
    places, ratio = hidden.shape[1], float(golden.input(case, "mask_rate"))
    ordered = golden.input(case, "orders")[:, : math.ceil(places * ratio)]
    assert torch.equal(hidden, torch.zeros_like(hidden).scatter(1, ordered, True))
    counted = hidden.flatten().repeat(model.config.mar.noise_draws)
    draws = RandomNumbers(hidden, golden.input(case, "t")[counted], golden.input(case, "noise")[counted])
    batch = GenerationBatch(
        golden.input(case, "pixel_values"), ids, golden.input(case, "attention_mask"), no_text(len(ids)), [], [], []
    )
    model.zero_grad(set_to_none=True)
    output = model.generation(batch, random=draws)
    golden.check(case, "latents", output.latents)
    golden.check(case, "loss", output.loss_sum / output.loss_count)
    visible = places_where(~hidden, int((~hidden[0]).sum()))
    conditioned = model.condition_on(output.tokens, model.text_embedding(ids), batch.attention_mask)
    golden.check(case, "x_enc", conditioned)
    golden.check(case, "z", model.decoder(conditioned, output.layout.grid, visible))
    (output.loss_sum / output.loss_count).backward()
    check_gradients(golden, case, model, "gradnorm")
    check_recorded_gradients(golden, case, model)


@pytest.mark.parametrize("case", ["i2t_loss", "i2t_loss_grid"])
@pytest.mark.parametrize("scaled", [True, False])
def test_understanding_loss(
    golden: Golden, model: Harmon, case: str, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = golden.input(case, "input_ids")
    batch = UnderstandingBatch(
        golden.input(case, "pixel_values"),
        ids,
        golden.input(case, "attention_mask"),
        golden.input(case, "labels"),
        no_text(len(ids)),
        [],
        [],
        [],
        [],
    )
    if not scaled:
        monkeypatch.setattr(model, "config", config_without_grad_scale(model.config))
    model.zero_grad(set_to_none=True)
    output = model.understanding(batch)
    suffix = "" if scaled else "_noscale"
    golden.check(case, f"loss{suffix}", output.loss_sum / output.loss_count)
    (output.loss_sum / output.loss_count).backward()
    check_gradients(golden, case, model, f"gradnorm{suffix}")
    encoder = (
        "encoder.transformer.",
        "encoder.positions",
        "encoder.token_embed",
        "encoder.input_norm",
        "encoder.buffer_token",
    )
    golden.check(case, f"encoder_gradnorm{suffix}", joint_norm(model, *encoder))
    golden.check(case, f"llm_gradnorm{suffix}", joint_norm(model, "llm."))
    golden.check(case, f"proj_in_gradnorm{suffix}", joint_norm(model, "project_in."))
    if scaled:
        check_recorded_gradients(golden, case, model)


def config_without_grad_scale(config: HarmonConfig) -> HarmonConfig:
    return HarmonConfig(**{**vars(config), "grad_scale": None})


@torch.no_grad()
def test_text_only_loss(golden: Golden, model: Harmon) -> None:
    case = "i2t_noimage"
    ids, labels = golden.input(case, "input_ids"), golden.input(case, "labels")
    nothing = torch.zeros(0, 3, model.config.image_size, model.config.image_size)
    mask = golden.input(case, "attention_mask")
    output = model.understanding(UnderstandingBatch(nothing, ids, mask, labels, no_text(len(ids)), [], [], [], []))
    golden.check(case, "loss", output.loss_sum / output.loss_count)
