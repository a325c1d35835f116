"""`gpu_check` without a card: what it refuses, and that each of its checks can fail."""

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic
from types import SimpleNamespace

import pytest
import torch

from infotok_lit import cli
from infotok_lit.batch import BRANCHES
from infotok_lit.commands import gpu_check as command
from infotok_lit.commands import same_numbers
from infotok_lit.commands.gpu_check import Check, FailedCommandError, Place, losses, official_path, resume, speed
from infotok_lit.commands.same_numbers import RandomOnCPU, largest_difference


@pytest.fixture
def place(tmp_path) -> Place:
    return Place("cpu", tmp_path, monotonic() + 900)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_card_it_is_refused_in_a_sentence(capsys) -> None:
    assert cli.main(["gpu_check"]) == 2
    said = capsys.readouterr().err
    assert "needs a GPU" in said and said.count("\n") == 1


def test_the_table_and_the_status_say_what_failed(tmp_path, monkeypatch, capsys) -> None:
    def blocks(*_):
        yield "one", lambda: [Check("one", True, 1.5, "> 1")]
        yield "broken", lambda: [1 / 0]
        yield "two", lambda: Place("cpu", tmp_path, monotonic() + 900).call("fit", "--config", "nowhere.yaml")

    monkeypatch.setattr(command, "all_checks", blocks)
    out = tmp_path / "checks.json"
    assert cli.main(["gpu_check", "--accelerator", "cpu", "--out", str(out)]) == 1
    result = json.loads(out.read_text())
    assert [check["passed"] for check in result["checks"]] == [True, False, False]
    assert result["checks"][1]["value"] == "division by zero"
    assert "nowhere.yaml" in result["checks"][2]["value"] and result["device"].startswith("CPU")
    shown = capsys.readouterr().out
    assert "passed" in shown and "FAILED" in shown


def test_a_command_that_takes_too_long_or_compiles_too_often_has_failed(tmp_path, monkeypatch) -> None:
    assert Place("cpu", tmp_path, monotonic() + 900).call("--version").startswith("infotok_lit ")
    with pytest.raises(FailedCommandError, match="no time left"):
        Place("cpu", tmp_path, monotonic() - 1).call("--version")
    done = command.subprocess.CompletedProcess([], 0, "", "torch._dynamo hit config.recompile_limit (8)")
    monkeypatch.setattr(command.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(FailedCommandError, match="recompilations"):
        Place("cpu", tmp_path, monotonic() + 900).call("fit")


def test_losses_that_differ_are_found(place, monkeypatch) -> None:
    found = {"cpu": {"a": 2.0, "b": 0.5}, "cuda": {"a": 2.0, "b": 0.5004}}
    monkeypatch.setattr(same_numbers, "all_losses", lambda module, device: found[device.type])
    assert largest_difference("harmon", "cuda") == pytest.approx(4e-4)
    (check,) = losses(Place("gpu", place.folder, place.deadline), "harmon")
    assert not check.passed
    found["cuda"]["b"] = 0.50001
    assert next(losses(Place("gpu", place.folder, place.deadline), "harmon")).passed
    found["cuda"]["b"] = float("nan")
    assert not next(losses(Place("gpu", place.folder, place.deadline), "harmon")).passed


def test_random_numbers_are_the_cpus_whatever_device_they_are_for() -> None:
    torch.manual_seed(3)
    wanted = [torch.rand(4), torch.randn(2, 2), torch.randint(9, (3,)), torch.randn(5)]
    torch.manual_seed(3)
    with RandomOnCPU():
        meta = torch.device("meta")
        torch.rand(4, device=meta)
        found = torch.randn(2, 2), torch.randint(9, (3,)), torch.randn_like(torch.empty(5))
    assert all(one.equal(other) for one, other in zip(found, wanted[1:], strict=True)), "meta drew from the CPU"


@pytest.fixture
def in_this_process(monkeypatch) -> Iterator[None]:
    """Commands that a check runs, run here and in small batches: each process would import everything again."""

    def run_here(words: Sequence[str], cwd: Path, **_: object) -> subprocess.CompletedProcess:
        monkeypatch.chdir(cwd)
        smaller = [f"--data.init_args.{branch}_batch_size=4" for branch in BRANCHES if words[3] in ("fit", "bench")]
        return subprocess.CompletedProcess(words, cli.main([*words[3:], *smaller]), "", "")

    here = SimpleNamespace(run=run_here, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(command, "subprocess", here)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_checks_run_on_a_cpu(place, in_this_process) -> None:
    (check,) = resume(place)
    assert check.passed, check.value
    names = [check.name for check in speed(place, "harmon/scenes32", steps=1)]
    assert names == ["harmon/scenes32: step, ms", "harmon/scenes32: C&S&A / plain"], "no mark for speed on a CPU"
    (check,) = official_path(place, "harmon/scenes32")
    assert check.passed
