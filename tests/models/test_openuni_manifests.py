"""The official checkpoints' keys and shapes, at full size, without their gigabytes: everything lives on meta."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_model, tiny_openuni_config
from torch import Tensor

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.checkpoints import CheckpointError
from infotok_lit.models.export import export_model
from infotok_lit.models.family import load_folder
from infotok_lit.models.openuni.family import FAMILY
from infotok_lit.models.openuni.model import OpenUni

GOLDENS = Path(__file__).parents[1] / "fixtures" / "goldens"
SIZES = {"b-512": "1b", "l-512": "2b", "l-1024": "2b"}
"""Size -> its InternVL3."""
Shapes = dict[str, tuple[int, ...]]


def manifest(name: str) -> Shapes:
    with gzip.open(GOLDENS / "manifests_openuni.json.gz") as file:
        return {key: tuple(shape) for key, shape in json.load(file)[name].items()}


def on_meta(shapes: Shapes) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def shapes_of(weights: dict[str, Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in weights.items()}


@pytest.fixture(scope="module", params=list(SIZES))
def size(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(size) -> OpenUni:
    with torch.device("meta"):
        return FAMILY.build(FAMILY.config_of_size(size), str(SCENES_TOKENIZER))


def own_manifest(size: str, suffix: str = "") -> Shapes:
    return manifest(f"openuni_{size.replace('-', '_')}{suffix}")


def test_our_names_are_the_official_ones(size, model) -> None:
    weights = model.official_weights()
    assert shapes_of(weights["openuni"]) == own_manifest(size)
    assert shapes_of(weights["internvl3"]) == manifest(f"internvl3_{SIZES[size]}_official")
    assert shapes_of(model.vlm.state_dict()) == manifest(f"internvl3_{SIZES[size]}_native_tf5")
    whole = {f"lmm.{name}": shape for name, shape in shapes_of(weights["internvl3"]).items()}
    whole |= {f"vae.{name}": shape for name, shape in shapes_of(weights["dc_ae"]).items()}
    assert shapes_of(weights["openuni"]) | whole == own_manifest(size, "_full")


def test_official_files_load(size, model) -> None:
    model.load_official_weights("openuni", on_meta(own_manifest(size)), "openuni.pth")
    for naming in ("official", "native_tf5"):
        model.load_official_weights("internvl3", on_meta(manifest(f"internvl3_{SIZES[size]}_{naming}")), "InternVL3")
    older = older_names(on_meta(manifest(f"internvl3_{SIZES[size]}_native_tf5")))
    model.load_official_weights("internvl3", older, "InternVL3-hf")
    prefix = "vae."
    whole = {name: shape for name, shape in own_manifest(size, "_full").items() if name.startswith(prefix)}
    model.load_official_weights(
        "dc_ae", on_meta({n.removeprefix(prefix): shape for n, shape in whole.items()}), "DC-AE"
    )


def test_a_pretrained_checkpoint_lacks_only_the_diffusion_transformer(size, model) -> None:
    pretrained = own_manifest(size, "_pretrain")
    expected = {name for name in own_manifest(size) if not name.startswith("transformer.")}
    assert pretrained.keys() == expected
    with pytest.raises(CheckpointError, match="missing: transformer"):
        model.load_official_weights("openuni", on_meta(pretrained), "openuni.pth")


def test_every_single_key_matters(size, model) -> None:
    shapes = own_manifest(size)
    for key in ("meta_queries", "projector.bias", "transformer.proj_out.bias"):
        shorter = {name: shape for name, shape in shapes.items() if name != key}
        with pytest.raises(CheckpointError, match=f"(?m)1 missing: {key}$"):
            model.load_official_weights("openuni", on_meta(shorter), "file")
        with pytest.raises(CheckpointError, match=f"(?m)1 unexpected: {key}x$"):
            model.load_official_weights("openuni", on_meta(shapes | {key + "x": (1,)}), "file")
        with pytest.raises(CheckpointError, match=rf"1 mis-shaped: {key} \(7,\), expected "):
            model.load_official_weights("openuni", on_meta(shapes | {key: (7,)}), "file")
    vlm = manifest(f"internvl3_{SIZES[size]}_official")
    del vlm["mlp1.0.weight"]
    with pytest.raises(CheckpointError, match=r"(?m)1 missing: mlp1\.0\.weight$"):
        model.load_official_weights("internvl3", on_meta(vlm), "InternVL3")


def older_names(native: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the "-hf" repositories were written before transformers 5."""
    renamed = {}
    for name, tensor in native.items():
        if name.startswith("model.language_model."):
            name = "language_model.model." + name.removeprefix("model.language_model.")
        elif name.startswith("lm_head."):
            name = f"language_model.{name}"
        else:
            name = name.removeprefix("model.")
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("naming", ["official", "native", "older"])
def test_every_naming_of_the_language_model_is_the_same_model(naming) -> None:
    model, target = tiny_model("openuni", seed=1), tiny_model("openuni", seed=2)
    native = model.vlm.state_dict()
    named = {"official": model.official_weights()["internvl3"], "native": native, "older": older_names(native)}
    target.load_official_weights("internvl3", named[naming], "a test")
    found = target.vlm.state_dict()
    assert found.keys() == native.keys()
    assert all(torch.equal(found[name], native[name]) for name in native)


def half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the official converter writes them."""
    return {name: tensor.half() for name, tensor in weights.items()}


def files(tmp_path: Path, model: OpenUni, weights: dict[str, Any]) -> tuple[Path, dict[str, Path]]:
    """An official checkpoint, and the parts beside it."""
    torch.save(weights, tmp_path / "openuni.pth")
    for part, state in (("vlm", model.official_weights()["internvl3"]), ("sana", model.transformer.state_dict())):
        (tmp_path / part).mkdir()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / part / "model.safetensors")
    return tmp_path / "openuni.pth", {"vlm": tmp_path / "vlm"}


@pytest.mark.parametrize("variant", ["finetuned", "pretrained", "whole"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_all_variants_of_official_files_give_the_same_model(tmp_path, variant, wrapped) -> None:
    """In half precision, as they are published, and with or without a wrapping `state_dict`."""
    model, config = tiny_model("openuni", seed=1).half().float(), tiny_openuni_config()
    weights = model.official_weights()["openuni"]
    if variant == "pretrained":
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("transformer.")}
    if variant == "whole":
        weights |= {f"lmm.{name}": tensor for name, tensor in model.official_weights()["internvl3"].items()}
    weights = half(weights)
    path, parts = files(tmp_path, model, {"state_dict": weights} if wrapped else weights)
    if variant == "pretrained":
        with pytest.raises(ValueError, match="holds no transformer: set `transformer` to SANA's folder"):
            FAMILY.read_official(path, parts, config)
        parts["transformer"] = tmp_path / "sana"
    if variant == "whole":
        parts = {}
    loaded = FAMILY.read_official(path, parts, config).load_into(tiny_model("openuni", seed=2))
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    # What is exported is the fine-tuned variant, whichever was read.
    export_model(loaded, tmp_path / "out", {}, file_format="pth")
    exported = torch.load(tmp_path / "out" / "openuni.pth", weights_only=True)
    assert exported.keys() == model.official_weights()["openuni"].keys()
    again = load_folder(tmp_path / "out").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.items())


@pytest.mark.parametrize("absent", ["meta_queries", "connector.", "projector."])
def test_a_file_without_the_essentials_is_no_openuni(tmp_path, absent) -> None:
    model = tiny_model("openuni")
    weights = {n: t for n, t in model.official_weights()["openuni"].items() if not n.startswith(absent)}
    path, parts = files(tmp_path, model, weights)
    with pytest.raises(CheckpointError, match=f"is no OpenUni checkpoint: it lacks {absent}"):
        FAMILY.read_official(path, parts, tiny_openuni_config())


def test_the_embedded_size_has_at_most_three_million_parameters() -> None:
    with torch.device("meta"):
        model = FAMILY.build(FAMILY.config_of_size("scenes32"), str(SCENES_TOKENIZER))
    assert sum(parameter.numel() for parameter in model.parameters()) <= 3_000_000
