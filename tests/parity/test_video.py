"""Replays the golden file of the official video tokenizer: its networks, router, masks, losses and windows.

The configuration is read from the golden file, so that another one can be replayed with `--golden PATH`.
"""

import json
import re

import pytest
import torch
from golden import FIXTURES, Golden
from torch import Tensor

from infotok_lit.budgets import FLEX_BASES, block_rates, budget_rate, keep_first
from infotok_lit.video.codec import CodecConfig, decode_window, encode_window, keep_by_score, window_rates
from infotok_lit.video.losses import LossConfig, Schedule, Vgg16Features, reconstruction_losses
from infotok_lit.video.official import CONSTANTS, key_map, load_official_state, official_state
from infotok_lit.video.rates import RateConfig
from infotok_lit.video.tokenizer import VideoTokenizer, VideoTokenizerConfig, keep_clipwide
from infotok_lit.video.windows import FrameCutter, Padding, blend, in_windows

NETWORK = 1e-4
ALL_BASES = (*FLEX_BASES, 0.125)


def golden_config(golden: Golden) -> VideoTokenizerConfig:
    """Our configuration for the official one in a golden file."""
    official = golden.info["config"]
    stacks = official["vit_config"]
    return VideoTokenizerConfig(
        channels=official["channels"],
        channel_multipliers=official["channels_mult"],
        residual_blocks=official["num_res_blocks"],
        patch_size=official["patch_size"],
        temporal_compression=official["temporal_compression"],
        spatial_compression=official["spatial_compression"],
        attention_resolutions=official["attn_resolutions"],
        resolution=official["resolution"],
        latent_channels=official["z_channels"],
        levels=official["levels"],
        width=stacks["hidden_size"],
        mlp_width=stacks["intermediate_size"],
        num_heads=stacks["num_attention_heads"],
        encoder_layers=stacks["num_encoder_layers"],
        decoder_layers=stacks["num_decoder_layers"],
        rotary_base=stacks["theta"],
        norm_eps=stacks["rms_norm_eps"],
        max_latent_frames=stacks["max_num_video_frames"],
        init_std=stacks["initializer_range"],
    )


@pytest.fixture(scope="module")
def golden(videotok_golden: Golden) -> Golden:
    return videotok_golden


@pytest.fixture(scope="module")
def tokenizer(golden: Golden) -> VideoTokenizer:
    model = VideoTokenizer(golden_config(golden))
    load_official_state(model, golden.state, "the golden file")
    return model


def check(golden: Golden, case: str, **found: Tensor) -> None:
    for name, tensor in found.items():
        golden.check(case, name, tensor, NETWORK)


def features_of(golden: Golden, case: str) -> Vgg16Features:
    """The small stand-in for VGG-16 whose weights are in the golden file."""
    prefix = f"in/{case}/featnet.c."
    weights = {name.removeprefix(prefix): value for name, value in golden.tensors.items() if name.startswith(prefix)}
    count = len(weights) // 2
    network = Vgg16Features([[weights[f"{i}.bias"].numel()] for i in range(count)])
    network.load_state_dict(
        {f"groups.{i}.0.{kind}": weights[f"{i}.{kind}"] for i in range(count) for kind in ("weight", "bias")}
    )
    return network


@torch.no_grad()
def test_encoding_and_its_stages(golden: Golden, tokenizer: VideoTokenizer) -> None:
    pixels = golden.input("encode", "x")
    encoded = tokenizer.encode(pixels)
    check(
        golden,
        "encode",
        patches=tokenizer.encoder.patch_embed(pixels),
        latent=encoded.latent,
        compressed=encoded.compressed,
        pre_quant=encoded.before_quantising,
        codes=encoded.codes,
        indices=encoded.indices,
    )
    unpatched = tokenizer.decoder.unpatch_embed(tokenizer.encoder.patch_embed(pixels))
    assert torch.allclose(unpatched, pixels, atol=1e-6)


def test_quantiser_with_its_gradient_and_inverse(golden: Golden, tokenizer: VideoTokenizer) -> None:
    values = golden.input("fsq", "z").requires_grad_()
    codes, indices = tokenizer.quantiser(values)
    (codes * golden.input("fsq", "weight")).sum().backward()
    check(golden, "fsq", codes=codes, indices=indices, grad_z=values.grad)
    check(golden, "fsq", codes_from_idx=tokenizer.codes_of(golden.input("fsq", "idx")))
    every = torch.arange(tokenizer.config.num_codes).view(1, -1, 1, 1)
    codebook = tokenizer.codes_of(every)[0, :, :, 0, 0].T
    assert torch.equal(codebook, golden.state["quantizer.implicit_codebook"].float())
    zero = int(golden.output("fsq", "zero_code_index"))
    assert not codebook[zero].any()


@torch.no_grad()
def test_transformer_block_and_its_parts(golden: Golden, tokenizer: VideoTokenizer) -> None:
    tokens, grid = golden.input("block", "h"), tuple(golden.input("block", "thw").tolist())
    block = tokenizer.compressor[0]
    check(
        golden,
        "block",
        attn=block.attention(block.attention_norm(tokens), grid),
        mlp=block.mlp(block.mlp_norm(tokens)),
        block=block(tokens, grid),
    )


def test_a_token_sees_its_own_and_earlier_frames(golden: Golden, tokenizer: VideoTokenizer) -> None:
    tokens = golden.input("block", "h")[:1].requires_grad_()
    attended = tokenizer.compressor[0].attention(tokens, tuple(golden.input("block", "thw").tolist()))
    hidden = golden.output("block", "mask")
    for query in range(attended.shape[1]):
        (gradient,) = torch.autograd.grad(attended[0, query].sum(), tokens, retain_graph=True)
        assert torch.equal(gradient[0].abs().amax(-1) == 0, hidden[query])


@torch.no_grad()
def test_stacks_and_decoder(golden: Golden, tokenizer: VideoTokenizer) -> None:
    check(golden, "compress", z=tokenizer.compress(golden.input("compress", "z")))
    check(golden, "decompress", z=tokenizer.decompress(golden.input("decompress", "z")))
    check(golden, "decode", x=tokenizer.decoder(golden.input("decode", "z")))


@torch.no_grad()
def test_router(golden: Golden, tokenizer: VideoTokenizer) -> None:
    pixels = golden.input("elbo", "x")
    codes = tokenizer.encode(pixels).codes
    token_map = tokenizer.token_map(pixels, codes)
    check(
        golden,
        "elbo",
        recon_full=tokenizer.decode(codes),
        token_map=token_map,
        block=token_map.mean((2, 3)),
        video=token_map.mean((1, 2, 3)),
    )


def test_block_rates(golden: Golden) -> None:
    scores = golden.input("rates", "chunk_loss")
    for base in golden.input("rates", "base"):
        check(golden, "rates", **{f"elbo_blocks_{base.item()}": block_rates(scores, base[None])})


def test_masks(golden: Golden) -> None:
    scores, codes = golden.input("mask", "chunk_loss"), golden.input("mask", "codes")
    for rate in golden.input("mask", "rates"):
        mask, name = keep_clipwide(scores, rate[None]), f"mse_{rate.item()}"
        check(golden, "mask", **{name: mask, name.replace("mse_", "mse_codes_"): codes * mask[:, None]})
        check(golden, "mask", **{name.replace("mse_", "mse_kept_"): mask.sum()[None]})
    tokens = codes.flatten(3).shape[-1]
    in_order = keep_first(golden.input("mask", "block_rates"), tokens)
    check(golden, "mask", order=in_order[:, None], order_codes=codes * in_order.unflatten(-1, codes.shape[3:])[:, None])
    for name, expected in golden.outputs("mask").items():
        if name.startswith("order_seq_"):
            rate = torch.tensor([[float(name.removeprefix("order_seq_"))]])
            check(golden, "mask", **{name: keep_first(rate, expected.shape[-1])[:, None]})


@torch.no_grad()
def test_reconstruction_from_a_part_of_the_tokens(golden: Golden, tokenizer: VideoTokenizer) -> None:
    pixels = golden.input("recon", "x")
    codes = tokenizer.encode(pixels).codes
    check(golden, "recon", codes=codes)
    mean, rates = golden.input("recon", "elbo_mean"), golden.input("recon", "rates")
    error = tokenizer.token_map(pixels, codes).flatten(1).mean(-1)
    chosen = {str(rate.item()): rate[None] for rate in rates}
    chosen["global_elbo"] = budget_rate(error, mean, rates[0])
    chosen["global_elbo_bin"] = budget_rate(error, mean, rates[0], steps=4)
    for name, rate in chosen.items():
        done = tokenizer.reconstruct(pixels, lambda token_map, rate=rate: rate)
        masked = codes * done.mask[:, None]
        found = {"ratio": rate[:, None], "mask": done.mask, "kept": done.mask.sum()[None], "recon": done.pixels}
        found |= {"masked_codes": masked, "decompressed": tokenizer.decompress(tokenizer.post_quant_conv(masked))}
        expected = golden.outputs("recon")
        check(
            golden, "recon", **{f"{key}_{name}": value for key, value in found.items() if f"{key}_{name}" in expected}
        )
        check(golden, "recon", token_map=done.token_map)


@torch.no_grad()
def test_evaluation_at_numbered_rates(golden: Golden, tokenizer: VideoTokenizer) -> None:
    pixels = golden.input("eval_forward", "x")
    codes = tokenizer.encode(pixels).codes
    token_map = tokenizer.token_map(pixels, codes)
    rule = RateConfig("elbo")
    for i in golden.input("eval_forward", "n_tries").tolist():
        base = torch.tensor([ALL_BASES[i]])
        mask = keep_clipwide(token_map, rule.at_base(token_map, base, tokenizer.complexity))
        found = {f"ratios_{i}": block_rates(token_map, base), f"masked_codes_{i}": codes * mask[:, None]}
        check(golden, "eval_forward", **found)


def test_training_step_of_the_released_configuration(golden: Golden, tokenizer: VideoTokenizer) -> None:
    pixels = golden.input("train_elbo", "x")
    base = torch.tensor(FLEX_BASES)[golden.input("train_elbo", "draw_randint")]
    rule = RateConfig("elbo")
    done = tokenizer.reconstruct(pixels, lambda token_map: rule.at_base(token_map, base, tokenizer.complexity))
    config = LossConfig(perceptual=Schedule((0.1,)), vgg_weights="given")
    losses = reconstruction_losses(pixels, done.pixels, 0, config, features_of(golden, "train_elbo"))
    total = torch.stack(list(losses.values())).sum()
    parameters = dict(tokenizer.named_parameters())
    gradients = torch.autograd.grad(total, list(parameters.values()))
    official = key_map(tokenizer.config).to_official(dict(zip(parameters, gradients, strict=True)))
    check(golden, "train_elbo", recon=done.pixels, ratios=block_rates(done.token_map, base), total=total)
    check(golden, "train_elbo", loss_color=losses["colour"], loss_lpips=losses["perceptual"])
    check(golden, "train_elbo", masked_codes=tokenizer.encode(pixels).codes * done.mask[:, None])
    check(golden, "train_elbo", grad_norm_all=torch.nn.utils.get_total_norm(gradients))
    for name in golden.outputs("train_elbo"):
        if name.startswith("grad/"):
            check(golden, "train_elbo", **{name: official[name.removeprefix("grad/")]})


def test_losses_change_on_schedule(golden: Golden) -> None:
    config = LossConfig(
        perceptual=Schedule((0.1, 0.073), (500_000,)), gram=Schedule((0.0, 0.062), (500_000,)), vgg_weights="given"
    )
    for step in golden.input("losses", "iterations").tolist():
        reconstructed = golden.input("losses", "recon").requires_grad_()
        network = features_of(golden, "losses")
        losses = reconstruction_losses(golden.input("losses", "input"), reconstructed, step, config, network)
        total = torch.stack(list(losses.values())).sum()
        (gradient,) = torch.autograd.grad(total, reconstructed)
        found = {"color": losses["colour"], "lpips": losses["perceptual"], "total": total, "grad_recon": gradient}
        found |= {"gram": losses["gram"]} if "gram" in losses else {}
        assert (f"gram_{step}" in golden.outputs("losses")) == ("gram" in losses)
        check(golden, "losses", **{f"{name}_{step}": value for name, value in found.items()})


@pytest.mark.parametrize("start", ["zero", "warm"])
def test_running_mean_of_errors(golden: Golden, start: str) -> None:
    rule = RateConfig("elboema", bases=ALL_BASES, mean_factor=0.95, bias_correction=False)
    mean = rule.running_mean()
    if start == "warm":
        mean.value.copy_(golden.input("train_elboema", "ema_start"))
    maps = golden.input("train_elboema", "chunk_loss")
    means, rates, masks = [], [], []
    for token_map, draw in zip(maps, golden.input("train_elboema", "draw_randint"), strict=True):
        mean.update(token_map.mean())
        means.append(mean.mean)
        rates.append(rule.at_base(token_map, torch.tensor([ALL_BASES[draw]]), mean))
        masks.append(keep_clipwide(token_map, rates[-1]))
    found = {"ema": torch.stack(means), "ratios": torch.stack(rates)[:, None], "mask": torch.stack(masks)}
    check(golden, "train_elboema", **{f"{name}_{start}": value for name, value in found.items()})
    history = golden.output("train_elboema", "save_loss")
    assert torch.allclose(mean.history[: len(history)], history, rtol=NETWORK)


@pytest.mark.parametrize("rule", ["elbo", "global_elbo"])
@pytest.mark.parametrize("overlapping", [True, False])
def test_videos_in_windows(golden: Golden, tokenizer: VideoTokenizer, rule: str, overlapping: bool) -> None:
    videos, prefix = golden.input("window", "video"), "ov" if overlapping else "noov"
    overlap = int(golden.input("window", "overlap")) if overlapping else 0
    size, rate = int(golden.input("window", "temporal_window")), float(golden.input("window", "avg_rate"))
    cutter = FrameCutter(*videos.shape[2:4], tile=max(videos.shape[2:4]))
    windows = [
        [(encode_window(tokenizer, clip, cutter), len(clip)) for clip in in_windows(video.numpy(), size, overlap)]
        for video in videos
    ]
    errors = torch.stack([window.token_map.mean() for video in windows for window, _ in video])
    check(golden, "window", **{f"elbos_{prefix}": errors, f"elbo_mean_{prefix}": errors.mean()})
    config = CodecConfig(rate=rate, rule="global" if rule == "global_elbo" else "window", window=size, overlap=overlap)
    rates = window_rates(errors, config, tokenizer).view(len(videos), -1)
    for number, video in enumerate(windows):
        if f"{prefix}_{rule}_video{number}" not in golden.outputs("window"):
            continue
        decoded = [
            decode_window(tokenizer, window.indices, keep_by_score(window.token_map, at), length, cutter)
            for (window, length), at in zip(video, rates[number], strict=True)
        ]
        frames = decoded[0]
        for later in decoded[1:]:
            kept, shared = frames[: len(frames) - overlap], frames[len(frames) - overlap :]
            frames = torch.cat((kept, blend(shared, later[:overlap]), later[overlap:]))
        expected = golden.output("window", f"{prefix}_{rule}_video{number}")[0]
        assert frames.shape == expected.shape
        assert (frames.int() - expected.int()).abs().max() <= 1
        # Without overlap, the official function returns only the last window's rate.
        returned = rates[number] if overlapping else rates[number, -1:]
        check(golden, "window", **{f"{prefix}_{rule}_rates{number}": returned[None]})


def test_padding_of_a_window(golden: Golden) -> None:
    videos = golden.input("window", "video")
    top, bottom = golden.output("window", "crop")[:3], golden.output("window", "crop")[3:]
    expected = golden.output("window", "padded_first")
    short = videos[:, : int(bottom[0] - top[0])]
    padding = Padding.of(*short.shape[1:4])
    padded = padding.pad(short)
    assert torch.equal(padded, expected)
    assert torch.equal(padding.crop(padded), short)
    assert [padding.time[0], padding.rows[0], padding.columns[0]] == top.tolist()


def test_weights_go_out_as_they_came(golden: Golden, tokenizer: VideoTokenizer) -> None:
    written = official_state(tokenizer)
    assert all(torch.equal(golden.state[name], tensor) for name, tensor in written.items())
    assert all(re.fullmatch(CONSTANTS, name) for name in golden.state.keys() - written.keys())


def test_manifest_of_the_released_tokenizer() -> None:
    manifest = json.loads((FIXTURES / "manifest_videotok.json").read_text())
    with torch.device("meta"):
        full = VideoTokenizer(VideoTokenizerConfig())
    written = {name: list(tensor.shape) for name, tensor in official_state(full).items()}
    expected = {
        name: entry["shape"] for name, entry in manifest["tensors"].items() if not re.fullmatch(CONSTANTS, name)
    }
    assert written == expected
    assert sum(parameter.numel() for parameter in full.parameters()) == manifest["counts"]["total_parameters"]
