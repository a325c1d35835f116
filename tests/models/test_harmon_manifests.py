"""The official checkpoints' keys and shapes, at full size, without their gigabytes: everything lives on meta."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.checkpoints import CheckpointError
from infotok_lit.models.harmon.family import FAMILY
from infotok_lit.models.harmon.model import Harmon

GOLDENS = Path(__file__).parents[1] / "fixtures" / "goldens"
HEAD, TABLE = "llm.lm_head.weight", "llm.model.embed_tokens.weight"


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    entries = json.loads((GOLDENS / f"manifest_{name}.json").read_text())
    return {key: tuple(shape) for key, (shape, _) in entries.items()}


def on_meta(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.fixture(scope="module", params=["0.5b", "1.5b"])
def size(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(size) -> Harmon:
    with torch.device("meta"):
        return FAMILY.build(FAMILY.config_of_size(size), str(SCENES_TOKENIZER))


def test_our_names_are_the_official_ones(size, model) -> None:
    weights = model.official_weights()
    assert weights.keys() == {"harmon", "kl16"}
    for stem, expected in {"harmon": manifest(f"harmon_{size}"), "kl16": manifest("kl16_vae")}.items():
        assert {key: tuple(value.shape) for key, value in weights[stem].items()} == expected


def test_official_files_load(size, model) -> None:
    model.load_official_weights("harmon", on_meta(manifest(f"harmon_{size}")), "harmon.pth")
    model.load_official_weights("kl16", on_meta(manifest("kl16_vae")), "kl16.ckpt")


@pytest.mark.parametrize("absent", [HEAD, TABLE])
def test_a_tied_head_may_be_stored_once(size, model, absent) -> None:
    shapes = manifest(f"harmon_{size}")
    del shapes[absent]
    model.load_official_weights("harmon", on_meta(shapes), "harmon.pth")


@pytest.mark.parametrize("absent", [HEAD, TABLE])
def test_a_tied_head_stored_once_reaches_both_places(absent) -> None:
    source, target = tiny_model(seed=1), tiny_model(seed=2)
    weights = source.official_weights()["harmon"]
    target.load_official_weights("harmon", {name: value for name, value in weights.items() if name != absent}, "file")
    assert torch.equal(target.llm.lm_head.weight, source.llm.model.embed_tokens.weight)
    assert torch.equal(target.llm.get_input_embeddings().weight, source.llm.model.embed_tokens.weight)


def test_without_any_head_the_file_is_refused(size, model) -> None:
    shapes = manifest(f"harmon_{size}")
    del shapes[HEAD], shapes[TABLE]
    with pytest.raises(CheckpointError, match=f"2 missing: {HEAD}, {TABLE}"):
        model.load_official_weights("harmon", on_meta(shapes), "harmon.pth")


def test_every_single_key_matters(size, model) -> None:
    """One key less, one more, or one of another shape is refused by name, wherever it lies."""
    shapes = manifest(f"harmon_{size}")
    for key in ("mar.fake_latent", "mar.class_emb.weight", "proj_out.2.bias", "llm.model.norm.weight"):
        shorter = {name: shape for name, shape in shapes.items() if name != key}
        with pytest.raises(CheckpointError, match=f"(?m)1 missing: {key}$"):
            model.load_official_weights("harmon", on_meta(shorter), "file")
        with pytest.raises(CheckpointError, match=f"(?m)1 unexpected: {key}x$"):
            model.load_official_weights("harmon", on_meta(shapes | {key + "x": (1,)}), "file")
        with pytest.raises(CheckpointError, match=rf"1 mis-shaped: {key} \(7,\), expected "):
            model.load_official_weights("harmon", on_meta(shapes | {key: (7,)}), "file")


def test_the_autoencoder_file_may_hold_more_but_not_less(model) -> None:
    shapes = manifest("kl16_vae")
    model.load_official_weights("kl16", on_meta(shapes | {"loss.discriminator.weight": (3,)}), "kl16.ckpt")
    del shapes["quant_conv.weight"]
    with pytest.raises(CheckpointError, match=r"kl16\.ckpt do not fit[\s\S]*1 missing: quant_conv\.weight"):
        model.load_official_weights("kl16", on_meta(shapes), "kl16.ckpt")


def test_the_embedded_size_has_at_most_three_million_parameters() -> None:
    with torch.device("meta"):
        model = FAMILY.build(FAMILY.config_of_size("scenes32"), str(SCENES_TOKENIZER))
    assert sum(parameter.numel() for parameter in model.parameters()) <= 3_000_000


def test_the_other_size_is_refused(size, model) -> None:
    other = {"0.5b": "1.5b", "1.5b": "0.5b"}[size]
    with pytest.raises(CheckpointError, match="mis-shaped.*\ncheck that the model size"):
        model.load_official_weights("harmon", on_meta(manifest(f"harmon_{other}")), "harmon.pth")
