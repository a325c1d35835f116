"""The official checkpoints' keys and shapes, at full size, without their gigabytes: everything lives on meta."""

import pytest
import torch
from manifests import built, main_file, manifest, official_files, on_meta, shapes_of
from tiny import FAMILIES, tiny_model

from infotok_lit.checkpoints import CheckpointError
from infotok_lit.models.family import family as family_called
from infotok_lit.models.showo2.family import EMBEDDINGS, LM_HEAD
from infotok_lit.models.unified import UnifiedModel

SIZES = {"harmon": ("0.5b", "1.5b"), "showo2": ("1.5b", "1.5b-hq", "7b"), "openuni": ("b-512", "l-512", "l-1024")}
TIED = {"harmon": ("llm.lm_head.weight", "llm.model.embed_tokens.weight"), "showo2": (LM_HEAD, EMBEDDINGS)}
"""Official names of the output head and of the table that it is tied to, in all sizes but Show-o2's 7b."""
KEYS = {
    "harmon": ("mar.fake_latent", "mar.class_emb.weight", "proj_out.2.bias", "llm.model.norm.weight"),
    "showo2": ("position_embedding.weight", "diffusion_head_b.linear.bias", "showo.model.norm.weight"),
    "openuni": ("meta_queries", "projector.bias", "transformer.proj_out.bias"),
}
"""Some of the main file's, from all over it."""


@pytest.fixture(scope="module", params=[(family, size) for family, sizes in SIZES.items() for size in sizes], ids=str)
def case(request) -> tuple[str, str, UnifiedModel]:
    return *request.param, built(*request.param)


def test_our_names_are_the_official_ones(case) -> None:
    family, size, model = case
    found = {stem: shapes_of(weights) for stem, weights in model.official_weights().items()}
    assert found == official_files(family, size)
    assert found.keys() <= family_called(family).stems


def test_official_files_load(case) -> None:
    family, size, model = case
    for stem, shapes in official_files(family, size).items():
        model.load_official_weights(stem, on_meta(shapes), "file")
    other = next(
        found for found in (main_file(family, one) for one in SIZES[family]) if found != main_file(family, size)
    )
    with pytest.raises(CheckpointError, match="mis-shaped.*\ncheck that the model size"):
        model.load_official_weights(family, on_meta(other), "file")


def test_every_single_key_matters(case) -> None:
    """One key less, one more, or one of another shape is refused by name, wherever it lies."""
    family, size, model = case
    shapes = main_file(family, size)
    for key in KEYS[family]:
        shorter = {name: shape for name, shape in shapes.items() if name != key}
        with pytest.raises(CheckpointError, match=f"(?m)1 missing: {key}$"):
            model.load_official_weights(family, on_meta(shorter), "file")
        with pytest.raises(CheckpointError, match=f"(?m)1 unexpected: {key}x$"):
            model.load_official_weights(family, on_meta(shapes | {key + "x": (1,)}), "file")
        with pytest.raises(CheckpointError, match=rf"1 mis-shaped: {key} \(7,\), expected "):
            model.load_official_weights(family, on_meta(shapes | {key: (7,)}), "file")


def test_only_a_tied_head_may_be_stored_once(case) -> None:
    family, size, model = case
    shapes = main_file(family, size)
    for absent in TIED.get(family, ()):
        weights = on_meta({name: shape for name, shape in shapes.items() if name != absent})
        if model.config.llm.tie_word_embeddings:
            model.load_official_weights(family, weights, "file")
        else:
            with pytest.raises(CheckpointError, match=f"1 missing: {absent}"):
                model.load_official_weights(family, weights, "file")
    if family == "harmon":
        neither = on_meta({name: shape for name, shape in shapes.items() if name not in TIED[family]})
        with pytest.raises(CheckpointError, match=f"2 missing: {', '.join(TIED[family])}"):
            model.load_official_weights(family, neither, "file")


@pytest.mark.parametrize("absent", TIED["harmon"])
def test_a_tied_head_stored_once_reaches_both_places(absent) -> None:
    source, target = tiny_model(seed=1), tiny_model(seed=2)
    weights = source.official_weights()["harmon"]
    target.load_official_weights("harmon", {name: value for name, value in weights.items() if name != absent}, "file")
    assert torch.equal(target.llm.lm_head.weight, source.llm.model.embed_tokens.weight)
    assert torch.equal(target.llm.get_input_embeddings().weight, source.llm.model.embed_tokens.weight)


def test_the_file_of_kl16_may_hold_more_but_not_less() -> None:
    model, shapes = built("harmon", "0.5b"), manifest("kl16_vae")
    model.load_official_weights("kl16", on_meta(shapes | {"loss.discriminator.weight": (3,)}), "kl16.ckpt")
    del shapes["quant_conv.weight"]
    with pytest.raises(CheckpointError, match=r"kl16\.ckpt do not fit[\s\S]*1 missing: quant_conv\.weight"):
        model.load_official_weights("kl16", on_meta(shapes), "kl16.ckpt")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_embedded_size_has_at_most_three_million_parameters(family) -> None:
    assert sum(parameter.numel() for parameter in built(family, "scenes32").parameters()) <= 3_000_000


def test_a_head_that_differs_from_its_tied_table_is_warned_about(tmp_path) -> None:
    """The official loader of Show-o2 unties them, so official fine-tuning can part them."""
    showo2 = family_called("showo2")
    torch.save({LM_HEAD: torch.zeros(2), EMBEDDINGS: torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="output head that differs from its embedding table"):
        showo2.read_official(tmp_path, {}, showo2.config_of_size("scenes32"))
    with pytest.raises(ValueError, match=r"holds no image autoencoder: set `autoencoder` to Wan2\.1_VAE\.pth"):
        showo2.read_official(tmp_path, {}, showo2.config_of_size("1.5b"))


@pytest.mark.parametrize("family", TIED)
def test_where_a_head_and_its_tied_table_differ_the_table_counts(family) -> None:
    head, table = TIED[family]
    model = tiny_model(family)
    weights = {name: value.clone() for name, value in model.official_weights()[family].items()}
    expected = weights[table].clone()
    weights[head] += 1
    model.load_official_weights(family, weights, "file")
    assert model.llm.lm_head.weight is model.text_embedding.weight
    assert torch.equal(model.text_embedding.weight, expected)


@pytest.mark.parametrize("family", TIED)
def test_a_head_that_is_not_tied_is_loaded_and_missed(family) -> None:
    head, table = TIED[family]
    settings = {"llm": {"tie_word_embeddings": False}}
    source, target = (family_called(family).fresh("scenes32", settings=settings) for _ in range(2))
    weights = source.official_weights()[family]
    target.load_official_weights(family, weights, "file")
    assert torch.equal(target.llm.lm_head.weight, source.llm.lm_head.weight)
    assert torch.equal(target.text_embedding.weight, source.text_embedding.weight)
    for absent in (head, table):
        less = {name: value for name, value in weights.items() if name != absent}
        with pytest.raises(CheckpointError, match=f"1 missing: {absent}"):
            target.load_official_weights(family, less, "file")
