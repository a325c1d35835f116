"""Latents from the cache are those of the encoder: for each family's own autoencoder, in whole runs and at the door."""

import json
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from stand_ins import Numbers
from tiny import TINY_CONFIGS, TinyModule
from torch.utils.data import DataLoader

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.batch import BRANCHES, Encoding
from infotok_lit.commands.cache import images_to_encode
from infotok_lit.data.datamodule import UnifiedDataModule
from infotok_lit.data.latents import ImagesToEncode, Latents, LatentWriter, pixel_key
from infotok_lit.errors import DataError, SettingsError
from infotok_lit.models.common.autoencoders import encode
from infotok_lit.models.common.model_config import DCAEConfig, KL16Config, WanConfig
from infotok_lit.models.family import family as family_called
from infotok_lit.models.unified import UnifiedModel
from infotok_lit.modules.base_model import encoding_of
from infotok_lit.modules.losses import TaskWeights
from infotok_lit.scenes import Scenes

AUTOENCODERS = {
    "harmon": KL16Config(
        latent_channels=4, base_width=8, width_multipliers=(1, 1, 1, 1), blocks_per_level=1, num_groups=4
    ),
    "showo2": WanConfig(
        base_width=8, width_multipliers=(1, 1, 1), blocks_per_level=1, temporal_downsample=(False, True)
    ),
    "openuni": DCAEConfig(
        latent_channels=4,
        widths=(8, 8, 16, 16),
        encoder_layers=(1, 1, 1, 1),
        decoder_layers=(1, 1, 1, 1),
        attention_stages=1,
        attention_head_dim=8,
    ),
}
"""The family's own kind of autoencoder, as narrow as it goes, at the stride of the embedded size."""


def model_with_autoencoder(family: str, seed: int = 0) -> UnifiedModel:
    torch.manual_seed(seed)
    config = replace(TINY_CONFIGS[family](0.0), autoencoder=AUTOENCODERS[family])
    return family_called(family).build(config, str(SCENES_TOKENIZER))


class Module(TinyModule):
    def build_base(self) -> UnifiedModel:
        return model_with_autoencoder(self.family).train()


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.values.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def data(latents: Any = None, samples: int = 12, **settings: Any) -> UnifiedDataModule:
    sizes = {"understanding_batch_size": 3, "generation_batch_size": 3, "val_batch_size": 2, "val_samples": 4}
    return UnifiedDataModule(
        Scenes(num_samples=samples),
        Scenes(split="val", num_samples=samples),
        latents=None if latents is None else str(latents),
        **(sizes | settings),
    )


def write(folder: Any, base: UnifiedModel, shard_size: int = 5) -> None:
    encoding = encoding_of(base)
    images = images_to_encode(data(), base.processor, encoding.branches)
    with LatentWriter(folder, encoding, shard_size) as writer:
        for batch in DataLoader(images, 4, collate_fn=list):
            new = {image.key: image.pixels for image in batch if image.key not in writer}
            if new:
                writer.add(list(new), encode(base.autoencoder, torch.stack(list(new.values()))))


def train(family: str, folder: Any, latents: Any = None) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    pl.seed_everything(0, verbose=False)
    losses = Losses()
    module = Module(family=family, task_weights=TaskWeights(reconstruction=1.0))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=3,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        logger=False,
        callbacks=[losses],
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data(latents))
    return losses.values, module.base.state_dict()


@pytest.mark.parametrize("family", AUTOENCODERS)
def test_a_run_is_the_same_with_and_without_the_cache(family, tmp_path, monkeypatch) -> None:
    write(tmp_path / "latents", model_with_autoencoder(family))
    losses, weights = train(family, tmp_path)

    calls = []
    encoder = type(model_with_autoencoder(family).autoencoder)
    method = "posterior" if family == "showo2" else "encode"
    real = getattr(encoder, method)
    monkeypatch.setattr(encoder, method, lambda self, images: calls.append(self.training) or real(self, images))
    cached_losses, cached_weights = train(family, tmp_path, tmp_path / "latents")

    assert len(losses) == len(cached_losses) == 3 and len(losses[-1]) > 20
    for plain, cached in zip(losses, cached_losses, strict=True):
        assert cached == pytest.approx(plain, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(cached_weights, weights, rtol=1e-5, atol=1e-6)
    # What is left: the answers of validation (2 batches twice), and Show-o2's smaller copies for reconstruction.
    expected = {"harmon": 4, "showo2": 4 + 3 + 4, "openuni": 0}[family]
    assert len(calls) == expected


@pytest.mark.parametrize("family", AUTOENCODERS)
def test_latents_are_float32_under_autocast(family) -> None:
    model = model_with_autoencoder(family).eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    plain = encode(model.autoencoder, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = encode(model.autoencoder, images)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, plain)


def test_showo2_samples_the_posterior_that_is_kept(tmp_path) -> None:
    """The closed form, from the moments in the file and the noise that the model is given."""
    model = model_with_autoencoder("showo2").eval()
    write(tmp_path, model)
    source = Scenes(num_samples=12)
    batch = model.processor.generation([source.sample("generation", index) for index in (3, 7)])
    kept = {}
    for shard in tmp_path.glob("*.safetensors"):
        content = load_file(shard)
        kept |= {bytes(key.tolist()): value for key, value in zip(content["key"], content["encoded"], strict=True)}
    moments = torch.stack([kept[pixel_key(image)] for image in batch.pixel_values])
    noise = torch.randn(2, 16, 8, 8)
    mean, log_variance = moments[:, :16], moments[:, 16:]
    expected = (mean + noise * (log_variance / 2).exp()) * model.config.latent_scale
    looked_up = Latents(tmp_path, encoding_of(model)).look_up(batch.pixel_values, batch.names)
    torch.testing.assert_close(model.encode_images(batch.pixel_values, looked_up, noise), expected)
    torch.testing.assert_close(model.encode_images(batch.pixel_values, noise=noise), expected)


ENCODING = Encoding("harmon", 32, "kl16", "ab" * 32, BRANCHES)


def fill(folder: Any, count: int, shard_size: int = 4) -> torch.Tensor:
    images = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    with LatentWriter(folder, ENCODING, shard_size) as writer:
        for image in images:
            if pixel_key(image) not in writer:
                writer.add([pixel_key(image)], 2 * image[None])
    return images


def test_a_folder_is_gone_on_with(tmp_path) -> None:
    first = fill(tmp_path, 7)
    before = {shard: shard.stat().st_mtime_ns for shard in tmp_path.glob("*.safetensors")}
    assert len(before) == 2, "four images, and the three of the end"
    more = fill(tmp_path, 10)
    assert {shard: shard.stat().st_mtime_ns for shard in before} == before
    latents = Latents(tmp_path, ENCODING)
    assert len(latents) == 10 and torch.equal(first, more[:7])
    order = torch.randperm(10)
    assert torch.equal(latents.look_up(more[order], ["x"] * 10), 2 * more[order])


def test_what_is_stopped_has_written_what_is_whole(tmp_path) -> None:
    images = torch.rand(6, 3, 2, 2)
    with pytest.raises(KeyboardInterrupt), LatentWriter(tmp_path, ENCODING, 4) as writer:
        for image in images[:5]:
            writer.add([pixel_key(image)], image[None])
        raise KeyboardInterrupt
    assert len(Latents(tmp_path, ENCODING)) == 5
    assert not list(tmp_path.glob(".*")), "nothing half written"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"digest": "cd" * 32}, "digest abababababab; now .* digest cdcdcdcdcdcd"),
        ({"image_size": 64}, "the images have 32 pixels a side; now the images have 64 pixels a side"),
        (
            {"family": "showo2", "autoencoder": "wan"},
            "the family is harmon; the autoencoder is kl16; now .*showo2; .*wan",
        ),
    ],
)
def test_stale_latents_are_refused(tmp_path, change, said) -> None:
    fill(tmp_path, 2)
    for use in (Latents, lambda folder, encoding: LatentWriter(folder, encoding, 4)):
        with pytest.raises(SettingsError, match=f"are stale: when they were made, .*{said}"):
            use(tmp_path, replace(ENCODING, **change))


def test_what_cannot_be_used_is_named(tmp_path) -> None:
    with pytest.raises(SettingsError, match="there are no latents in .*nowhere: make them with"):
        Latents(tmp_path / "nowhere", ENCODING)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SettingsError, match="holds something else than latents"):
        LatentWriter(tmp_path, ENCODING, 4)
    folder = tmp_path / "latents"
    images = fill(folder, 3)
    with pytest.raises(DataError, match=r"photo\.jpg: the latents in .* have none of this image.*random_crop: false"):
        Latents(folder, ENCODING).look_up(images[:1] + 1, ["photo.jpg"])
    next(folder.glob("*.safetensors")).write_bytes(b"cut off")
    with pytest.raises(DataError, match=r"latents-.*cannot be read .*delete it and run `cache` again"):
        Latents(folder, ENCODING)


def test_another_autoencoder_has_another_digest() -> None:
    one, again, other = (encoding_of(model_with_autoencoder("harmon", seed)).digest for seed in (0, 0, 1))
    assert one == again != other


class AlmostSquare(Numbers):
    """Of two crops of its images nearly all draws give the same one."""

    def sample(self, branch: Any, index: int, rng: Any) -> Any:
        image, offset = (
            Image.linear_gradient("L").rotate(90).convert("RGB").resize((33, 32)),
            0.499 + rng.random() / 2,
        )
        return replace(super().sample(branch, index, rng), image=image, crop_offset=offset)


class OneOfTwo(Numbers):
    """Gives one of two images, as a stream does whose shards are larger than was assumed."""

    def sample(self, branch: Any, index: int, rng: Any) -> Any:
        return super().sample(branch, 2 * index + int(rng.integers(2)), rng)


class Wide(Numbers):
    """Its images are cut to a square, at random."""

    def sample(self, branch: Any, index: int, rng: Any) -> Any:
        from_left_to_right = Image.linear_gradient("L").rotate(90).convert("RGB").resize((90, 40))
        return replace(super().sample(branch, index, rng), image=from_left_to_right)


def test_random_crops_are_refused_where_they_change_pixels() -> None:
    harmon, showo2 = (model_with_autoencoder(family).processor for family in ("harmon", "showo2"))
    with pytest.raises(SettingsError, match="0 is cropped at random in each epoch.*random_crop: false"):
        ImagesToEncode(Wide(), "generation", range(3), harmon.generation)[0]
    with pytest.raises(SettingsError, match="0 is cropped at random in each epoch"):
        ImagesToEncode(AlmostSquare(), "generation", range(3), harmon.generation)[0]
    assert ImagesToEncode(Wide(), "generation", range(3), showo2.generation)[0].pixels is not None, "always the middle"
    assert ImagesToEncode(Wide(), "understanding", range(3), harmon.understanding)[0].pixels is not None, "padded"
    assert ImagesToEncode(Numbers(), "generation", range(3), harmon.generation)[0].pixels is not None, "square"
    assert (
        ImagesToEncode(Numbers(broken=[1]), "generation", range(3), harmon.generation)[1].broken
        == "number 1: it is broken"
    )


def test_the_folder_says_what_made_it(tmp_path) -> None:
    fill(tmp_path, 1)
    assert json.loads((tmp_path / "latents.json").read_text()) == {
        "family": "harmon",
        "image_size": 32,
        "autoencoder": "kl16",
        "digest": "ab" * 32,
        "branches": ["understanding", "generation"],
    }


def test_a_stream_that_draws_other_images_in_each_epoch_is_refused_with_the_mend() -> None:
    harmon = model_with_autoencoder("harmon").processor
    with pytest.raises(SettingsError, match="its shard holds more samples than are assumed.*`sizes`"):
        ImagesToEncode(OneOfTwo(), "generation", range(3), harmon.generation)[0]
