"""Table 1's decoder probe: a light decoder learns to rebuild images from frozen tokens, and is measured honestly."""

from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import scipy.linalg
import torch
from tiny import FAMILIES, TINY_CONFIGS

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.batch import TokenLayout
from infotok_lit.data.datamodule import UnifiedDataModule
from infotok_lit.errors import SettingsError
from infotok_lit.models.family import family as family_called
from infotok_lit.models.unified import UnifiedModel
from infotok_lit.modules.decoder_probe import DecoderProbe, TokenDecoder
from infotok_lit.modules.optimiser import OptimiserConfig
from infotok_lit.scenes import Scenes
from infotok_lit.scenes.features import GarmentFeatures, SceneFeatures, batch_of
from infotok_lit.scenes.judge import shipped_judge


def probe_of(base: UnifiedModel) -> DecoderProbe:
    """A small probe of a model that is given, not read."""
    module = DecoderProbe(
        base.family, width=32, depth=1, heads=2, feature_network=SceneFeatures(),
        optimiser=OptimiserConfig(lr=3e-3, warmup_steps=2),
    )  # fmt: skip
    module.initial_model = SimpleNamespace(build=lambda: base)
    return module


def trainer_of(folder: Path, steps: int) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=1, val_check_interval=steps, check_val_every_n_epoch=None,
        logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, enable_checkpointing=False,
        num_sanity_val_steps=0,
    )  # fmt: skip


def data() -> UnifiedDataModule:
    return UnifiedDataModule(
        Scenes(),
        Scenes(split="val"),
        understanding_batch_size=16,
        generation_batch_size=1,
        val_batch_size=20,
        val_samples=60,
    )


def test_each_token_draws_at_its_own_place():
    torch.manual_seed(0)
    decoder = TokenDecoder(5, TokenLayout(2, (3, 4)), (6, 12), width=8, depth=1, heads=2).eval()
    tokens = torch.randn(1, 14, 5)
    assert decoder(tokens).shape == (1, 3, 6, 12)
    # Without attention between tokens, only the patch of its place depends on a token: here row 1, column 3.
    decoder.body.layers[0].self_attn.out_proj.weight.data.zero_()
    before = decoder(tokens)
    tokens[0, 2 + 1 * 4 + 3, 0] += 1
    rows, columns = np.nonzero((decoder(tokens) - before).abs().sum(1)[0].detach().numpy() > 1e-6)
    assert set(rows) == {2, 3} and set(columns) == {9, 10, 11}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_learns_and_nothing_else_does(family, tmp_path):
    torch.manual_seed(0)
    base = family_called(family).build(TINY_CONFIGS[family](0.0), str(SCENES_TOKENIZER))
    module = probe_of(base)
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    trainer = trainer_of(tmp_path, 60)
    before = trainer.validate(module, data(), verbose=False)[0]
    trainer.fit(module, data())
    after = trainer.callback_metrics
    assert after["val/probe/loss"] < 0.7 * before["val/probe/loss"]
    assert after["val/probe/psnr"] > before["val/probe/psnr"] and after["val/probe/images"] == 60
    assert all(torch.equal(value, frozen[name]) for name, value in base.state_dict().items())
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"] and all(name.startswith("decoder.") for name in checkpoint["state_dict"])


def test_the_measures_are_their_definitions(tmp_path):
    """Against numpy and scipy, on images that a stand-in for the decoder gives."""
    module = DecoderProbe("harmon", width=16, depth=1, heads=2, feature_network=SceneFeatures())
    rebuilt = []

    def reconstruct(batch):
        noisy = (batch.pixel_values + 0.3 * torch.randn(batch.pixel_values.shape)).clamp(-1.2, 1.2)
        rebuilt.append((batch.pixel_values, noisy))
        return noisy

    module.reconstruct = reconstruct
    values = trainer_of(tmp_path, 1).validate(module, data(), verbose=False)[0]
    real, made = (torch.cat(parts) for parts in zip(*rebuilt, strict=True))
    levels = [np.round((images.clamp(-1, 1).numpy() + 1) * 127.5).astype(np.uint8) for images in (real, made)]
    error = np.square(levels[0].astype(float) - levels[1]).mean()
    assert values["val/probe/psnr"] == pytest.approx(10 * np.log10(255**2 / error), rel=1e-4)
    assert values["val/probe/loss"] == pytest.approx(float((real - made).square().mean()), rel=1e-4)
    features = [SceneFeatures()(torch.from_numpy(images)).double().numpy() for images in levels]
    means, spreads = [rows.mean(0) for rows in features], [np.cov(rows.T) for rows in features]
    root = scipy.linalg.sqrtm(spreads[0] @ spreads[1]).real
    distance = np.square(means[0] - means[1]).sum() + np.trace(spreads[0] + spreads[1] - 2 * root)
    assert values["val/probe/frechet_distance"] == pytest.approx(distance, rel=2e-2)


def test_without_torch_fidelity_a_network_is_asked_for():
    with pytest.raises(SettingsError, match="pip install torch-fidelity"):
        DecoderProbe("harmon")


@pytest.mark.parametrize("sizes", [{"heads": 5}, {"depth": 0}, {"width": 0}])
def test_a_decoder_that_cannot_be_is_refused(sizes):
    with pytest.raises(SettingsError, match="must be 1 or more, and heads divide width"):
        DecoderProbe("harmon", feature_network=SceneFeatures(), **sizes)


def test_the_shipped_features_know_what_scenes_show():
    network = SceneFeatures()
    images, kinds = batch_of(Scenes(split="val", num_samples=300), range(300))
    assert (network.recognise(images).argmax(-1) == kinds).float().mean() > 0.9
    assert network(images).shape == (300, network.num_features) and not network.training


def test_the_features_of_garments_are_their_judges():
    network = GarmentFeatures().train()
    scenes = Scenes("garments32", split="val", num_samples=3)
    images = np.stack([np.asarray(scenes.sample("generation", number).image) for number in range(3)])
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        places = [images[:, :, top : top + 16, left : left + 16] for top in (0, 16) for left in (0, 16)]
        expected = sum(shipped_judge().features(place.float() / 127.5 - 1) for place in places) / 4
    torch.testing.assert_close(network(images), expected)
    # Larger images are looked at with the same eyes.
    torch.testing.assert_close(
        network(images.repeat_interleave(2, 2).repeat_interleave(2, 3)), expected, atol=0.2, rtol=0.1
    )
