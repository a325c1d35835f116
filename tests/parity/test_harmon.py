"""Every case of a Harmon golden, replayed with the recorded random draws."""

import itertools
import math

import numpy as np
import pytest
import torch
from golden import DECODED_IMAGE, SAMPLING_CHAIN, SINGLE_PASS, Golden
from PIL import Image
from torch import Tensor

from infotok_lit.data.sample import GenerationSample, UnderstandingSample
from infotok_lit.models.harmon.autoencoder import from_tokens, to_tokens
from infotok_lit.models.harmon.config import (
    AutoencoderConfig,
    DrawingConfig,
    HarmonConfig,
    LanguageModelConfig,
    MARConfig,
)
from infotok_lit.models.harmon.diffusion import make_schedule
from infotok_lit.models.harmon.draws import TrainingDraws
from infotok_lit.models.harmon.keys import HARMON_KEYS, kl16_keys
from infotok_lit.models.harmon.mar import places_where
from infotok_lit.models.harmon.model import Harmon
from infotok_lit.models.harmon.processor import PADDING_GREY, HarmonProcessor
from infotok_lit.models.pixels import crop_to_square, pad_to_square, to_pixels
from infotok_lit.models.unified import GenerationBatch, PairedText, UnderstandingBatch


class ByteTokenizer:
    """The stand-in tokenizer of the goldens: one id per UTF-8 byte, and the three chat markers."""

    markers = {"<|im_start|>": 256, "<|im_end|>": 257, "<|endoftext|>": 258}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        for marker, number in self.markers.items():
            if marker in text:
                before, after = text.split(marker, 1)
                return self.encode(before) + [number] + self.encode(after)
        return list(text.encode())

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(number for number in token_ids if number < 256).decode()


def config_of(golden: Golden) -> HarmonConfig:
    given = golden.info["config"]
    vae, mar, llm = given["vae"], given["mar"], given["llm"]
    side = mar["img_size"] // mar["vae_stride"] // mar["patch_size"]
    return HarmonConfig(
        autoencoder=AutoencoderConfig(
            latent_channels=vae["embed_dim"],
            base_width=vae["ch"],
            width_multipliers=tuple(vae["ch_mult"]),
            blocks_per_level=vae["num_res_blocks"],
            num_groups=vae["num_groups"],
            attention_resolution=vae["attn_resolutions"][0],
        ),
        mar=MARConfig(
            encoder_width=mar["encoder_embed_dim"],
            encoder_depth=mar["encoder_depth"],
            encoder_heads=mar["encoder_num_heads"],
            decoder_width=mar["decoder_embed_dim"],
            decoder_depth=mar["decoder_depth"],
            decoder_heads=mar["decoder_num_heads"],
            diffusion_depth=mar["diffloss_d"],
            diffusion_width=mar["diffloss_w"],
            default_grid=(side, side),
            patch_size=mar["patch_size"],
            mlp_ratio=mar["mlp_ratio"],
            num_buffers=mar["buffer_size"],
            dropout=mar["attn_dropout"],
            mask_ratio_min=mar["mask_ratio_min"],
            noise_draws=mar["diffusion_batch_mul"],
            sampling_steps=mar["num_sampling_steps"],
            num_classes=mar["class_num"],
        ),
        llm=LanguageModelConfig(
            hidden_size=llm["hidden_size"],
            intermediate_size=llm["intermediate_size"],
            num_hidden_layers=llm["num_hidden_layers"],
            num_attention_heads=llm["num_attention_heads"],
            num_key_value_heads=llm["num_key_value_heads"],
            vocab_size=llm["vocab_size"],
            max_position_embeddings=llm["max_position_embeddings"],
            rope_theta=llm["rope_theta"],
            rms_norm_eps=llm["rms_norm_eps"],
            tie_word_embeddings=llm["tie_word_embeddings"],
        ),
        latent_scale=given["vae_scale"],
        grad_scale=given["grad_scale"],
        image_size=mar["img_size"],
    )


@pytest.fixture(scope="module")
def golden(harmon_golden: Golden) -> Golden:
    return harmon_golden


@pytest.fixture(scope="module")
def model(golden: Golden) -> Harmon:
    config = config_of(golden)
    model = Harmon(config, HarmonProcessor(ByteTokenizer(), config.image_size, num_image_tokens=1)).eval()
    official = golden.state
    vae = {key.removeprefix("vae."): value for key, value in official.items() if key.startswith("vae.")}
    rest = {key: value for key, value in official.items() if not key.startswith("vae.")}
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("autoencoder.")}
    model.load_state_dict(HARMON_KEYS.from_official(rest, own, "golden"), strict=False)
    network = model.autoencoder.network
    levels = len(config.autoencoder.width_multipliers)
    network.load_state_dict(kl16_keys(levels).from_official(vae, network.state_dict(), "golden"))
    return model


def grid_of(golden: Golden, case: str, model: Harmon) -> tuple[int, int]:
    shape = golden.argument(case, "image_shape")
    return model.config.mar.default_grid if shape is None else tuple(shape)


def no_text(batch: int) -> PairedText:
    empty = torch.zeros(batch, 1, dtype=torch.int64)
    return PairedText(empty, empty.bool(), empty.bool(), torch.arange(batch))


def check_gradients(golden: Golden, case: str, model: Harmon, norms: str) -> None:
    """Compare the recorded gradients and gradient norms with those of the last backward pass."""
    named = {HARMON_KEYS.official_name(name): parameter for name, parameter in model.named_parameters()}
    keys = golden.argument(case, "gradnorm_keys")
    golden.check(case, norms, torch.stack([named[key].grad.norm() for key in keys]))
    untouched = [name for name, parameter in named.items() if name not in keys and parameter.grad is not None]
    assert not [name for name in untouched if named[name].grad.any()]


def check_recorded_gradients(golden: Golden, case: str, model: Harmon) -> None:
    named = {HARMON_KEYS.official_name(name): parameter for name, parameter in model.named_parameters()}
    recorded = [name for name in golden.outputs(case) if name.startswith("grad/")]
    assert recorded
    for name in recorded:
        golden.check(case, name, named[name.removeprefix("grad/")].grad)


def joint_norm(model: Harmon, *prefixes: str) -> Tensor:
    gradients = [
        parameter.grad.norm()
        for name, parameter in model.named_parameters()
        if name.startswith(prefixes) and parameter.grad is not None
    ]
    return torch.stack(gradients).norm()


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
    visible = places_where(golden.input(case, "mask") == 0) if case == "visual_masked" else None
    tokens = model.encoder(latents, grid_of(golden, case, model), visible)
    golden.check(case, "x_enc", tokens)
    golden.check(case, "z_enc", model.project_for_reading(tokens))


@torch.no_grad()
@pytest.mark.parametrize("case", ["mae", "mae_grid", "mae_allmasked"])
@pytest.mark.parametrize("cached", [False, True])
def test_text_conditioned_passes(golden: Golden, model: Harmon, case: str, cached: bool) -> None:
    grid = grid_of(golden, case, model)
    visible = places_where(golden.input(case, "mask") == 0)
    tokens = model.encoder(golden.input(case, "latents").flatten(1, 2), grid, visible)
    golden.check(case, "x_enc_pre", tokens)
    golden.check(case, "z_enc", model.project_for_reading(tokens))
    ids, mask = golden.input(case, "input_ids"), golden.input(case, "attention_mask")
    if cached:
        conditioned = model.condition_on_cache(tokens, model.text_cache(ids, mask), mask)
    else:
        conditioned = model.condition_on_text(tokens, ids, mask)
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
    draws = TrainingDraws(hidden, golden.input(case, "t")[counted], golden.input(case, "noise")[counted])
    batch = GenerationBatch(
        golden.input(case, "pixel_values"), ids, golden.input(case, "attention_mask"), no_text(len(ids)), [], [], []
    )
    model.zero_grad(set_to_none=True)
    output = model.generation(batch, draws=draws)
    golden.check(case, "latents", output.latents)
    golden.check(case, "loss", output.loss_sum / output.loss_count)
    visible = places_where(~hidden)
    conditioned = model.condition_on_text(output.tokens, ids, batch.attention_mask)
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


@pytest.mark.parametrize("name", ["cfg1", "cfg3", "std5_cfg1", "std5_cfg3"])
def test_token_sampling(golden: Golden, model: Harmon, name: str) -> None:
    case = f"token_sample_{name}"
    guidance = golden.argument(case, "cfg")
    initial, noise = golden.input(case, "noise_init"), golden.input(case, "noise")
    visited: list[Tensor] = []
    sampled = model.token_diffusion.sample(
        golden.input(case, "z"),
        initial if guidance == 1 else torch.cat([initial, initial]),
        lambda step: noise[step],
        golden.argument(case, "timestep_respacing"),
        golden.argument(case, "temperature"),
        guidance,
        visited.append,
    )
    golden.check(case, "x_steps", torch.stack(visited), SAMPLING_CHAIN)
    golden.check(case, "sample", sampled, SAMPLING_CHAIN)


class RecordedNoise:
    """Replays the draws of a recorded `sample*` case; the sampler asks for one guidance half at a time."""

    def __init__(self, golden: Golden, case: str, guided: bool) -> None:
        self.stored = golden.input(case, "orders")
        self.halves = 2 if guided else 1
        self.queue: list[Tensor] = []
        for iteration in itertools.count():
            if f"in/{case}/step{iteration}_noise" not in golden.tensors:
                break
            self.queue.append(golden.input(case, f"step{iteration}_noise_init"))
            # Only the conditional half of the step noise reaches the picture.
            noise = golden.input(case, f"step{iteration}_noise")
            self.queue.extend(step[: len(step) // self.halves] for step in noise)

    def orders(self, places: int) -> Tensor:
        return self.stored[: len(self.stored) // self.halves]

    def token_normal(self, per_image: int, channels: int) -> Tensor:
        return self.queue.pop(0)


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
    drawing = DrawingConfig(
        iterations=golden.argument(case, "num_iter"),
        guidance=guidance,
        guidance_schedule=golden.argument(case, "cfg_schedule"),
        temperature=golden.argument(case, "temperature"),
    )
    tokens = model.draw_latents(
        golden.input(case, "input_ids"),
        golden.input(case, "attention_mask"),
        grid,
        noise,
        drawing,
        golden.argument(case, "timestep_respacing"),
    )
    assert not noise.queue
    for iteration in range(drawing.iterations):
        golden.check(case, f"step{iteration}_tokens", seen["tokens"][iteration].unflatten(1, grid), SAMPLING_CHAIN)
        golden.check(case, f"step{iteration}_x_enc", seen["x_enc"][iteration], SAMPLING_CHAIN)
        golden.check(case, f"step{iteration}_z", seen["z"][iteration], SAMPLING_CHAIN)
        golden.check(case, f"step{iteration}_cfg", seen["scale"][iteration], SAMPLING_CHAIN)
        # The unconditional half ends with other step noise, and nothing reads it.
        half = len(seen["sampled"][iteration]) // noise.halves
        expected = golden.output(case, f"step{iteration}_sampled")[:half]
        error = (seen["sampled"][iteration][:half] - expected).abs().max()
        assert error <= SAMPLING_CHAIN * max(1, float(expected.abs().max()))
    latents = torch.cat([tokens] * noise.halves).unflatten(1, grid)
    golden.check(case, "latents", latents, SAMPLING_CHAIN)
    if "image" in golden.outputs(case):
        image = model.decode_images(tokens, grid)
        golden.check(case, "image", image, DECODED_IMAGE)
        levels = (127.5 * image + 128).clamp(0, 255).to(torch.uint8).int()
        assert (levels - golden.output(case, "image_uint8").int()).abs().max() <= 1


def watch_sampling(model: Harmon, seen: dict[str, list[Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Record what passes between the parts while an image is drawn."""
    encode, decode, sample = model.encoder.forward, model.decoder.forward, model.token_diffusion.sample

    def watched_encoder(latents, grid, visible=None):
        seen["tokens"].append(latents.clone())
        return encode(latents, grid, visible)

    def watched_decoder(tokens, grid, visible):
        seen["x_enc"].append(tokens)
        return decode(tokens, grid, visible)

    def watched_sample(z, initial, step_noise, respacing, temperature, guidance):
        seen["z"].append(z)
        seen["scale"].append(torch.tensor(float(guidance)))
        seen["sampled"].append(sample(z, initial, step_noise, respacing, temperature, guidance))
        return seen["sampled"][-1]

    monkeypatch.setattr(model.encoder, "forward", watched_encoder)
    monkeypatch.setattr(model.decoder, "forward", watched_decoder)
    monkeypatch.setattr(model.token_diffusion, "sample", watched_sample)


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
    latents, grid = model.encode_images(golden.input(case, "pixel_values"))
    embeds = model.embed_with_images(ids, model.project_for_reading(model.encoder(latents, grid)))
    answer = model.answer(embeds, torch.ones_like(ids), golden.argument(case, "max_new_tokens"))
    golden.check(case, name, answer)


@pytest.mark.parametrize(("name", "respacing"), [("train", None), ("gen100", "100"), ("gen5", "5"), ("ddim5", "ddim5")])
def test_schedule(golden: Golden, name: str, respacing: str | None) -> None:
    schedule = make_schedule(respacing)
    assert torch.equal(schedule.timesteps, golden.output("schedule", f"{name}_timestep_map"))
    for table, ours in {
        "betas": schedule.betas,
        "alphas_cumprod": schedule.alphas_cumprod,
        "posterior_log_variance_clipped": schedule.posterior_log_variance,
    }.items():
        torch.testing.assert_close(ours, golden.output("schedule", f"{name}_{table}"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_image_geometry(golden: Golden, shape: str) -> None:
    size = golden.argument("data_image", "image_size")
    image = Image.fromarray(golden.input("data_image", f"{shape}_uint8").numpy().astype(np.uint8))
    golden.check("data_image", f"{shape}_und", to_pixels(pad_to_square(image, PADDING_GREY), size))
    free = abs(image.size[0] - image.size[1])
    offset = (int(golden.input("data_image", f"{shape}_crop_offset")) + 0.5) / (free + 1)
    golden.check("data_image", f"{shape}_gen", to_pixels(crop_to_square(image, offset), size), SINGLE_PASS)


def test_text_to_image_prompts(golden: Golden) -> None:
    case = "data_text"
    image = Image.new("RGB", (16, 16))
    caption = golden.argument(case, "t2i_caption")
    processor = HarmonProcessor(ByteTokenizer(), 16, num_image_tokens=1)
    samples = [GenerationSample(image, caption, "a"), GenerationSample(image, caption, "b", drop_prompt=True)]
    batch = processor.generation(samples)
    golden.check(case, "t2i_collated_input_ids", batch.input_ids)
    golden.check(case, "t2i_collated_attention_mask", batch.attention_mask)
    golden.check(case, "t2i_input_ids", batch.input_ids[0, : int(batch.attention_mask[0].sum())])
    golden.check(case, "t2i_uncond_input_ids", batch.input_ids[1, : int(batch.attention_mask[1].sum())])
    processor.max_length = golden.argument(case, "t2i_max_length")
    golden.check(case, "t2i_trunc_input_ids", processor.generation(samples[:1]).input_ids[0])


def test_image_to_text_prompts(golden: Golden) -> None:
    case = "data_text"
    sample = UnderstandingSample(
        Image.new("RGB", (16, 16)), golden.argument(case, "question"), golden.argument(case, "caption"), "a"
    )
    processor = HarmonProcessor(ByteTokenizer(), 16, num_image_tokens=golden.argument(case, "image_length"))
    batch = processor.understanding([sample])
    golden.check(case, "i2t_input_ids", batch.input_ids[0])
    golden.check(case, "i2t_labels", batch.labels[0])
    golden.check(case, "i2t_collated_input_ids", torch.stack([batch.input_ids[0], cut_row(golden)]))
    processor.max_length = len(golden.output(case, "i2t_trunc_input_ids"))
    cut = processor.understanding([sample])
    golden.check(case, "i2t_trunc_input_ids", cut.input_ids[0])
    golden.check(case, "i2t_trunc_labels", cut.labels[0])


def cut_row(golden: Golden) -> Tensor:
    """The truncated row as the official collate padded it (right, with the end-of-turn id)."""
    row, length = golden.output("data_text", "i2t_trunc_input_ids"), len(golden.output("data_text", "i2t_input_ids"))
    return torch.cat([row, torch.full((length - len(row),), ByteTokenizer.markers["<|im_end|>"])])


def test_optimiser_groups(golden: Golden, model: Harmon) -> None:
    groups = {"decay": set(), "no_decay": set()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = "decay" if model.decays(name, parameter) else "no_decay"
            groups[group].add(HARMON_KEYS.official_name(name))
    unused = {"mar.class_emb.weight"}
    tied = {"llm.lm_head.weight"}
    assert groups["no_decay"] == set(golden.info["param_groups"]["no_decay"])
    assert groups["decay"] - tied == set(golden.info["param_groups"]["decay"]) - unused - tied
