"""Tiny models on disk, as export leaves them, and as the official repository would publish them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import FAMILIES, TINY_CONFIGS, tiny_config

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.models.common.model_config import KL16Config
from infotok_lit.models.export import export_model
from infotok_lit.models.family import family as family_called
from infotok_lit.models.harmon.family import SIZES, HarmonConfig
from infotok_lit.models.unified import UnifiedModel

torch.set_num_threads(1)


LOUD = ("llm.", "project_in.", "encoder.fusion.", "vlm.model.language_model.", "vlm.model.multi_modal_projector.")


def talkative(family: str, config: Any) -> UnifiedModel:
    """Random weights so large that answers depend on the image and on the question."""
    torch.manual_seed(0)
    model = family_called(family).build(config, str(SCENES_TOKENIZER))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 1.0 if name.startswith(LOUD) else 0.1
            parameter.data += scale * torch.randn_like(parameter)
    return model.eval()


def with_kl16() -> HarmonConfig:
    """The tiny model behind a tiny KL-16: 32 pixels, stride 2, patches of 4, so the same 4x4 grid."""
    autoencoder = KL16Config(
        kind="kl16",
        latent_channels=2,
        base_width=4,
        width_multipliers=(1, 2),
        blocks_per_level=1,
        num_groups=2,
        attention_resolution=128,
    )
    base = tiny_config()
    return replace(base, autoencoder=autoencoder, mar=replace(base.mar, patch_size=4))


@pytest.fixture(scope="session", params=FAMILIES)
def model(request) -> UnifiedModel:
    return talkative(request.param, TINY_CONFIGS[request.param](0.0))


@pytest.fixture(scope="session")
def exported(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / model.family
    export_model(model, folder, {})
    return folder


@pytest.fixture(scope="session")
def models() -> dict[str, UnifiedModel]:
    """One model of every family."""
    return {family: talkative(family, TINY_CONFIGS[family](0.0)) for family in FAMILIES}


@pytest.fixture(scope="session")
def folders(models, tmp_path_factory) -> dict[str, Path]:
    """Family -> its model's exported folder, which is called like the family."""
    folder = tmp_path_factory.mktemp("families")
    for family, model in models.items():
        export_model(model, folder / family, {})
    return {family: folder / family for family in models}


@pytest.fixture(scope="session")
def kl16_model() -> UnifiedModel:
    return talkative("harmon", with_kl16())


@pytest.fixture(scope="session")
def exported_kl16(kl16_model, tmp_path_factory) -> dict[str, Path]:
    """The same model in both export formats; `pth` holds the official files harmon.pth and kl16.ckpt."""
    folder = tmp_path_factory.mktemp("models")
    for file_format in ("safetensors", "pth"):
        export_model(kl16_model, folder / file_format, {}, file_format)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def tiny_official_size(monkeypatch) -> None:
    """Let the official size 0.5b be the tiny model with its KL-16."""
    monkeypatch.setitem(SIZES, "0.5b", with_kl16())


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder with three images and a text file."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for name, size in (("a.png", (32, 32)), ("b.jpg", (60, 40)), ("c.png", (40, 90))):
        noise = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder
