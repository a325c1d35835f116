"""`--ckpt_path`: a run goes on as itself and as no other, and what differs is named."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from infotok_lit.checkpoints import CheckpointError, newest_first, read_run
from infotok_lit.cli import main
from infotok_lit.commands.fit import InfoTokCLI, RunRecord
from infotok_lit.modules.run_checkpoint import WholeCheckpoints, remove_leftovers

TINY = [
    "--config=harmon/scenes32",
    "--model.init_args.init_from=null",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=2",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.callbacks=[]",
    "--checkpoint.every_n_train_steps=1",
    "--data.init_args.understanding_batch_size=2",
    "--data.init_args.generation_batch_size=2",
]
PLAIN = "--config=objective/finetune"
RUNS = Path("runs", "quickstart")


def fit(*arguments: str) -> None:
    InfoTokCLI(["fit", *TINY, *arguments])


def saved(version: int) -> Path:
    return RUNS / f"version_{version}" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit(PLAIN)
    return folder


@pytest.fixture
def here(plain_run, tmp_path, monkeypatch) -> Path:
    """A folder with a run of two steps of plain fine-tuning, of seed 0."""
    shutil.copytree(plain_run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_last_goes_on_with_more_steps_and_other_logging(here) -> None:
    fit(
        PLAIN,
        "--ckpt_path=last",
        "--trainer.max_steps=3",
        "--trainer.log_every_n_steps=1",
        "--data.init_args.val_samples=7",
    )
    assert read_run(saved(1))["global_step"] == 3
    assert yaml.safe_load((RUNS / "version_1" / "config.yaml").read_text())["ckpt_path"] == str(saved(0))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], 'model.init_args.objective.terms is ["alignment"] here, and [] in the run'),
        ([PLAIN, "--seed_everything=1"], "seed_everything is 1 here, and 0 in the run"),
        ([PLAIN, "--data.init_args.train.init_args.texture=0.5"], "data.init_args.train.init_args.texture is 0.5 here"),
        (
            [PLAIN, "--model.init_args.task_weights.generation=2"],
            "task_weights.generation is 2.0 here, and 1.0 in the run",
        ),
        ([PLAIN, "--model.init_args.freeze=[llm.]"], 'model.init_args.freeze is ["llm."] here, and [] in the run'),
    ],
)
def test_last_takes_no_run_of_another_configuration(here, capsys, arguments, named) -> None:
    assert main(["fit", *TINY, *arguments, "--ckpt_path=last"]) == 2
    said = capsys.readouterr().err
    assert "no earlier run has this configuration" in said and named in said
    assert f"--ckpt_path {saved(0)}" in said and "model.init_args.init_from" in said
    assert not (here / RUNS / "version_1").exists()


def test_each_of_two_runs_of_one_name_goes_on_as_itself(here) -> None:
    """As the rows of an ablation do that share a logger's name; the other one is the newer."""
    fit("--seed_everything=1", PLAIN)
    fit(PLAIN, "--ckpt_path=last", "--trainer.max_steps=3")
    assert yaml.safe_load((RUNS / "version_2" / "config.yaml").read_text())["ckpt_path"].endswith(str(saved(0)))


def test_another_configuration_is_warned_of_where_the_path_is_named(here) -> None:
    with pytest.warns(UserWarning, match="seed_everything is 1 here, and 0 in the run"):
        fit(PLAIN, "--seed_everything=1", f"--ckpt_path={saved(0)}", "--trainer.max_steps=3")
    assert read_run(saved(1))["global_step"] == 3


@pytest.mark.filterwarnings("ignore:.*is not the run's")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config=objective/c"], 'model.init_args.objective.terms is ["compactness"] here, and [] in the run'),
        ([PLAIN, "--model.init_args.freeze=[llm.]"], 'model.init_args.freeze is ["llm."] here, and [] in the run'),
    ],
)
def test_state_that_does_not_fit_is_one_message(here, arguments, named) -> None:
    with pytest.raises(CheckpointError, match="does not fit this configuration") as refused:
        fit(*arguments, f"--ckpt_path={saved(0)}", "--trainer.max_steps=3")
    assert named in str(refused.value) and "model.init_args.init_from" in str(refused.value)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_the_folder_of_a_finished_run_is_no_other_runs(here, capsys, command) -> None:
    before = contents(RUNS)
    arguments = [argument for argument in TINY if not argument.startswith("--checkpoint")]
    assert main([command, *arguments, PLAIN, "--trainer.logger.init_args.version=version_0"]) == 2
    assert "runs/quickstart/version_0 holds a finished run" in capsys.readouterr().err
    assert contents(RUNS) == before


def test_a_run_that_did_not_finish_begins_anew_in_its_folder(here) -> None:
    """As one does that was killed before its first checkpoint."""
    result = RUNS / "version_0" / "result.json"
    shutil.rmtree(saved(0).parent)
    result.write_text(result.read_text().replace('"state": "finished"', '"state": "running"'))
    fit(PLAIN, "--trainer.logger.init_args.version=version_0")
    assert '"state": "finished"' in result.read_text()


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(here) -> None:
    fit(PLAIN, "--checkpoint.save_top_k=-1")
    content = saved(1).read_bytes()
    saved(1).write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"version_1/checkpoints/last\.ckpt is passed over"):
        fit(PLAIN, "--ckpt_path=last", "--trainer.max_steps=3", "--checkpoint.save_top_k=-1")
    resumed = yaml.safe_load((RUNS / "version_2" / "config.yaml").read_text())["ckpt_path"]
    assert Path(resumed).parent.parent.name == "version_1" and read_run(saved(2))["global_step"] == 3


def test_sigterm_saves_and_exits_with_143(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def end_at_three(self: RunRecord, trainer, *_: object) -> None:
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunRecord, "on_train_batch_end", end_at_three)
    export = "--trainer.callbacks=[{class_path: infotok_lit.callbacks.ExportInference}]"
    rare = "--checkpoint.every_n_train_steps=50"
    with pytest.raises(SystemExit) as ended:
        fit(PLAIN, "--trainer.max_steps=9", export, rare)
    assert ended.value.code == 143
    assert read_run(saved(0))["global_step"] == 3
    assert not (RUNS / "version_0" / "export").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    fit(PLAIN, "--trainer.max_steps=4", "--ckpt_path=last", rare)
    assert read_run(saved(1))["global_step"] == 4


def test_nothing_is_saved_within_a_step_of_several_batches(tmp_path, monkeypatch) -> None:
    """The gradients of its first batches would be lost to whoever goes on from there."""
    monkeypatch.chdir(tmp_path)
    steps = ("--trainer.accumulate_grad_batches=2", "--checkpoint.every_n_train_steps=2", "--checkpoint.save_top_k=-1")

    def end_in_the_first_batch_of_step_three(self: RunRecord, trainer, *arguments: object) -> None:
        if arguments[-1] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunRecord, "on_train_batch_end", end_in_the_first_batch_of_step_three)
    with pytest.raises(SystemExit):
        fit(PLAIN, "--trainer.max_steps=9", *steps)
    ended = read_run(saved(0))
    assert (ended["global_step"], ended["UnifiedDataModule"]["batches"]) == (3, 6)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    fit(PLAIN, "--trainer.max_steps=4", f"--ckpt_path={saved(0).with_name('epoch=0-step=2.ckpt')}", *steps)
    assert {path.name for path in saved(1).parent.iterdir()} == {"epoch=0-step=4.ckpt", "last.ckpt"}


# Saving


def test_what_killed_saves_left_is_removed_and_nothing_else(tmp_path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = tmp_path / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    host = socket.gethostname()
    ours = folder / f".last.ckpt.{host}.{dead.pid}.part"
    others = [
        folder / f".last.ckpt.{host}.{os.getpid()}.part",
        folder / f".last.ckpt.another-{host}.{dead.pid}.part",
        folder / "last.ckpt",
        folder / ".part",
        tmp_path / "notes.part",
    ]
    for path in (ours, *others):
        path.write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert not ours.exists() and all(path.exists() for path in others)


def test_a_save_that_fails_leaves_the_checkpoint_that_was_there(tmp_path, monkeypatch) -> None:
    path = tmp_path / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"step": 1}, path)

    def fill_up(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", fill_up)
    with pytest.raises(OSError, match="No space left"):
        WholeCheckpoints().save_checkpoint({"step": 2}, path)
    assert WholeCheckpoints().load_checkpoint(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_that_was_written_to_a_url_is_not_looked_for_among_the_files(tmp_path) -> None:
    url = f"file://{tmp_path}/last.ckpt"
    WholeCheckpoints().save_checkpoint({"step": 1}, url)
    assert WholeCheckpoints().load_checkpoint(tmp_path / "last.ckpt") == {"step": 1}
    with pytest.raises(CheckpointError, match=r"file://.* is a URL, and checkpoints are read from files only"):
        WholeCheckpoints().load_checkpoint(url)


def test_last_stands_before_the_checkpoint_that_it_links_to(tmp_path) -> None:
    older, newer, last = (tmp_path / f"{name}.ckpt" for name in ("step=1", "step=2", "last"))
    for time, path in enumerate((older, newer)):
        path.write_bytes(b"")
        os.utime(path, (time, time))
    last.hardlink_to(newer)
    assert newest_first([newer, older, last]) == newest_first([last, newer, older]) == [last, newer, older]
