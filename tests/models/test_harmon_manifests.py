"""At full size, every key and shape of the official checkpoints has a parameter of ours, and the other way round."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_harmon

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.models.checkpoint import CheckpointError
from infotok_lit.models.harmon.autoencoder import KL16
from infotok_lit.models.harmon.config import AutoencoderConfig, config_of_size
from infotok_lit.models.harmon.keys import HARMON_KEYS, kl16_keys
from infotok_lit.models.harmon.loading import build_harmon

MANIFESTS = Path(__file__).parents[1] / "fixtures" / "goldens"


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    entries = json.loads((MANIFESTS / f"manifest_{name}.json").read_text())
    return {key: tuple(shape) for key, (shape, _) in entries.items()}


@pytest.mark.parametrize("size", ["0.5b", "1.5b"])
def test_harmon_matches_the_official_checkpoint(size) -> None:
    expected = manifest(f"harmon_{size}")
    with torch.device("meta"):
        model = build_harmon(config_of_size(size), str(SCENES_TOKENIZER))
    weights = model.official_weights()["harmon"]
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("autoencoder.")}
    official = {name: torch.empty(shape, device="meta") for name, shape in expected.items()}
    assert HARMON_KEYS.from_official(official, own, "the manifest").keys() == own.keys()


def test_the_autoencoder_matches_the_official_checkpoint() -> None:
    expected = manifest("kl16_vae")
    with torch.device("meta"):
        network = KL16(AutoencoderConfig()).network
    keys = kl16_keys(num_levels=5)
    weights = keys.to_official(network.state_dict())
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected
    official = {name: torch.empty(shape, device="meta") for name, shape in expected.items()}
    loaded = keys.from_official(official, network.state_dict(), "the manifest")
    assert {name: tensor.shape for name, tensor in loaded.items()} == {
        name: tensor.shape for name, tensor in network.state_dict().items()
    }


def test_the_embedded_size_has_at_most_three_million_parameters() -> None:
    model = build_harmon(config_of_size("scenes32"), str(SCENES_TOKENIZER))
    assert sum(parameter.numel() for parameter in model.parameters()) <= 3_000_000


@pytest.mark.parametrize("absent", ["llm.lm_head.weight", "llm.model.embed_tokens.weight"])
def test_either_of_the_tied_weights_is_enough(absent) -> None:
    source, target = tiny_harmon(seed=0), tiny_harmon(seed=1)
    weights = source.official_weights()["harmon"]
    del weights[absent]
    target.load_official_weights(weights, "a conversion")
    assert torch.equal(target.llm.lm_head.weight, source.llm.lm_head.weight)
    assert torch.equal(target.llm.get_input_embeddings().weight, source.llm.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda weights: weights.pop("mar.z_proj.bias"), r"1 missing: mar\.z_proj\.bias"),
        (lambda weights: weights.update({"mar.z_prj.bias": torch.zeros(1)}), r"1 unexpected: mar\.z_prj\.bias"),
        (lambda weights: weights.update({"proj_in.0.bias": torch.zeros(7)}), r"1 mis-shaped: proj_in\.0\.bias \(7,\)"),
    ],
)
def test_what_does_not_fit_is_named(damage, message) -> None:
    model = tiny_harmon()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = model.official_weights()["harmon"]
    damage(weights)
    with pytest.raises(CheckpointError, match=message):
        model.load_official_weights(weights, "a file")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
