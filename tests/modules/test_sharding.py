"""FSDP2 on two processes gives DDP's numbers, with half of the weights and optimiser states on each."""

import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_forked
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from sharded_runs import CHECKPOINT, CLIPPED, OTHERS, fit, module, one_of_four, one_of_two
from sharded_runs import alone as what_one_does
from tiny import FAMILIES, TinyModule, tiny_model

from infotok_lit.checkpoints import CheckpointError, find_checkpoint, newest_checkpoint, read_run, run_checkpoint
from infotok_lit.cli import main as command_line
from infotok_lit.modules.base_model import rebuild_base
from infotok_lit.modules.sharded_strategy import _refuse_misfit
from infotok_lit.modules.sharding import repeated_blocks
from infotok_lit.sharded_checkpoints import read_sharded

LOCAL = ("part_gradient", "encoder_")
"""Numbers that are over one process's batch under DDP, and over all processes' under FSDP2."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of all runs on two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    run_forked(one_of_two, 2, folder)
    return folder


def records(folder: Path, processes: int = 2) -> list[dict[str, Any]]:
    return [torch.load(folder / f"record_{rank}.pt", weights_only=True) for rank in range(processes)]


def assert_equal_steps(actual: list[dict[str, float]], expected: list[dict[str, float]], rtol: float = 1e-5) -> None:
    for here, there in zip(actual, expected, strict=True):
        assert here.keys() == there.keys()
        for name, value in there.items():
            if not any(local in name for local in LOCAL):
                assert here[name] == pytest.approx(value, rel=rtol, abs=1e-6 if rtol else 0), name


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_numbers_are_those_of_ddp(runs, family) -> None:
    """Losses, terms with gathered texts, norms of base and heads before they are clipped, validation, answers."""
    for sharded, plain in zip(records(runs / family / "fsdp"), records(runs / family / "ddp"), strict=True):
        assert sharded["names"] == plain["names"]
        assert {"train/loss", "train/generation/alignment_nats"} <= plain["steps"][0].keys()
        balanced = "train/generation/rho_alignment" in plain["steps"][0]
        assert balanced == (family in ("balanced", "inline", "placebo"))
        # Balance begins with weights of 0, so heads have no gradient yet.
        parts = ("base",) if balanced else ("base", "heads")
        assert all(plain["steps"][0][f"train/gradient_norm/{part}"] > CLIPPED for part in parts), "both are clipped"
        assert_equal_steps(sharded["steps"], plain["steps"])
        assert_equal_steps([sharded["validation"]], [plain["validation"]])
        assert sharded["answers"] == plain["answers"]
        assert plain["answers"]


@pytest.mark.parametrize("family", [*FAMILIES, "lora"])
def test_each_process_holds_half(runs, family) -> None:
    for sharded, plain in zip(records(runs / family / "fsdp"), records(runs / family / "ddp"), strict=True):
        assert sharded["bytes"] <= 0.55 * plain["bytes"]


@pytest.mark.parametrize("family", [*FAMILIES, "lora"])
def test_exports_are_those_of_ddp(runs, family) -> None:
    files = sorted((runs / family / "ddp" / "export").glob("*.safetensors"))
    assert files
    for file in files:
        plain, sharded = load_file(file), load_file(runs / family / "fsdp" / "export" / file.name)
        assert plain.keys() == sharded.keys()
        whole, other = (torch.cat([state[name].flatten() for name in plain]) for state in (plain, sharded))
        assert (whole - other).norm() <= 1e-5 * whole.norm()


def test_a_sharded_run_resumes_exactly(runs) -> None:
    for resumed, whole in zip(records(runs / "harmon" / "resumed"), records(runs / "harmon" / "fsdp"), strict=True):
        assert resumed["names"] == whole["names"][2:]
        assert resumed["steps"] == whole["steps"][2:]


@pytest.mark.parametrize("name", ["from_ddp", "to_ddp"])
def test_a_run_resumes_under_the_other_strategy(runs, name) -> None:
    for resumed, whole in zip(records(runs / "harmon" / name), records(runs / "harmon" / "ddp"), strict=True):
        assert resumed["names"] == whole["names"][2:]
        assert_equal_steps(resumed["steps"], whole["steps"][2:])


def test_copies_of_the_model_give_the_same_numbers(runs) -> None:
    """Two copies, each on one process."""
    for copies, plain in zip(records(runs / "harmon" / "copies"), records(runs / "harmon" / "ddp"), strict=True):
        assert_equal_steps(copies["steps"], plain["steps"])


def test_copies_that_are_shared_out_give_the_same_numbers(tmp_path) -> None:
    """Two copies, each on two processes, as two nodes with two cards have them."""
    run_forked(one_of_four, 4, tmp_path)
    for copies, plain in zip(records(tmp_path / "copies", 4), records(tmp_path / "ddp", 4), strict=True):
        assert len(plain["steps"]) == 2 and copies["names"] == plain["names"]
        assert_equal_steps(copies["steps"], plain["steps"])
        assert_equal_steps([copies["validation"]], [plain["validation"]])
        assert copies["bytes"] <= 0.55 * plain["bytes"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The folder of what one process does."""
    folder = tmp_path_factory.mktemp("alone")
    run_forked(what_one_does, 1, folder)
    return folder


def test_a_file_without_frozen_weights_goes_on(alone) -> None:
    """As the files of all runs are that begin with weights from somewhere."""
    ((sharded,), (plain,)) = records(alone / "sharded", 1), records(alone / "plain", 1)
    assert read_run(alone / "plain" / CHECKPOINT)["infotok_lit"]["frozen"]
    assert sharded["names"] == plain["names"][2:]
    assert_equal_steps(sharded["steps"], plain["steps"][2:])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fewer_terms", "does not fit this model.*infotok.heads.*more"),
        ("other_terms", "does not fit this model.*infotok.heads.*more"),
        ("more_frozen", r"does not fit this model.*base\.llm"),
        ("no_average", "holds a moving average.*add --config trainer/weight_average"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(alone, name, words) -> None:
    """torch would leave what is not asked for where it is, and the run would go on without it."""
    assert re.search(words, (alone / f"{name}.txt").read_text())


def test_an_average_that_the_run_did_not_keep_is_named_with_the_mend() -> None:
    own = dict.fromkeys(("base.x", "weight_average.base.x"), torch.Size([2]))
    with pytest.raises(CheckpointError, match="step=4 holds no moving average.*leave out --config trainer/weight_ave"):
        _refuse_misfit(own, {"base.x": torch.Size([2])}, Path("step=4"))


def test_one_process_goes_on_with_what_two_left(runs, tmp_path) -> None:
    """With the same global batch: the samples that both together would have seen, from the state that they left."""
    trainer = fit(tmp_path, module("harmon"), "auto", devices=1, checkpoint=runs / "harmon" / "fsdp" / CHECKPOINT)
    assert trainer.global_step == 4
    (alone,) = [torch.load(tmp_path / "record_0.pt", weights_only=True)]
    both = records(runs / "harmon" / "fsdp")
    for here, first, second in zip(alone["names"], both[0]["names"][2:], both[1]["names"][2:], strict=True):
        assert sorted(here) == sorted(first + second)


def test_a_folder_holds_what_a_file_holds(runs) -> None:
    folder = read_sharded(runs / "harmon" / "fsdp" / CHECKPOINT)
    file = torch.load(runs / "harmon" / "ddp" / CHECKPOINT, weights_only=True)
    assert folder.keys() == file.keys()
    torch.testing.assert_close(folder["state_dict"], file["state_dict"], rtol=1e-4, atol=1e-6)
    (ours,), (theirs,) = folder["optimizer_states"], file["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=1e-4, atol=1e-6)


def test_commands_find_and_read_a_sharded_checkpoint(runs, tmp_path) -> None:
    run = runs / "harmon" / "fsdp"
    newest = newest_checkpoint([run])
    assert newest is not None
    assert newest.resolve().name == "step=4.ckpt"
    assert (run / "last.ckpt").resolve() == newest.resolve()
    assert find_checkpoint(run / CHECKPOINT) == run / CHECKPOINT
    assert command_line(["export", "--ckpt", str(run), "--out", str(tmp_path / "out")]) == 0
    written, expected = (load_file(folder / "harmon.safetensors") for folder in (tmp_path / "out", run / "export"))
    torch.testing.assert_close(written, expected, rtol=0, atol=0)


def test_an_adapted_model_is_rebuilt_from_a_sharded_checkpoint(runs) -> None:
    base = rebuild_base(read_run(runs / "lora" / "fsdp" / "last.ckpt"))
    exported = load_file(runs / "lora" / "fsdp" / "export" / "harmon.safetensors")
    official = base.official_weights()["harmon"]
    assert official.keys() - exported.keys() == set(base.official_aliases), "what is tied is stored once"
    torch.testing.assert_close({name: official[name] for name in exported}, exported, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["__0_0.distcp", "meta.pt", ".metadata"])
def test_a_damaged_folder_is_refused(runs, tmp_path, name) -> None:
    damaged = tmp_path / CHECKPOINT
    shutil.copytree(runs / "harmon" / "fsdp" / CHECKPOINT, damaged)
    content = bytearray((damaged / name).read_bytes())
    content[len(content) // 2 : len(content) // 2 + 8] = b"\xff" * 8
    (damaged / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        run_checkpoint(damaged)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name", [".metadata", "meta.pt"])
def test_nothing_in_a_folder_executes(runs, tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / CHECKPOINT
    shutil.copytree(runs / "harmon" / "fsdp" / CHECKPOINT, folder)
    if name == "meta.pt":
        torch.save({"infotok_lit": Malicious()}, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError):
        read_sharded(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_hold_most_of_a_network(family) -> None:
    """Each parameter lies in one block at most, and the language model's layers are among them."""
    base = tiny_model(family)
    blocks = list(repeated_blocks(base))
    held = [id(parameter) for block in blocks for parameter in block.parameters()]
    assert len(held) == len(set(held))
    assert set(base.text_body.layers) <= set(blocks)


def test_the_overlay_names_the_strategy() -> None:
    """`trainer/fsdp` is what docs/sharding.md describes; on a CPU it needs no more than the accelerator's name."""
    from infotok_lit.commands.fit import InfoTokCLI

    options = ["--config=harmon/scenes32", "--config=trainer/fsdp", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    cli = InfoTokCLI(["fit", *options], run=False)
    assert isinstance(cli.trainer, Trainer)
    assert type(cli.trainer.strategy).__name__ == "ShardedStrategy"
    assert not isinstance(cli.model, TinyModule)
