"""Checkpoints leave out what a run does not train, and whatever reads them puts it back, or says why it cannot."""

import shutil
from pathlib import Path

import pytest
import torch
from fit_tiny import Crash, Record, fit
from safetensors.torch import load_file, save_file

from infotok_lit.assets import embedded_base
from infotok_lit.checkpoints import CheckpointError, newest_checkpoint, read_run
from infotok_lit.cli import main as command_line
from infotok_lit.model_choice import choose
from infotok_lit.modules import HarmonModule
from infotok_lit.modules import lora as lora_module
from infotok_lit.modules.base_model import base_weights, rebuild_base
from infotok_lit.modules.lora import LoraConfig

LORA = LoraConfig(("llm.model.*",), rank=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Initial weights that may be damaged."""
    folder = tmp_path_factory.mktemp("base") / "initial"
    shutil.copytree(embedded_base("harmon", "scenes32"), folder)
    return folder


def module_from(source: Path | None, lora: LoraConfig | None = None, frozen: bool = True) -> HarmonModule:
    init_from = None if source is None else str(source)
    return HarmonModule(init_from=init_from, freeze=("llm.",) if frozen else (), lora=lora)


@pytest.fixture(scope="module", params=[None, LORA], ids=["frozen", "lora"])
def crashed(request, source, tmp_path_factory) -> tuple[Path, LoraConfig | None, HarmonModule]:
    """A run that ended after step 2, its adapters, and its module as it was then."""
    folder, module = tmp_path_factory.mktemp("run"), module_from(source, request.param)
    with pytest.raises(Crash):
        fit(folder, record=Record(crash_at=2), module=module, steps=4, val_every=100)
    return newest_checkpoint([folder]), request.param, module


def test_what_is_not_trained_is_not_in_the_file(crashed) -> None:
    path, lora, module = crashed
    state = read_run(path)["state_dict"]
    frozen = {f"base.{name}" for name, value in module.base.named_parameters() if not value.requires_grad}
    assert frozen
    assert not frozen & state.keys()
    assert {name for name in state if "base.llm." in name} == {
        f"base.{name}"
        for name, value in module.base.named_parameters()
        if name.startswith("llm.") and value.requires_grad
    }
    trained = sum(value.numel() for value in module.parameters() if value.requires_grad)
    # Weights and two moments of what is trained, and little else.
    assert path.stat().st_size < 1.2 * 12 * trained + 2e6


def test_the_run_resumes_exactly(crashed, source, tmp_path) -> None:
    path, lora, _ = crashed
    whole, resumed = Record(), Record()
    expected = fit(tmp_path / "whole", record=whole, module=module_from(source, lora), steps=4, val_every=100)
    found = fit(tmp_path / "on", path, resumed, module=module_from(source, lora), steps=4, val_every=100)
    assert resumed.rows == whole.rows[2:]
    for name, value in expected.lightning_module.state_dict().items():
        assert torch.equal(found.lightning_module.state_dict()[name], value), name


def test_exports_and_loads_are_the_runs_model(crashed, tmp_path) -> None:
    path, _, module = crashed
    assert command_line(["export", "--ckpt", str(path), "--out", str(tmp_path / "out")]) == 0
    exported = load_file(tmp_path / "out" / "harmon.safetensors")
    loaded, other = choose(path.parent).load(), rebuild_base(read_run(path))
    other.load_state_dict(base_weights(read_run(path)))
    with module.plain_base() as base:
        expected = base.state_dict()
        official = base.official_weights()["harmon"]
    for model in (loaded, other):
        assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())
    assert all(torch.equal(official[name], value) for name, value in exported.items())


def test_what_has_changed_is_named(crashed, source, tmp_path) -> None:
    path, lora, _ = crashed
    whole = tmp_path / "kept"
    source.rename(whole)
    try:
        with pytest.raises(CheckpointError, match=r"leaves out \d+ weights that its run did not train.*initial"):
            rebuild_base(read_run(path))
        shutil.copytree(whole, source)
        weights = load_file(source / "harmon.safetensors")
        name = next(name for name in weights if name.startswith("llm.model.layers.0."))
        weights[name] += 1
        save_file(weights, source / "harmon.safetensors")
        for attempt in (
            lambda: rebuild_base(read_run(path)),
            lambda: fit(tmp_path / "on", path, module=module_from(source, lora), steps=4),
        ):
            with pytest.raises(CheckpointError, match=r"is not as it was: llm\.model\.layers\.0\..*model\.init_from"):
                attempt()
        shutil.rmtree(source)
    finally:
        whole.rename(source)


def test_what_adapters_were_merged_into_is_not_taken_for_changed_elsewhere(crashed, tmp_path, monkeypatch) -> None:
    """A run from a run with adapters, and a processor that rounds the sum of the two to the next number."""
    first, lora, _ = crashed
    module = module_from(first, lora)
    fit(tmp_path, module=module, steps=2, val_every=100)
    expected = {name: value.clone() for name, value in module.base.state_dict().items()}
    second = newest_checkpoint([tmp_path])

    here = lora_module.merged_weight

    def elsewhere(*arguments):
        return torch.nextafter(here(*arguments), torch.tensor(torch.inf))

    monkeypatch.setattr(lora_module, "merged_weight", elsewhere)
    again, checkpoint = module_from(first, lora), read_run(second)
    again.configure_model()
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(checkpoint["state_dict"])
    for name, value in again.base.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert base_weights(read_run(second)).keys() == HarmonModule().build_base().state_dict().keys()


def test_another_start_is_refused(crashed, tmp_path) -> None:
    path, lora, _ = crashed
    with pytest.raises(CheckpointError, match=r"Give model\.init_from"):
        fit(tmp_path, path, module=module_from(None, lora), steps=4)


def test_random_weights_cannot_be_read_again_and_are_kept(tmp_path) -> None:
    module = module_from(None)
    fit(tmp_path, module=module, steps=2, val_every=100)
    saved = read_run(newest_checkpoint([tmp_path]))
    assert {f"base.{name}" for name, _ in module.base.named_parameters()} <= saved["state_dict"].keys()
    assert not saved["infotok_lit"]["frozen"]
