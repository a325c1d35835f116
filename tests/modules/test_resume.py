"""A run that is stopped, or killed, and resumed is the run that was never stopped: bit for bit."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fit_tiny
import lightning.pytorch as pl
import pytest
import torch
import yaml
from fit_tiny import STEPS, Crash, Record, fit
from tiny import FAMILIES, TinyModule, tiny_config

from infotok_lit.checkpoints import CheckpointError, newest_checkpoint, read_run
from infotok_lit.cli import main as command_line
from infotok_lit.commands.fit import main
from infotok_lit.commands.fit_resume import last_checkpoint
from infotok_lit.models.harmon.family import SIZES
from infotok_lit.modules import HarmonModule
from infotok_lit.modules.finite import NonFiniteError
from infotok_lit.modules.losses import TaskWeights
from infotok_lit.objective.alignment import NegativesConfig
from infotok_lit.objective.config import BranchWeights
from infotok_lit.objective.constraint import DualConfig

TESTS = Path(__file__).parents[1]


@dataclass
class Run:
    folder: Path
    rows: list[list[Any]]
    trainer: pl.Trainer
    trained: bool

    @property
    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        (optimiser,), (schedule,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        return {
            "weights": self.trainer.lightning_module.state_dict(),
            "optimiser": optimiser.state_dict()["state"],
            "groups": [{**group, "name": None} for group in optimiser.state_dict()["param_groups"]],
            "schedule": schedule.scheduler.last_epoch,
        }


def run(folder: Path, checkpoint: Path | None = None, **options: Any) -> Run:
    record = Record()
    trainer = fit(folder, checkpoint, record, **options)
    return Run(folder, record.rows, trainer, record.trained)


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def newest(folder: Path) -> Path:
    found = newest_checkpoint([folder])
    assert found is not None
    return found


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory) -> dict[int, Run]:
    """Accumulated batches -> a run that nothing interrupts."""
    return {count: run(tmp_path_factory.mktemp("whole"), accumulate=count) for count in (1, 2)}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "harmon"])
def test_every_family_resumes_as_if_nothing_had_happened(tmp_path, family) -> None:
    def module() -> TinyModule:
        return TinyModule(family=family, task_weights=TaskWeights(reconstruction=1.0))

    whole = run(tmp_path / "whole", module=module())
    with pytest.raises(Crash):
        fit(tmp_path / "crashed", None, Record(crash_at=5), module=module())
    resumed = run(tmp_path / "crashed", newest(tmp_path / "crashed"), module=module())
    assert resumed.rows == whole.rows[4:]
    assert_equal(resumed.state, whole.state)


def with_state() -> TinyModule:
    """A module whose objective remembers things: past texts, and multipliers that it found; it also reconstructs."""
    module = TinyModule(dropout=0.1, task_weights=TaskWeights(reconstruction=1.0))
    module.objective_config = replace(
        module.objective_config,
        negatives=NegativesConfig(queue_size=10, limit=5),
        understanding=BranchWeights(rate_budget_bits=6.0),
        generation=BranchWeights(sufficiency_target_nats=0.5),
        dual=DualConfig(step_size=0.1),
    )
    return module


def test_what_the_objective_remembers_is_resumed(tmp_path) -> None:
    whole = run(tmp_path / "whole", accumulate=2, module=with_state())
    with pytest.raises(Crash):
        fit(tmp_path / "crashed", None, Record(crash_at=5), accumulate=2, module=with_state())
    resumed = run(tmp_path / "crashed", newest(tmp_path / "crashed"), accumulate=2, module=with_state())
    assert resumed.rows == whole.rows[8:]
    assert_equal(resumed.state, whole.state)
    metrics = whole.rows[-1][3]
    assert "train/reconstruction/loss" in metrics
    assert metrics["train/understanding/constraint_multiplier"] not in (0.0, 1.0), "the multiplier has moved"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_crash_and_a_resume_leave_no_trace(tmp_path, whole_runs, accumulate) -> None:
    """The crash comes a step after the last checkpoint, so a step is trained twice; validation comes at other steps."""
    whole = whole_runs[accumulate]
    crashed = Record(crash_at=5)
    with pytest.raises(Crash):
        fit(tmp_path, None, crashed, accumulate, val_every=2)
    resumed = run(tmp_path, newest(tmp_path), accumulate=accumulate, val_every=2)
    assert crashed.rows == whole.rows[: 5 * accumulate]
    assert resumed.rows == whole.rows[4 * accumulate :]
    assert_equal(resumed.state, whole.state)
    assert whole.trained and resumed.trained
    # The comparison is not empty: steps are counted, metrics are there and change, samples are not seen twice.
    assert [row[0] for row in whole.rows[accumulate - 1 :: accumulate]] == list(range(1, STEPS + 1))
    losses = [row[3]["train/loss"] for row in whole.rows[accumulate - 1 :: accumulate]]
    assert len(set(losses)) == STEPS
    names = [name for row in whole.rows for name in row[1]]
    assert len(set(names)) == len(names) == 4 * STEPS * accumulate


def test_a_resumed_run_keeps_its_own_seed(tmp_path, whole_runs) -> None:
    resumed = run(tmp_path, newest(whole_runs[1].folder), seed=1)
    assert resumed.rows == whole_runs[1].rows[6:]
    assert_equal(resumed.state, whole_runs[1].state)


def test_dropout_is_on(whole_runs, tmp_path) -> None:
    """Else nothing above would depend on the random numbers of a step."""
    without = run(tmp_path, module=TinyModule(dropout=0.0), steps=STEPS)
    assert without.rows[0][3]["train/understanding/loss"] != whole_runs[1].rows[0][3]["train/understanding/loss"]


def test_kill_and_resume_in_new_processes(tmp_path, whole_runs) -> None:
    """SIGKILL in the middle of step 6, two checkpoints after the start; what goes on has another seed of hashes."""
    arguments = (str(tmp_path), "none", "5")
    process = multiprocessing.get_context("fork").Process(target=fit_tiny.main, args=arguments)
    process.start()
    try:
        while not (tmp_path / "paused").exists():
            assert process.is_alive(), "the run ended before it was killed"
            time.sleep(0.05)
    finally:
        process.kill()
        process.join()
    killed = json.loads((tmp_path / "rows.json").read_text())
    assert killed == whole_runs[1].rows[:5]
    command = [sys.executable, fit_tiny.__file__, str(tmp_path), str(newest(tmp_path)), str(fit_tiny.NEVER)]
    folders = os.pathsep.join(map(str, (TESTS, TESTS.parent)))
    subprocess.run(command, env=os.environ | {"PYTHONPATH": folders, "PYTHONHASHSEED": "7"}, check=True, timeout=500)
    assert json.loads((tmp_path / "rows.json").read_text()) == whole_runs[1].rows[4:]
    end = read_run(tmp_path / "end.ckpt")
    assert_equal(end["state_dict"], whole_runs[1].state["weights"])
    assert_equal(end["optimizer_states"][0]["state"], whole_runs[1].state["optimiser"])


def test_checkpoints_hold_tensors_and_primitives_only(whole_runs) -> None:
    checkpoint = torch.load(newest(whole_runs[1].folder), weights_only=True)
    prefixes = {name.split(".")[0] for name in checkpoint["state_dict"]}
    assert prefixes == {"base", "infotok"}
    # Nothing in it names this machine: a run can be moved to another one.
    assert checkpoint["infotok_lit"]["tokenizer"] == "scenes32"


def test_settings_that_resuming_ignores_are_named(whole_runs, tmp_path) -> None:
    said = "optimiser.lr is 0.002 in the config, but resuming goes on with the checkpoint's 0.001.*init_from"
    with pytest.warns(UserWarning, match=said):
        resumed = run(tmp_path, newest(whole_runs[1].folder), module=TinyModule(lr=2e-3, dropout=0.1))
    assert_equal(resumed.state, whole_runs[1].state)


def test_an_unchanged_resume_names_no_setting(whole_runs, tmp_path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tmp_path, newest(whole_runs[1].folder))
    assert not [str(warning.message) for warning in caught if "in the config" in str(warning.message)]


def test_init_from_a_run_takes_its_weights_and_nothing_else(whole_runs, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(SIZES, "scenes32", tiny_config(0.1))
    source = read_run(newest(whole_runs[1].folder))["state_dict"]
    module = HarmonModule(init_from=str(whole_runs[1].folder), objective=TinyModule().objective_config)
    module.configure_model()
    assert_equal({f"base.{name}": value for name, value in module.base.state_dict().items()}, base_of(source))
    assert any(not torch.equal(value, source[name]) for name, value in module.state_dict().items())
    started = run(tmp_path, module=module, steps=1)
    assert started.rows[0][0] == 1
    assert {float(state["step"]) for state in started.state["optimiser"].values()} == {1.0}


def base_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name.startswith("base.")}


def test_init_from_a_run_of_another_size_is_refused(whole_runs) -> None:
    module = HarmonModule(size="scenes32", init_from=str(newest(whole_runs[1].folder)))
    with pytest.raises(CheckpointError, match="another harmon model .*: mar, llm differ") as refusal:
        module.configure_model()
    assert len(str(refusal.value)) < 2000


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(tmp_path) -> None:
    module = TinyModule(terms=())
    module.configure_model()
    module.base.encoder.token_embed.weight.register_hook(
        lambda gradient: gradient * (float("nan") if module.global_step == 3 else 1)
    )
    with pytest.raises(NonFiniteError, match=r"step 3: .*The last good checkpoint is .*last\.ckpt"):
        fit(tmp_path, module=module)
    assert newest(tmp_path).name == "last.ckpt"
    kept = read_run(newest(tmp_path))
    assert kept["global_step"] == 2
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


# The command line


@pytest.fixture
def config(tmp_path) -> Path:
    """A configuration of the tiny model whose runs lie in tmp_path / "runs" / "tiny"."""
    scenes = {"class_path": "infotok_lit.scenes.Scenes", "init_args": {"num_samples": 100}}
    sizes = {"understanding_batch_size": 2, "generation_batch_size": 2, "val_batch_size": 2, "val_samples": 2}
    content = {
        "model": {"class_path": "tiny.TinyModule", "init_args": {"terms": []}},
        "data": {"class_path": "infotok_lit.data.UnifiedDataModule", "init_args": {"train": scenes, **sizes}},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 2,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(tmp_path / "runs"), "name": "tiny"},
            },
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"every_n_train_steps": 2, "save_last": True},
                }
            ],
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_last_goes_on_where_the_newest_run_stopped(config, tmp_path) -> None:
    for more in ([], ["--trainer.max_steps", "3", "--ckpt_path", "last"]):
        assert main(["fit", "--config", str(config), *more]) == 0
    versions = tmp_path / "runs" / "tiny"
    first = versions / "version_0" / "checkpoints" / "last.ckpt"
    saved = yaml.safe_load((versions / "version_1" / "config.yaml").read_text())
    assert saved["ckpt_path"] == str(first)
    assert read_run(first)["global_step"] == 2
    resumed = read_run(newest(versions / "version_1"))
    assert resumed["global_step"] == 3
    assert {float(state["step"]) for state in resumed["optimizer_states"][0]["state"].values()} == {3.0}
    assert resumed["callbacks"]["StepSeed"] == {"seed": 0}


def test_each_run_has_its_own_folder_whatever_the_logger(config, tmp_path) -> None:
    logger = ["--trainer.logger", "fit_tiny.OneFolderLogger", "--trainer.logger.save_dir", str(tmp_path / "all")]
    for more in ([], ["--trainer.max_steps", "3", "--ckpt_path", "last"]):
        assert main(["fit", "--config", str(config), *logger, *more]) == 0
    first, second = sorted((tmp_path / "all" / "project").iterdir())
    for run, steps in ((first, 2), (second, 3)):
        assert {path.name for path in run.iterdir()} == {"checkpoints", "config.yaml", "result.json"}
        assert json.loads((run / "result.json").read_text())["step"] == steps
    assert [path.name for path in (tmp_path / "all").iterdir()] == ["project"]


def test_a_run_that_ended_before_its_first_checkpoint_was_due_goes_on(config, tmp_path, recwarn) -> None:
    """Its end is saved as the end of an epoch, of which endless data has any number."""
    rare = ["--trainer.callbacks=[]", "--checkpoint.every_n_train_steps=50", "--trainer.logger.init_args.name=rare"]
    for options in ([], rare):
        for more in ([], ["--trainer.max_steps", "3", "--ckpt_path", "last"]):
            assert main(["fit", "--config", str(config), *options, *more]) == 0
    runs = tmp_path / "runs"
    usual, resumed = (read_run(newest(runs / name / "version_1")) for name in ("tiny", "rare"))
    assert resumed["global_step"] == 3
    assert all(torch.equal(value, usual["state_dict"][name]) for name, value in resumed["state_dict"].items())
    assert not any("dirpath" in str(warning.message) for warning in recwarn), "each run has its own folder"


def test_last_without_a_checkpoint_is_refused(config, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"last: no checkpoint below {tmp_path}/runs/tiny; start without"):
        main(["fit", "--config", str(config), "--ckpt_path", "last"])


def test_a_damaged_checkpoint_is_refused_before_anything_is_built(config, tmp_path, capsys) -> None:
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(b"PK\x03\x04 cut off")
    assert command_line(["fit", "--config", str(config), "--ckpt_path", str(damaged)]) == 2
    said = capsys.readouterr().err
    assert said == f"infotok_lit: --ckpt_path {damaged} is truncated, or is not a checkpoint of a run\n"


def test_missing_weights_are_one_message(tmp_path, monkeypatch, capsys) -> None:
    """Found while the trainer is running, not while it is configured; still no traceback."""
    monkeypatch.chdir(tmp_path)
    assert command_line(["fit", "--model.init_args.init_from", "absent.pth"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "infotok_lit: no checkpoint at absent.pth"


def test_a_file_cut_off_by_a_kill_is_passed_over(whole_runs, tmp_path) -> None:
    content = newest(whole_runs[1].folder).read_bytes()
    for age, (name, length) in enumerate({"last": len(content) // 2, "step=2": None, "step=1": None}.items()):
        path = tmp_path / "version_0" / f"{name}.ckpt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content[:length])
        os.utime(path, (1e9 - age, 1e9 - age))
    with pytest.warns(UserWarning, match=r"last\.ckpt is passed over"):
        assert newest(tmp_path).name == "step=2.ckpt"


def test_last_looks_where_checkpoints_are_written(whole_runs, tmp_path) -> None:
    """Also where a callback was told to write them, and without a logger."""
    content = newest(whole_runs[1].folder).read_bytes()
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "default_root_dir": tmp_path}
    chosen, usual = tmp_path / "chosen" / "a.ckpt", tmp_path / "checkpoints" / "last.ckpt"
    for path in (chosen, usual):
        path.parent.mkdir()
        path.write_bytes(content)
    callback = pl.callbacks.ModelCheckpoint(dirpath=chosen.parent)
    assert last_checkpoint(pl.Trainer(callbacks=[callback], **quiet), {}) == chosen
    assert last_checkpoint(pl.Trainer(**quiet), {}) == usual
