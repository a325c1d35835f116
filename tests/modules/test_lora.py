"""Adapters: trained instead of the weights under them, resumed with the run, and gone from what is exported."""

import copy
from pathlib import Path

import pytest
import torch
from fit_tiny import Crash, Record, fit
from safetensors import safe_open
from tiny import FAMILIES, TinyModule, tiny_model

from infotok_lit.callbacks import ExportInference
from infotok_lit.checkpoints import CheckpointError, newest_checkpoint, read_run
from infotok_lit.commands.export import export
from infotok_lit.commands.parsing import run
from infotok_lit.models.family import load_folder
from infotok_lit.modules.base_model import base_weights
from infotok_lit.modules.lora import LoraConfig, add_adapters, merged, merged_state
from infotok_lit.scenes import Scenes

TARGETS = {"harmon": "llm.model.*", "showo2": "llm.model.*", "openuni": "vlm.model.language_model.*"}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def lora_of(family: str) -> LoraConfig:
    return LoraConfig((TARGETS[family],), rank=3, alpha=6.0)


def module_of(family: str, **options) -> TinyModule:
    return TinyModule(family=family, lora=lora_of(family), lr=0.05, **options)


def losses(model) -> torch.Tensor:
    model.eval()
    source = Scenes(split="val")
    reading = model.processor.understanding([source.sample("understanding", i, None) for i in range(4)])
    drawing = model.processor.generation([source.sample("generation", i, None) for i in range(4)])
    with torch.no_grad():
        torch.manual_seed(0)
        return torch.stack([model.understanding(reading).loss_sum, model.generation(drawing).loss_sum])


def adapted(family: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model, and a copy with adapters that do something."""
    plain = tiny_model(family)
    model = copy.deepcopy(plain)
    add_adapters(model, lora_of(family))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn_like(parameter)
    return plain, model


def test_fresh_adapters_change_nothing(family) -> None:
    plain, model = tiny_model(family), tiny_model(family)
    add_adapters(model, lora_of(family))
    assert torch.equal(losses(plain), losses(model))


def test_merging_is_the_sum_that_the_adapter_computes(family) -> None:
    """Against peft's own forward pass, and against W + alpha / rank * B A written out."""
    plain, model = adapted(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = losses(model)
    assert (expected - losses(plain)).abs().max() > 0.1
    with merged(model, lora_of(family)):
        assert model.state_dict().keys() == plain.state_dict().keys()
        torch.testing.assert_close(losses(model), expected, rtol=1e-4, atol=1e-4)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, weights[name]) for name, value in merged_state(before, lora_of(family)).items())
    layer = next(name.removesuffix(".base_layer.weight") for name in before if name.endswith(".base_layer.weight"))
    up, down = before[f"{layer}.lora_B.default.weight"], before[f"{layer}.lora_A.default.weight"]
    torch.testing.assert_close(weights[f"{layer}.weight"], before[f"{layer}.base_layer.weight"] + 2.0 * up @ down)


def test_a_step_moves_adapters_and_not_what_is_under_them(family, tmp_path) -> None:
    module = module_of(family)
    module.configure_model()
    before = {name: value.clone() for name, value in module.base.state_dict().items()}
    trainer = fit(tmp_path, module=module, steps=2)
    moved = {name for name, value in module.base.state_dict().items() if not torch.equal(value, before[name])}
    assert any(".lora_A." in name for name in moved) and any(".lora_B." in name for name in moved)
    assert not [name for name in moved if ".base_layer." in name]
    missing = [
        name for name, p in module.named_parameters() if p.requires_grad and p not in trainer.optimizers[0].state
    ]
    assert missing == []


def test_adapters_are_trained_in_a_frozen_part_and_nothing_else_there(tmp_path) -> None:
    module = module_of("openuni", freeze=("vlm.",))
    module.configure_model()
    trained = [name for name, p in module.base.named_parameters() if p.requires_grad and name.startswith("vlm.")]
    assert trained and all(".lora_" in name for name in trained)
    # All seven linear layers of both blocks, two matrices each.
    assert len(trained) == 2 * 7 * 2


def test_exports_have_the_official_names_and_the_adapters_effect(family, tmp_path) -> None:
    module = module_of(family)
    trainer = fit(tmp_path / "run", module=module, steps=3)
    ExportInference(str(tmp_path / "live")).on_fit_end(trainer, module)
    trainer.save_checkpoint(tmp_path / "run" / "end.ckpt")
    assert run(export, ["export", "--ckpt", str(tmp_path / "run" / "end.ckpt"), "--out", str(tmp_path / "file")]) == 0
    live, from_file = load_folder(tmp_path / "live"), load_folder(tmp_path / "file")
    assert live.state_dict().keys() == tiny_model(family).state_dict().keys()
    assert all(torch.equal(value, live.state_dict()[name]) for name, value in from_file.state_dict().items())
    torch.testing.assert_close(losses(live), losses(module.base), rtol=1e-4, atol=1e-4)
    for stem, weights in tiny_model(family).official_weights().items():
        with safe_open(tmp_path / "live" / f"{stem}.safetensors", "pt") as file:
            assert set(file.keys()) == set(weights) - set(live.official_aliases)


def test_a_run_with_adapters_resumes_exactly(tmp_path) -> None:
    whole, resumed = Record(), Record()
    expected = fit(tmp_path / "whole", record=whole, module=module_of("openuni"))
    with pytest.raises(Crash):
        fit(tmp_path / "crashed", record=Record(crash_at=5), module=module_of("openuni"))
    checkpoint = newest_checkpoint([tmp_path / "crashed"])
    found = fit(tmp_path / "crashed", checkpoint, resumed, module=module_of("openuni"))
    assert resumed.rows == whole.rows[4:]
    for name, value in expected.lightning_module.state_dict().items():
        assert torch.equal(found.lightning_module.state_dict()[name], value), name


@pytest.fixture(scope="module")
def short_run(tmp_path_factory) -> tuple[Path, TinyModule]:
    """A checkpoint, and the module as it was then."""
    folder, module = tmp_path_factory.mktemp("run"), module_of("openuni")
    fit(folder, module=module, steps=2)
    return newest_checkpoint([folder]), module


def test_a_run_starts_from_another_with_its_adapters_merged(short_run) -> None:
    checkpoint, module = short_run
    base = tiny_model("openuni", seed=9)
    base.load_state_dict(base_weights(read_run(checkpoint)))
    with merged(module.base, lora_of("openuni")):
        assert all(torch.equal(base.state_dict()[name], value) for name, value in module.base.state_dict().items())


def test_other_adapters_than_the_runs_are_refused(short_run, tmp_path) -> None:
    checkpoint, _ = short_run
    for other in (None, LoraConfig((TARGETS["openuni"],), rank=4)):
        with pytest.raises(CheckpointError, match=r"model\.lora is .*, but the run to resume has .*model\.init_from"):
            fit(tmp_path / "other", checkpoint, module=TinyModule(family="openuni", lora=other))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (("llm.nothing.*",), "no linear layer is called 'llm.nothing.*'; there are .*llm"),
        (("llm.lm_head",), "llm.lm_head shares its weight with llm.model.embed_tokens.weight"),
        (("llm.*",), "llm.lm_head shares its weight"),
    ],
)
def test_what_cannot_have_adapters_is_refused(config, message) -> None:
    with pytest.raises(ValueError, match=message):
        TinyModule(lora=LoraConfig(config)).configure_model()


@pytest.mark.parametrize("values", [{"targets": ()}, {"targets": ("a",), "rank": 0}, {"targets": ("a",), "alpha": 0.0}])
def test_an_adapter_without_size_or_place_is_refused(values) -> None:
    with pytest.raises(ValueError, match="lora"):
        LoraConfig(**values)
