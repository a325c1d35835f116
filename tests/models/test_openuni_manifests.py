"""OpenUni's official files in all of their namings and variants give one model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from manifests import built, main_file, manifest, on_meta, shapes_of
from safetensors.torch import save_file
from tiny import tiny_model, tiny_openuni_config
from torch import Tensor

from infotok_lit.checkpoints import CheckpointError
from infotok_lit.models.export import export_model
from infotok_lit.models.family import load_folder
from infotok_lit.models.openuni.family import FAMILY
from infotok_lit.models.openuni.model import OpenUni


@pytest.mark.parametrize(("size", "vlm"), [("b-512", "1b"), ("l-512", "2b"), ("l-1024", "2b")])
def test_a_size_has_every_naming_of_its_files(size, vlm) -> None:
    model, own = built("openuni", size), main_file("openuni", size)
    weights, native = model.official_weights(), manifest(f"internvl3_{vlm}_native_tf5")
    assert shapes_of(model.vlm.state_dict()) == native
    whole = {f"lmm.{name}": shape for name, shape in shapes_of(weights["internvl3"]).items()}
    whole |= {f"vae.{name}": shape for name, shape in shapes_of(weights["dc_ae"]).items()}
    assert own | whole == main_file("openuni", size, "_full")
    for named in (on_meta(native), older_names(on_meta(native))):
        model.load_official_weights("internvl3", named, "InternVL3")
    shorter = {name: tensor for name, tensor in weights["internvl3"].items() if name != "mlp1.0.weight"}
    with pytest.raises(CheckpointError, match=r"(?m)1 missing: mlp1\.0\.weight$"):
        model.load_official_weights("internvl3", shorter, "InternVL3")
    pretrained = main_file("openuni", size, "_pretrain")
    assert pretrained.keys() == {name for name in own if not name.startswith("transformer.")}
    with pytest.raises(CheckpointError, match="missing: transformer"):
        model.load_official_weights("openuni", on_meta(pretrained), "openuni.pth")


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
    weights = {name: tensor.half() for name, tensor in weights.items()}
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
