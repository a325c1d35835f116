"""Cells are shared out, skipped, tried again and resumed: once each, whoever dies and whoever comes along."""

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from study.studies import METRICS, start, states, wait_until

from infotok_lit.errors import SettingsError
from infotok_lit.sharded_checkpoints import INDEX, META
from infotok_lit.study import store
from infotok_lit.study.cells import row_cells
from infotok_lit.study.config import Metric
from infotok_lit.study.record import LOG_FILE, Record, read_record, try_lock
from infotok_lit.study.run import is_complete


def test_every_cell_runs_once_and_a_second_call_runs_nothing(bench) -> None:
    study = bench.study(["plain", "a", "b"], seeds=(0, 1, 2))
    assert bench.run(study, workers=2)
    assert set(bench.starts().values()) == {1} and len(bench.starts()) == 9
    assert bench.run(study, workers=2)
    assert len(bench.notes()) == 18


def test_a_row_without_training_is_validated(bench) -> None:
    study = bench.study(["plain", "a"], seeds=(0,))
    assert bench.run(study)
    commands = {cell.variant: read_record(cell.folder).command for cell in row_cells(study)}
    assert [commands[name][len(bench.prefix)] for name in ("plain", "a")] == ["validate", "fit"]


def test_new_rows_and_seeds_and_changed_rows_run_and_nothing_else(bench) -> None:
    bench.run(bench.study(["plain", "a"]))
    bench.run(bench.study(["plain", "a", "b"], seeds=(0, 1, 2)))
    assert set(bench.starts().values()) == {1} and len(bench.starts()) == 9
    study = bench.study(["plain", "a", "b"], seeds=(0, 1, 2))
    changed = replace(study.rows["a"], overrides={**study.rows["a"].overrides, "model.lr": 0.2})
    bench.run(replace(study, rows={**study.rows, "a": changed}))
    assert bench.starts() == {(v, s): 2 if v == "a" else 1 for v in ("plain", "a", "b") for s in (0, 1, 2)}


def test_a_failing_cell_is_reported_and_stops_nothing_and_is_tried_by_the_next_call(bench, capsys) -> None:
    study = bench.study(["fails", "a"])
    assert not bench.run(study)
    assert states(study) == {("fails", 0): "failed", ("a", 0): "finished", ("fails", 1): "failed", ("a", 1): "finished"}
    shown = capsys.readouterr().err
    failed = row_cells(study)[0].folder
    assert not is_complete(study)
    assert "something broke" in shown and "fit ended with exit status 3" in shown
    assert str(failed / LOG_FILE) in shown.replace("\n", "")
    (bench.home / "mended").touch()
    assert bench.run(study) and is_complete(study)
    assert bench.starts() == {("fails", 0): 2, ("a", 0): 1, ("fails", 1): 2, ("a", 1): 1}
    assert [attempt.outcome for attempt in read_record(failed).attempts] == ["exit status 3", "exit status 0"]


@pytest.mark.parametrize("values", [{METRICS["loss"].tag: 1.0}, {m.tag: float("nan") for m in METRICS.values()}])
def test_a_run_that_ends_well_without_its_metrics_has_failed(bench, values) -> None:
    study = bench.study(["a"], seeds=(0,))
    bench.prepare("a", 0, values)
    assert not bench.run(study)
    assert "answers/overall" in read_record(row_cells(study)[0].folder).reason


def test_a_run_that_failed_by_a_misspelt_metric_is_taken_when_that_is_mended(bench) -> None:
    study = bench.study(["a"], seeds=(0,))
    misspelt = METRICS | {"answers": Metric("val/understanding/answer/overall")}
    assert not bench.run(replace(study, metrics=misspelt)) and states(study) == {("a", 0): "failed"}
    assert bench.run(study) and bench.starts() == {("a", 0): 1}
    assert read_record(row_cells(study)[0].folder).reason == ""


def test_killed_with_its_runs_a_study_goes_on_where_it_was(bench) -> None:
    study = bench.study(["a", "waits", "b"], seeds=(0,))
    call = start(bench, study)
    wait_until(lambda: ("waits", 0) in bench.starts())
    run = int(bench.notes()[-1][2])
    os.kill(call.pid, signal.SIGKILL)
    call.join()
    os.kill(run, signal.SIGKILL)
    assert states(study)["waits", 0] == "running", "nobody could tidy up"
    assert bench.run(study)
    assert bench.starts() == {("a", 0): 1, ("waits", 0): 2, ("b", 0): 1}
    assert [note[3] for note in bench.notes() if note[0] == "start" and bench.cell(note[1])[0] == "waits"] == [
        "fresh",
        "resumed",
    ]


def test_a_run_that_outlives_its_killed_study_is_waited_for(bench) -> None:
    """Two processes in one folder would spoil each other's files."""
    study = bench.study(["waits", "b"], seeds=(0,))
    call = start(bench, study)
    wait_until(lambda: ("waits", 0) in bench.starts())
    os.kill(call.pid, signal.SIGKILL)
    call.join()
    assert try_lock(row_cells(study)[0].folder) is None, "the run has inherited the lock"
    second = start(bench, study)
    wait_until(lambda: ["end", "b"] in [[note[0], bench.cell(note[1])[0]] for note in bench.notes()])
    time.sleep(0.3)
    assert second.is_alive() and bench.starts()["waits", 0] == 1
    (bench.home / "gate").touch()
    second.join(300)
    assert second.exitcode == 0 and states(study)["waits", 0] == "finished"
    assert not bench.overlaps()


def test_interrupted_politely_the_runs_end_too(bench) -> None:
    study = bench.study(["waits", "b"], seeds=(0,))
    call = start(bench, study)
    wait_until(lambda: ("waits", 0) in bench.starts())
    run = int(bench.notes()[-1][2])
    os.kill(call.pid, signal.SIGINT)
    call.join(300)
    assert call.exitcode not in (0, None)
    assert states(study) == {("waits", 0): "interrupted", ("b", 0): "waiting"}
    with pytest.raises(ProcessLookupError):
        os.kill(run, 0)
    # It may have been stopped before its first checkpoint, and then begins anew.
    (bench.home / "gate").touch()
    assert bench.run(study)
    assert states(study) == {("waits", 0): "finished", ("b", 0): "finished"}


def test_a_resumed_run_that_has_nothing_left_to_validate_is_begun_anew(bench) -> None:
    study = bench.study(["dies_late"], seeds=(0,))
    assert not bench.run(study)
    assert bench.run(study)
    attempts = read_record(row_cells(study)[0].folder).attempts
    assert [attempt.resumed for attempt in attempts] == [False, True, False]


def test_a_checkpoint_that_was_cut_off_is_not_resumed_from(bench) -> None:
    study = bench.study(["waits"], seeds=(0,))
    (bench.home / "gate").touch()
    cell = row_cells(study)[0]
    checkpoints = cell.run_folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "last.ckpt").write_bytes(b"PK\x03\x04 and no more")
    Record(state="interrupted").write(cell.folder)
    assert bench.run(study)
    assert bench.notes()[0][3] == "fresh"


@pytest.mark.parametrize(("whole", "begun"), [(True, "resumed"), (False, "fresh")])
def test_a_sharded_checkpoint_is_resumed_from_if_it_was_written_to_its_end(bench, whole, begun) -> None:
    study = bench.study(["waits"], seeds=(0,))
    cell = row_cells(study)[0]
    checkpoint = cell.run_folder / "checkpoints" / "last.ckpt"
    checkpoint.mkdir(parents=True)
    for name in (INDEX, META)[: 1 + whole]:
        (checkpoint / name).touch()
    Record(state="interrupted").write(cell.folder)
    (bench.home / "gate").touch()
    assert bench.run(study)
    assert bench.notes()[0][3] == begun


def test_a_run_that_finished_after_its_killed_study_is_not_run_again(bench) -> None:
    """Nobody was there to write that it has finished, but its own result.json says so."""
    study = bench.study(["waits"], seeds=(0,))
    call = start(bench, study)
    wait_until(lambda: ("waits", 0) in bench.starts())
    os.kill(call.pid, signal.SIGKILL)
    call.join()
    (bench.home / "gate").touch()
    wait_until(lambda: bench.notes()[-1][0] == "end")
    assert states(study) == {("waits", 0): "running"}
    assert bench.run(study) and states(study) == {("waits", 0): "finished"}
    assert bench.starts() == {("waits", 0): 1}


def test_calls_that_start_at_once_share_the_cells(bench) -> None:
    study = bench.study(["plain", "a", "b", "c"], seeds=(0, 1, 2, 3))
    calls = [start(bench, study, workers) for workers in (1, 2, 1)]
    for call in calls:
        call.join(300)
    assert [call.exitcode for call in calls] == [0, 0, 0]
    assert set(bench.starts().values()) == {1} and len(bench.starts()) == 16
    assert set(states(study).values()) == {"finished"}


def test_a_call_takes_over_what_a_killed_one_leaves(bench) -> None:
    study = bench.study(["waits", "a", "b"], seeds=(0, 1), storage=f"sqlite:///{bench.home}/elsewhere.db")
    first = start(bench, study)
    wait_until(lambda: ("waits", 0) in bench.starts())
    second = start(bench, study)
    wait_until(lambda: ("waits", 1) in bench.starts())
    run = next(int(note[2]) for note in bench.notes() if bench.cell(note[1]) == ("waits", 0))
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    os.kill(run, signal.SIGKILL)
    (bench.home / "gate").touch()
    second.join(300)
    assert second.exitcode == 0
    assert set(states(study).values()) == {"finished"}
    assert {cell: count for cell, count in bench.starts().items() if count > 1} == {("waits", 0): 2}
    assert not [line for line in bench.notes() if line[0] == "end" and int(line[2]) == run]


def test_killed_at_any_moment_no_cell_is_ever_run_by_two_or_run_again(bench) -> None:
    """Calls are killed at random moments; their runs go on, so each cell that was started has one whole run."""
    rng = random.Random()
    study = bench.study(["plain", "a", "b", "c"], seeds=(0, 1))
    slow = {name: replace(row, overrides={**row.overrides, "stub.seconds": 0.3}) for name, row in study.rows.items()}
    study = replace(study, rows=slow)
    for _ in range(3):
        call = start(bench, study, workers=2)
        time.sleep(rng.uniform(0.3, 1.2))
        os.kill(call.pid, signal.SIGKILL)
        call.join()
    assert bench.run(study, workers=2)
    assert not bench.overlaps()
    ended = Counter(bench.cell(note[1]) for note in bench.notes() if note[0] == "end")
    assert set(ended.values()) == {1} and len(ended) == 8


def test_a_killed_run_fails_its_cell_and_nothing_else(bench) -> None:
    study = bench.study(["waits", "a"], seeds=(0,))
    call = start(bench, study)
    wait_until(lambda: ("waits", 0) in bench.starts())
    os.kill(int(bench.notes()[-1][2]), signal.SIGKILL)
    call.join(300)
    assert call.exitcode == 0 and states(study) == {("waits", 0): "failed", ("a", 0): "finished"}
    assert read_record(row_cells(study)[0].folder).reason == "fit ended with signal SIGKILL"
    assert bench.run(study)


def test_a_worker_that_was_taken_for_dead_goes_on(bench, monkeypatch) -> None:
    """A machine that slept: its heartbeats stopped, its trial was queued again, and yet its run goes on."""
    monkeypatch.setattr(store.Storage, "record_heartbeat", once(store.Storage.record_heartbeat))
    study = bench.study(["waits", "a"], seeds=(0,))
    first = start(bench, study)
    wait_until(lambda: ("waits", 0) in bench.starts())
    time.sleep(3.5)
    second = start(bench, study)
    wait_until(lambda: states(study)["a", 0] == "finished")
    time.sleep(1)
    (bench.home / "gate").touch()
    for call in (first, second):
        call.join(300)
        assert call.exitcode == 0
    assert bench.starts() == {("waits", 0): 1, ("a", 0): 1}


def once(method: Callable) -> Callable:
    """A method that does nothing from its second call on."""
    calls = []

    def called(*arguments) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            method(*arguments)

    return called


def test_a_finished_cell_whose_files_were_deleted_runs_again(bench) -> None:
    study = bench.study(["a", "b"], seeds=(0,))
    bench.run(study)
    shutil.rmtree(row_cells(study)[0].folder)
    assert bench.run(study)
    assert bench.starts() == {("a", 0): 2, ("b", 0): 1}


def test_finished_cells_outlive_the_storage(bench) -> None:
    study = bench.study(["a", "b"], seeds=(0,))
    bench.run(study)
    (bench.home / "out" / "study.db").unlink()
    assert bench.run(study)
    assert set(bench.starts().values()) == {1}


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("out/journal.log", "journal files are not used any more"),
        ("nodatabase://host/x", "cannot be opened"),
        ("sqlite:////nowhere/at/all/x.db", "cannot be opened"),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_message(bench, storage, said) -> None:
    with pytest.raises(SettingsError, match=said):
        bench.run(bench.study(["a"], storage=storage))


@pytest.mark.parametrize(
    ("workers", "threads", "expected"), [(2, None, "1"), (2, 3, "3"), (1, 2, "2"), (1, None, "inherited")]
)
def test_runs_get_their_share_of_the_machine(bench, monkeypatch, workers, threads, expected) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "inherited")
    bench.run(bench.study(["a"], seeds=(0,)), workers=workers, threads=threads)
    assert bench.notes()[0][4] == expected


def test_workers_take_turns_in_the_gpus() -> None:
    from infotok_lit.study.launch import Resources

    shares = Resources(workers=3, gpus=["0", "1"])
    assert [shares.environment(worker)["CUDA_VISIBLE_DEVICES"] for worker in range(3)] == ["0", "1", "0"]


def test_checkpoints_go_where_that_is_wished(bench) -> None:
    study = bench.study(["waits"], seeds=(0, 1))
    (bench.home / "gate").touch()
    kept = replace(study, seeds=[0])
    bench.run(kept)
    bench.run(replace(study, keep_checkpoints=False))
    left = [any(cell.run_folder.rglob("*.ckpt")) for cell in row_cells(study)]
    assert left == [True, False]


def test_a_cell_can_be_run_again_by_hand(bench) -> None:
    study = bench.study(["a"], seeds=(3,))
    bench.run(study, threads=2)
    cell = row_cells(study)[0]
    assert os.system(f"sh {cell.folder / 'command.sh'}") == 0
    first, _, second, _ = bench.notes()
    assert (first[1], first[4]) == (second[1], second[4])
