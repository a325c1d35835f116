"""Models with weights from files: nothing is drawn in vain, what has no file begins as ever, nothing is copied."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, tiny_model
from torch import nn

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.checkpoints import CheckpointError, read_weights
from infotok_lit.models.common import loading
from infotok_lit.models.common.loading import adopt_state, without_initial_weights
from infotok_lit.models.export import export_model
from infotok_lit.models.family import family, load_folder
from infotok_lit.models.showo2.family import QuantiserConfig


@pytest.mark.parametrize("name", FAMILIES)
def test_loading_draws_nothing_and_gives_every_tensor_back(name, tmp_path) -> None:
    model = tiny_model(name)
    export_model(model, tmp_path / "out", {})
    state = torch.get_rng_state()
    loaded = load_folder(tmp_path / "out")
    # The others draw some small tables as such, rather than into a weight.
    assert name != "showo2" or torch.equal(state, torch.get_rng_state())
    own, wanted = dict(loaded.named_buffers()) | loaded.state_dict(), dict(model.named_buffers()) | model.state_dict()
    assert own.keys() == wanted.keys()
    assert all(torch.equal(own[key], value) for key, value in wanted.items())
    assert [key for key, _ in loaded.named_parameters()] == [key for key, _ in model.named_parameters()]
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def test_layers_are_built_without_drawing() -> None:
    torch.manual_seed(0)
    with without_initial_weights():
        layer = nn.Sequential(nn.Linear(3, 4), nn.Embedding(5, 6), nn.Conv2d(1, 2, 3), nn.TransformerEncoderLayer(4, 2))
        nn.init.xavier_uniform_(layer[0].weight)
        nn.init.trunc_normal_(layer[0].weight)
        nn.init.normal_(tensor=layer[1].weight)
    found = torch.randn(3)
    torch.manual_seed(0)
    assert torch.equal(found, torch.randn(3))


def test_what_has_no_file_begins_as_without_files(tmp_path) -> None:
    plain = tiny_model("showo2")
    export_model(plain, tmp_path / "out", {})
    known = family("showo2")
    config, official = known.read_exported(tmp_path / "out")
    config = replace(config, quantiser=QuantiserConfig(kind="vq", codebook_size=16))
    torch.manual_seed(7)
    fresh = known.build(config, str(SCENES_TOKENIZER)).state_dict()
    torch.manual_seed(7)
    loaded = known.with_weights(official, config, str(SCENES_TOKENIZER)).state_dict()
    own = plain.state_dict()
    added = loaded.keys() - own.keys()
    assert added
    assert all(torch.equal(loaded[name], fresh[name]) for name in added)
    assert all(torch.equal(loaded[name], value) for name, value in own.items())


def test_tensors_are_adopted_and_tied_ones_stay_tied(monkeypatch) -> None:
    monkeypatch.setattr(loading, "SMALL", 0)
    source = tiny_model("harmon")
    state = {name: value.clone() for name, value in source.state_dict().items()}
    model = tiny_model("harmon", seed=1)
    adopt_state(model, state, "a test")
    assert model.encoder.token_embed.weight.data_ptr() == state["encoder.token_embed.weight"].data_ptr()
    assert model.llm.lm_head.weight is model.text_embedding.weight
    with pytest.raises(CheckpointError, match=r"1 missing: encoder\.token_embed\.weight"):
        adopt_state(model, {k: v for k, v in state.items() if k != "encoder.token_embed.weight"}, "a test")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_training_on_mapped_weights_leaves_the_file_alone(suffix, tmp_path) -> None:
    export_model(tiny_model("harmon"), tmp_path / "out", {}, "pth" if suffix == ".pth" else "safetensors")
    path = tmp_path / "out" / f"harmon{suffix}"
    before = path.read_bytes()
    model = load_folder(tmp_path / "out")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before
    assert not torch.equal(read_weights(path)["mar.mask_token"], model.decoder.mask_token)


MEASURE = """
import resource, sys, torch
from torch import nn
from infotok_lit.checkpoints import read_weights
from infotok_lit.models.common.loading import adopt_state, without_initial_weights

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
with without_initial_weights():
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(12)))
adopt_state(model, read_weights(sys.argv[1]), "a test")
sum(float(parameter.sum()) for parameter in model.parameters())
print((peak() - before) / sum(4 * parameter.numel() for parameter in model.parameters()))
"""


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_are_in_memory_once(suffix, tmp_path) -> None:
    from safetensors.torch import save_file

    state = {f"{layer}.weight": torch.randn(2048, 2048) for layer in range(12)}
    path = Path(tmp_path, f"weights{suffix}")
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True, timeout=500
    )
    assert float(done.stdout) < 1.2
