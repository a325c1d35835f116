"""A number that is not finite is no value: in what is decided, in a search, and beside a control."""

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest
from study.studies import METRICS, STEPS, Bench, known_values

from infotok_lit.study.cells import row_cells
from infotok_lit.study.config import Analysis, Dimension, Search, Study
from infotok_lit.study.record import CellResult, Record
from infotok_lit.study.report import write_report
from infotok_lit.study.table import Summary, controls

NAN = float("nan")
RATE = METRICS["rate"].tag
JUDGED = METRICS | {"rate": replace(METRICS["rate"], better="higher")}
REQUIRED = METRICS | {"rate": replace(METRICS["rate"], better="higher", optional=False)}


def spoil(bench: Bench, variant: str, seed: int, steps: Collection[int] = (STEPS,)) -> None:
    """Have the rate of a run be no number at some steps: `fit` writes null."""
    path: Path = bench.home / "results" / f"{variant}-{seed}.json"
    content = json.loads(path.read_text())
    for row in content["validation"]:
        row[RATE] = None if row["step"] in steps else row[RATE]
    path.write_text(json.dumps(content))


def decided(study: Study, metrics: dict) -> str:
    """The report where the rate of a is to be compared with that of b."""
    plan = Analysis(endpoint=["rate"], contrasts=[("a", "b")])
    return write_report(replace(study, metrics=metrics, analysis=plan)).read_text()


def test_a_metric_that_was_optional_when_it_was_not_finite_does_not_spoil_a_decision(bench) -> None:
    study = bench.study(["a", "b"], seeds=(0, 1, 2))
    spoil(bench, "a", 0)
    assert bench.run(study)
    text = decided(study, REQUIRED)
    mean = sum(known_values("a", seed)[RATE] - known_values("b", seed)[RATE] for seed in (1, 2)) / 2
    (line,) = (line for line in text.splitlines() if line.startswith("| a - b |"))
    count, difference = [cell.strip() for cell in line.split("|")][2:4]
    assert count == "2" and float(difference.split(" ")[0]) == pytest.approx(mean, abs=6e-4)
    assert "nan" not in text


def test_steps_to_the_reference_pass_over_a_validation_that_was_not_finite(bench) -> None:
    study = bench.study(["a", "b"], seeds=(0,))
    bench.prepare("a", 0, known_values("a", 0) | {RATE: 2.0})
    bench.prepare("b", 0, known_values("b", 0) | {RATE: 1.0})
    spoil(bench, "a", 0, steps=(0,))
    assert bench.run(study)
    (line,) = (line for line in decided(study, REQUIRED).splitlines() if line.startswith("| a - b |"))
    assert line.endswith(f"| {STEPS} (1 of 1) |")


def test_a_point_of_a_search_that_is_not_finite_is_not_measured(bench) -> None:
    for value in "pqr":
        bench.prepare(value, 0)
    space = {"stub.variant": Dimension(choices=list("pqr"))}
    study = bench.study([], seeds=(0,), search=Search(space, ["answers"], sampler="grid"))
    spoil(bench, "p", 0)
    assert bench.run(study)
    edited = replace(study, metrics=REQUIRED, search=Search(space, ["answers", "rate"], sampler="grid"))
    assert not bench.run(edited)
    text = write_report(edited).read_text()
    assert "2 points measured on 1 seed(s), 3 started" in text


@pytest.mark.parametrize(
    ("of_a", "of_p", "said"),
    [
        (1.0, 1.0, "equals a"),
        (NAN, NAN, "equals a"),
        (1.0, NAN, "differs by up to inf"),
        (NAN, 1.0, "differs by up to inf"),
    ],
)
def test_a_control_that_is_not_finite_where_its_row_is_does_not_equal_it(bench, of_a, of_p, said) -> None:
    study = bench.study(["a", "p"], seeds=(0,), metrics=JUDGED)
    study = replace(study, rows={**study.rows, "p": replace(study.rows["p"], control_of="a")})
    rates = {"a": of_a, "p": of_p}
    results = [
        CellResult(cell, Record(state="finished"), {"answers": 0.5, "rate": rates[cell.variant]}, {}, {})
        for cell in row_cells(study)
    ]
    assert controls(Summary(study, results)) == [f"Control: p {said}."]
