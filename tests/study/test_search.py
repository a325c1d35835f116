"""Sweeps: the points are those of the space, each is measured once, and the front is that of what was measured."""

import csv
import itertools
import json
import logging
import multiprocessing
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from study.studies import METRICS, Bench, known_values

from infotok_lit.study import store
from infotok_lit.study.config import Dimension, Row, Search, Study
from infotok_lit.study.record import read_record
from infotok_lit.study.report import write_report
from infotok_lit.study.run import is_complete
from infotok_lit.study.search import known_points, pareto_front, planned_points, search_name

SPACE = {
    "model.lr": Dimension(low=1e-4, high=1e-1, log=True),
    "model.width": Dimension(low=1, high=3, integer=True),
    "schedule": Dimension(
        variants={
            "constant": Row(),
            "warmup": Row(overrides={"model.multiplier": "warmup", "model.warmup_steps": 5}),
        }
    ),
}
CHOICES = {"model.lr": Dimension(choices=[0.1, 0.2, None]), "model.kind": Dimension(choices=["mlp", "linear"])}


def swept(
    bench: Bench, space: dict, variant: str = "x", seeds: tuple[int, ...] = (0, 1), rows: Sequence[str] = (), **search
) -> Study:
    """A study with some rows, and a search whose runs all log what the variant's do."""
    for seed in seeds:
        bench.prepare(variant, seed)
    row = Row(overrides={"stub.variant": variant})
    return bench.study(list(rows), seeds, search=Search(space, ["answers", "loss"], row=row, **search))


def trials(study: Study) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=search_name(study), storage=f"sqlite:///{study.out}/study.db").trials


def test_a_grid_is_every_combination_once(bench) -> None:
    study = swept(bench, CHOICES, sampler="grid")
    assert bench.run(study, workers=2)
    points = [tuple(job.params[name] for name in CHOICES) for job in known_points(study)]
    assert Counter(points) == Counter(itertools.product([0.1, 0.2, None], ["mlp", "linear"]))
    assert set(bench.starts().values()) == {1} and len(bench.starts()) == 12
    assert len(planned_points(swept(bench, CHOICES, sampler="grid", trials=4))) == 4


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_one_call_runs_the_rows_and_then_the_search(bench, sampler) -> None:
    study = swept(bench, {"model.lr": Dimension(choices=[0.1, 0.2])}, rows=["plain", "a"], sampler=sampler, trials=2)
    assert bench.run(study)
    assert len(bench.starts()) == 4 + 2 * len(known_points(study)) > 4


def test_random_points_follow_from_the_seed_and_more_of_them_go_on(bench) -> None:
    def points(count: int, seed: int) -> list[dict]:
        study = swept(bench, SPACE, sampler="random", trials=count, seed=seed)
        return [job.params for job in planned_points(study)]

    assert points(12, seed=3)[:6] == points(6, seed=3) != points(6, seed=4)
    for point in points(12, seed=3):
        assert 1e-4 <= point["model.lr"] <= 1e-1 and point["model.width"] in (1, 2, 3)
        assert point["schedule"] in ("constant", "warmup")


def test_a_points_settings_reach_the_command(bench) -> None:
    study = swept(bench, SPACE, sampler="random", trials=8)
    for job in planned_points(study):
        for cell, seed in zip(job.cells, (0, 1), strict=True):
            assert f"--model.lr={job.params['model.lr']}" in cell.arguments
            assert f"--model.width={job.params['model.width']}" in cell.arguments
            assert ("--model.multiplier=warmup" in cell.arguments) == (job.params["schedule"] == "warmup")
            assert not any(argument.startswith("--schedule") for argument in cell.arguments)
            assert f"--seed_everything={seed}" in cell.arguments


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_calls_at_the_same_time_measure_so_many_points_and_no_more(bench, sampler, monkeypatch) -> None:
    monkeypatch.setattr(store, "GRACE_SECONDS", 300)  # Nobody dies here, however slow the machine is.
    study = swept(bench, SPACE, seeds=(0,), sampler=sampler, trials=8)
    fork = multiprocessing.get_context("fork")
    calls = [fork.Process(target=bench.run, args=(study, workers), daemon=True) for workers in (2, 1)]
    for call in calls:
        call.start()
    for call in calls:
        call.join(200)
    assert [call.exitcode for call in calls] == [0, 0]
    complete = [trial for trial in trials(study) if trial.state == optuna.trial.TrialState.COMPLETE]
    assert len(complete) == 8 == len(trials(study)) - len([trial for trial in trials(study) if not trial.user_attrs])
    assert set(bench.starts().values()) == {1}
    assert {json.dumps(trial.params, sort_keys=True) for trial in complete} == {
        json.dumps(job.params, sort_keys=True) for job in known_points(study)
    }
    assert bench.run(study) and len(bench.starts()) == len(known_points(study))


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_optuna_is_told_the_means_over_seeds(bench, sampler) -> None:
    study = swept(bench, SPACE, variant="z", seeds=(0, 1, 2), sampler=sampler, trials=3)
    for seed in (0, 1, 2):
        bench.prepare("z", seed, {METRICS[name].tag: [0.0, 0.5, 4.0][seed] for name in ("answers", "loss")})
    bench.run(study)
    assert all(trial.values == [1.5, 1.5] for trial in trials(study))


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_a_failed_point_is_tried_by_the_next_call(bench, sampler) -> None:
    study = swept(bench, CHOICES, variant="fails", seeds=(0,), sampler=sampler, trials=3)
    assert not bench.run(study)
    points = {job.key for job in known_points(study)}
    (bench.home / "mended").touch()
    assert bench.run(study)
    assert {job.key for job in known_points(study)} == points
    assert all(read_record(cell.folder).state == "finished" for job in known_points(study) for cell in job.cells)


@pytest.mark.parametrize(("sampler", "space"), [("grid", CHOICES), ("random", SPACE)])
def test_a_planned_search_is_complete_with_all_of_its_points(bench, sampler, space) -> None:
    study = swept(bench, space, seeds=(0,), sampler=sampler, trials=4)
    assert not is_complete(study), "nothing was begun"
    assert bench.run(study) and is_complete(study)
    assert not is_complete(swept(bench, space, seeds=(0,), sampler=sampler, trials=6))


@pytest.mark.parametrize("change", [{"better": "lower"}, {"tag": METRICS["loss"].tag}])
def test_an_objective_that_is_another_under_its_name_is_another_search(bench, change) -> None:
    """Optuna keeps the direction that it began with, and what it was told."""
    study = swept(bench, CHOICES, seeds=(0,), sampler="tpe", trials=2)
    assert bench.run(study)
    edited = replace(study, metrics=METRICS | {"answers": replace(METRICS["answers"], **change)})
    assert bench.run(edited)
    values = known_values("x", 0)
    told = optuna.load_study(study_name=search_name(edited), storage=f"sqlite:///{study.out}/study.db")
    assert told.directions[0].name == ("MINIMIZE" if "better" in change else "MAXIMIZE")
    wanted = [values[edited.metrics[name].tag] for name in ("answers", "loss")]
    assert told.trials and all(trial.values == wanted for trial in told.trials)
    assert {job.key for job in known_points(study)} == {job.key for job in known_points(edited)}
    assert set(bench.starts().values()) == {1}


def test_a_sampler_that_knows_only_few_points_comes_to_an_end(bench) -> None:
    study = swept(bench, {"model.kind": Dimension(choices=["mlp", "linear"])}, seeds=(0,), sampler="tpe", trials=9)
    assert bench.run(study, workers=3)
    assert set(bench.starts().values()) == {1} and len(bench.starts()) <= 2


def test_tables_and_the_front_are_those_of_the_results(bench, drawn, monkeypatch, caplog) -> None:
    """And Optuna, which says what it does until it is told not to, has no part in them."""
    study = swept(bench, CHOICES, seeds=(0, 1), sampler="grid")
    bench.run(study)
    monkeypatch.setattr(logging.getLogger("optuna"), "propagate", True)
    caplog.set_level(logging.INFO, "optuna")
    rng = np.random.default_rng(5)
    expected = {}
    for job in known_points(study):
        values = rng.normal(size=(2, 2))
        for cell, (answers, loss) in zip(job.cells, values, strict=True):
            bench.prepare("again", cell.seed, {METRICS["answers"].tag: answers, METRICS["loss"].tag: loss})
            (bench.home / "results" / f"again-{cell.seed}.json").rename(cell.run_folder / "result.json")
        expected[job.key] = values.mean(0)
    out = write_report(study).parent
    lines = read(out / "points.csv")
    assert {line["folder"]: (float(line["answers"]), float(line["loss"])) for line in lines} == {
        key: pytest.approx(tuple(means)) for key, means in expected.items()
    }
    keys = list(expected)
    front = {keys[i] for i in brute_force(np.array(list(expected.values())), ["maximize", "minimize"])}
    assert {line["folder"] for line in lines if line["on_front"] == "True"} == front
    assert {line["folder"] for line in read(out / "front.csv")} == front
    assert (out / "front.png").stat().st_size > 5000 and (out / "dimensions.png").stat().st_size > 5000
    text = (out / "report.md").read_text()
    assert all(f"| {Path(key).name} |" in text for key in front) and text.count("\n| ") == len(front) + 2
    assert not caplog.messages


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_finished_points_outlive_the_storage(bench, sampler) -> None:
    """Optuna is told of them again, so a sampler goes on from what they measured."""
    study = swept(bench, CHOICES, seeds=(0,), sampler=sampler, trials=3)
    bench.run(study)
    points = {job.key for job in known_points(study)}
    Path(study.out, "study.db").write_bytes(bytes(range(256)) * 50)
    assert bench.run(study)
    assert {job.key for job in known_points(study)} >= points and set(bench.starts().values()) == {1}
    assert points <= {trial.user_attrs["job"] for trial in trials(study) if trial.values}


def brute_force(values: np.ndarray, directions: list[str]) -> set[int]:
    signed = values * [1 if direction == "maximize" else -1 for direction in directions]
    return {
        i for i, point in enumerate(signed) if not any(all(other >= point) and any(other > point) for other in signed)
    }


@pytest.mark.parametrize(
    "directions",
    [["maximize"], ["minimize"], ["maximize", "maximize"], ["maximize", "minimize"], ["minimize"] * 3],
)
@pytest.mark.parametrize("levels", [5, 1000])
def test_no_point_dominates_the_front(directions, levels) -> None:
    """Few levels make ties and equal points."""
    for seed in range(20):
        values = np.random.default_rng(seed).integers(0, levels, size=(15, len(directions))).astype(float)
        assert pareto_front(values.tolist(), directions) == brute_force(values, directions)


def test_without_points_there_is_no_front() -> None:
    assert pareto_front([], ["maximize", "minimize"]) == set() == pareto_front([], ["maximize"])


@pytest.mark.parametrize("content", ["", "5", "[]", '{"model.lr": "much", "model.kind": "mlp"}', "\0\0"])
def test_a_damaged_note_of_a_point_stops_nothing(bench, content) -> None:
    study = swept(bench, CHOICES, seeds=(0,), sampler="grid", trials=2)
    bench.run(study)
    job = known_points(study)[0]
    Path(study.out, job.key, "point.json").write_text(content)
    assert len(known_points(study)) == 1
    assert bench.run(study) and set(bench.starts().values()) == {1}
