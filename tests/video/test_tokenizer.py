"""The tokenizer away from the golden file: other shapes, batches, causality, and weights that do not fit."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_video import TINY, noise, tiny_tokenizer

from infotok_lit.checkpoints import CheckpointError
from infotok_lit.errors import DataError, SettingsError
from infotok_lit.video.losses import LossConfig, Schedule, Vgg16Features, reconstruction_losses
from infotok_lit.video.official import (
    WEIGHTS_FILE,
    export_tokenizer,
    load_official_file,
    load_official_state,
    load_tokenizer,
    official_state,
)
from infotok_lit.video.tokenizer import VideoTokenizer, pool_error
from infotok_lit.video.transformer import DoubleProjectionAttention, rotary_angles
from infotok_lit.video.windows import to_pixels

OTHER = replace(
    TINY,
    patch_size=4,
    temporal_compression=8,
    attention_resolutions=(128, 256),
    latent_channels=20,
    levels=(8, 6, 5, 4),
    encoder_layers=2,
)
"""8x8x8 with attention inside levels, and transformers of another width than the latent."""


def pixels(batch: int, frames: int, height: int = 16, width: int = 24) -> torch.Tensor:
    return to_pixels(torch.stack([torch.from_numpy(noise(frames, height, width, seed)) for seed in range(batch)]))


@pytest.mark.parametrize(("config", "frames"), [(TINY, 1), (TINY, 9), (OTHER, 1), (OTHER, 17)])
@torch.no_grad()
def test_clips_and_images_pass_the_whole_chain(config, frames: int) -> None:
    tokenizer, clips = tiny_tokenizer(config), pixels(2, frames)
    done = tokenizer.reconstruct(clips, lambda token_map: torch.tensor([1.0, 0.5]))
    assert done.pixels.shape == clips.shape
    assert done.mask.shape == (2, *config.token_grid(frames, 16, 24))
    encoded = tokenizer.encode(clips)
    assert torch.equal(tokenizer.codes_of(encoded.indices), encoded.codes)
    alone = tokenizer.reconstruct(clips[1:], lambda token_map: torch.tensor([0.5]))
    assert torch.equal(alone.mask, done.mask[1:])
    assert torch.allclose(alone.pixels, done.pixels[1:], atol=1e-5)


@torch.no_grad()
def test_both_networks_are_causal_in_time() -> None:
    tokenizer, clips = tiny_tokenizer(), pixels(1, 9)
    changed = clips.clone()
    changed[:, :, 5:] = 0
    before, after = tokenizer.encode(clips), tokenizer.encode(changed)
    assert torch.equal(before.compressed[:, :, :2], after.compressed[:, :, :2])
    assert not torch.equal(before.compressed[:, :, 2], after.compressed[:, :, 2])
    codes = before.codes.clone()
    codes[:, :, 2] = 0
    assert torch.equal(tokenizer.decode(codes)[:, :, :5], tokenizer.decode(before.codes)[:, :, :5])


def test_the_attention_is_dense_attention_under_its_mask() -> None:
    """An independent restatement: complex rotations, one dense mask, explicit softmax."""
    torch.manual_seed(0)
    frames, height, width, channels, heads = 3, 2, 3, 16, 2
    attention = DoubleProjectionAttention(channels, heads, rotary_base=100.0).double()
    tokens = torch.randn(2, frames * height * width, channels, dtype=torch.float64)
    weight, bias = attention.in_projection.weight, attention.in_projection.bias
    per_head = channels // heads
    turn = torch.polar(torch.ones(()), rotary_angles(height, width, per_head, 100.0, tokens.device)).to(
        torch.complex128
    )
    turn = turn.repeat(frames, 1)[:, None]
    parts = []
    for i in range(3):
        w, b = weight[i * channels : (i + 1) * channels], bias[i * channels : (i + 1) * channels]
        part = tokens @ w.T + b
        if i < 2:
            pairs = torch.view_as_complex(part.unflatten(-1, (heads, per_head // 2, 2)).contiguous())
            part = torch.view_as_real(pairs * turn).flatten(-3)
        parts.append((part @ w.T + b).unflatten(-1, (heads, per_head)))
    query, key, value = parts
    frame = torch.arange(tokens.shape[1]) // (height * width)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / per_head**0.5
    scores = scores.masked_fill(frame[None] > frame[:, None], -torch.inf)
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)
    expected = F.linear(mixed, attention.out_projection.weight, attention.out_projection.bias)
    assert torch.allclose(attention(tokens, (frames, height, width)), expected, atol=1e-6)


def test_the_map_is_the_mean_error_of_each_tokens_pixels() -> None:
    wanted, found = pixels(1, 9), pixels(2, 9)[1:]
    token_map = pool_error(wanted, found, TINY)
    error = (wanted - found).abs()[0].mean(0)
    for t, span in enumerate((slice(0, 1), slice(1, 5), slice(5, 9))):
        for row in range(2):
            for column in range(3):
                part = error[span, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                assert token_map[0, t, row, column].item() == pytest.approx(part.mean().item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 16, 16), (9, 12, 16), (9, 16, 4), (21, 16, 16), (0, 16, 16)])
def test_clips_that_do_not_divide_into_tokens_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(DataError):
        TINY.token_grid(*shape)


@pytest.mark.parametrize(
    "changed",
    [{"num_heads": 3}, {"levels": (8, 2)}, {"levels": ()}, {"patch_size": 3}, {"patch_size": 16}]
    + [{"channel_multipliers": (1, 2)}, {"temporal_compression": 16}]
    + [{"num_heads": 0}, {"channels": -4}, {"width": 16.0}, {"max_latent_frames": "x"}, {"encoder_layers": -1}]
    + [{"norm_eps": None}, {"rotary_base": 0}, {"levels": (100_000,) * 6}, {"channel_multipliers": (1, "2", 2)}],
)
def test_shapes_that_cannot_be_are_refused(changed: dict) -> None:
    with pytest.raises(SettingsError):
        replace(TINY, **changed)


# Weights


@pytest.mark.parametrize("config", [TINY, OTHER])
def test_an_exported_folder_is_the_same_tokenizer(tmp_path, config) -> None:
    tokenizer = tiny_tokenizer(config)
    tokenizer.complexity.update(torch.tensor(0.25))
    export_tokenizer(tokenizer, tmp_path / "model", {"step": 3})
    again = load_tokenizer(tmp_path / "model")
    assert again.config == config and not again.training
    own, wanted = again.state_dict(), tokenizer.state_dict()
    assert all(torch.equal(own[name], wanted[name]) for name in wanted if not name.startswith("complexity."))
    assert again.complexity.mean.item() == pytest.approx(0.25)


def test_an_export_replaces_only_an_export(tmp_path) -> None:
    tokenizer, out = tiny_tokenizer(), tmp_path / "model"
    export_tokenizer(tokenizer, out, {})
    with pytest.raises(SettingsError, match="exists"):
        export_tokenizer(tokenizer, out, {})
    export_tokenizer(tokenizer, out, {}, force=True)
    mine = tmp_path / "mine"
    mine.mkdir()
    for folder in (mine, out):
        (folder / "thesis.txt").write_text("do not delete")
        with pytest.raises(SettingsError, match="not replaced"):
            export_tokenizer(tokenizer, folder, {}, force=True)
        assert (folder / "thesis.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model"]


def test_the_released_file_with_its_prefixes_and_constants_loads(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    state = {f"network.{name}": tensor for name, tensor in official_state(tokenizer).items()}
    state["network.quantizer._levels"] = torch.tensor(TINY.levels, dtype=torch.int32)
    state["network.encoder.patcher3d.wavelets"] = torch.ones(2)
    state |= {"ema.network-temporal_embed": torch.zeros(1)}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "official.safetensors")
    again = tiny_tokenizer(seed=1)
    load_official_file(again, tmp_path / "official.safetensors")
    assert all(
        torch.equal(a, b) for a, b in zip(tokenizer.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_cosmos_weights_leave_the_transformers_as_they_are() -> None:
    source, target = tiny_tokenizer(seed=0), tiny_tokenizer(seed=1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    added = ("vit_", "post_vit_", "temporal_embed", "ema_loss", "save_loss")
    load_official_state(target, {k: v for k, v in official_state(source).items() if not k.startswith(added)}, "cosmos")
    after = target.state_dict()
    assert torch.equal(after["encoder.conv_in.conv_s.weight"], source.state_dict()["encoder.conv_in.conv_s.weight"])
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert changed <= {"encoder", "decoder", "quant_conv", "post_quant_conv"}


def test_weights_that_do_not_fit_are_named(tmp_path) -> None:
    state = official_state(tiny_tokenizer())
    state["quantizer._levels"] = torch.tensor([4, 4, 4])
    with pytest.raises(CheckpointError, match=r"\[4, 4, 4\]"):
        load_official_state(tiny_tokenizer(), state, "x.pth")
    del state["quantizer._levels"], state["temporal_embed"]
    with pytest.raises(CheckpointError, match="missing: temporal_embed"):
        load_official_state(tiny_tokenizer(), state, "x.pth")
    out = tmp_path / "model"
    export_tokenizer(tiny_tokenizer(), out, {})
    content = json.loads((out / "config.json").read_text())
    content["config"]["colour"] = 1
    (out / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="colour"):
        load_tokenizer(out)
    del content["config"]["colour"]
    content["config"]["levels"] = "many"
    (out / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError):
        load_tokenizer(out)
    (out / WEIGHTS_FILE).write_bytes(b"cut off")
    with pytest.raises(CheckpointError):
        load_official_file(tiny_tokenizer(), out / WEIGHTS_FILE)


# Losses


def vgg_state() -> dict[str, torch.Tensor]:
    """torchvision's names for the convolutions of VGG-16, with small random weights."""
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    convolutions = [convolution for group in Vgg16Features().groups for convolution in group]
    parts = zip(places, convolutions, strict=True)
    state = {f"features.{i}.{kind}": getattr(c, kind).detach() for i, c in parts for kind in ("weight", "bias")}
    return state | {"classifier.0.weight": torch.zeros(1)}


def test_vgg_weights_come_from_the_users_file(tmp_path) -> None:
    state, path = vgg_state(), tmp_path / "vgg16.pth"
    torch.save(state, path)
    network = Vgg16Features.from_file(path)
    frames = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        first = F.relu(F.conv2d(frames, state["features.0.weight"], state["features.0.bias"], padding=1))
        first = F.relu(F.conv2d(first, state["features.2.weight"], state["features.2.bias"], padding=1))
    found = network(frames)
    assert torch.allclose(found[0], first, atol=1e-6)
    assert [feature.shape[-1] for feature in found] == [32, 16, 8, 4, 2]
    assert not any(parameter.requires_grad for parameter in network.parameters())
    del state["features.28.weight"], state["features.28.bias"]
    for other in (state, {"features.conv0.weight": torch.zeros(64, 3, 7, 7)}):  # one too few, and DenseNet's
        torch.save(other, path)
        with pytest.raises(CheckpointError, match="VGG-16"):
            Vgg16Features.from_file(path)


def test_losses_that_are_off_cost_nothing() -> None:
    a, b = pixels(1, 9), pixels(2, 9)[1:]
    losses = reconstruction_losses(a, b, 0, LossConfig(colour=2.0))
    assert list(losses) == ["colour"]
    assert losses["colour"].item() == pytest.approx(2 * (a - b).abs().mean().item())
    with pytest.raises(SettingsError, match="vgg_weights"):
        LossConfig(perceptual=Schedule((0.1,)))
    with pytest.raises(SettingsError, match="boundaries"):
        Schedule((0.1, 0.2), ())


def test_the_released_size_is_what_no_settings_give() -> None:
    with torch.device("meta"):
        default = VideoTokenizer(replace(TINY, levels=(8, 8, 8, 5, 5, 5)))
    assert default.config.num_codes == 64_000
    assert all(parameter.is_meta for parameter in default.parameters())
