"""The official checkpoints' keys and shapes, at full size, without their gigabytes: everything lives on meta."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.checkpoints import CheckpointError
from infotok_lit.models.showo2.family import EMBEDDINGS, FAMILY, LM_HEAD
from infotok_lit.models.showo2.model import Showo2

GOLDENS = Path(__file__).parents[1] / "fixtures" / "goldens"
MANIFESTS = {"1.5b": "showo2_1.5b", "1.5b-hq": "showo2_1.5b", "7b": "showo2_7b"}
"""The official 1.5B and 1.5B-HQ have the same keys and shapes."""


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    entries = json.loads((GOLDENS / f"manifest_{name}.json").read_text())
    return {key: tuple(shape) for key, (shape, _) in entries.items()}


def on_meta(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def on_meta_device(size: str) -> Showo2:
    with torch.device("meta"):
        return FAMILY.build(FAMILY.config_of_size(size), str(SCENES_TOKENIZER))


@pytest.fixture(scope="module", params=list(MANIFESTS))
def size(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(size) -> Showo2:
    return on_meta_device(size)


def test_our_names_are_the_official_ones(size, model) -> None:
    weights = model.official_weights()
    assert weights.keys() == {"showo2", "wan_vae"}
    for stem, expected in {"showo2": manifest(MANIFESTS[size]), "wan_vae": manifest("wan21_vae")}.items():
        assert {key: tuple(value.shape) for key, value in weights[stem].items()} == expected


def test_official_files_load(size, model) -> None:
    model.load_official_weights("showo2", on_meta(manifest(MANIFESTS[size])), "show-o2")
    model.load_official_weights("wan_vae", on_meta(manifest("wan21_vae")), "Wan2.1_VAE.pth")


@pytest.mark.parametrize("absent", [LM_HEAD, EMBEDDINGS])
def test_only_a_tied_head_may_be_stored_once(size, model, absent) -> None:
    shapes = manifest(MANIFESTS[size])
    del shapes[absent]
    if size == "7b":
        with pytest.raises(CheckpointError, match=f"1 missing: {absent}"):
            model.load_official_weights("showo2", on_meta(shapes), "show-o2")
    else:
        model.load_official_weights("showo2", on_meta(shapes), "show-o2")


def test_every_single_key_matters(size, model) -> None:
    shapes = manifest(MANIFESTS[size])
    for key in ("position_embedding.weight", "diffusion_head_b.linear.bias", "showo.model.norm.weight"):
        shorter = {name: shape for name, shape in shapes.items() if name != key}
        with pytest.raises(CheckpointError, match=f"(?m)1 missing: {key}$"):
            model.load_official_weights("showo2", on_meta(shorter), "file")
        with pytest.raises(CheckpointError, match=f"(?m)1 unexpected: {key}x$"):
            model.load_official_weights("showo2", on_meta(shapes | {key + "x": (1,)}), "file")
        with pytest.raises(CheckpointError, match=rf"1 mis-shaped: {key} \(7,\), expected "):
            model.load_official_weights("showo2", on_meta(shapes | {key: (7,)}), "file")


def test_the_other_size_is_refused(size, model) -> None:
    other = "1.5b" if size == "7b" else "7b"
    with pytest.raises(CheckpointError, match="mis-shaped.*\ncheck that the model size"):
        model.load_official_weights("showo2", on_meta(manifest(MANIFESTS[other])), "show-o2")


def test_the_embedded_size_has_at_most_three_million_parameters() -> None:
    model = on_meta_device("scenes32")
    assert sum(parameter.numel() for parameter in model.parameters()) <= 3_000_000


def test_a_head_that_differs_from_its_tied_table_is_warned_about(tmp_path) -> None:
    """The official loader unties them, so official fine-tuning can part them."""
    weights = {LM_HEAD: torch.zeros(2), EMBEDDINGS: torch.ones(2)}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="output head that differs from its embedding table"):
        FAMILY.read_official(tmp_path, {}, FAMILY.config_of_size("scenes32"))


def test_the_autoencoder_must_be_given(tmp_path) -> None:
    torch.save({EMBEDDINGS: torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no image autoencoder: set `autoencoder` to Wan2\.1_VAE\.pth"):
        FAMILY.read_official(tmp_path, {}, FAMILY.config_of_size("1.5b"))
