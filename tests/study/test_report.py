"""The tables say what the event files say, computed again here by other means."""

import csv
import json
import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from study.studies import METRICS, Bench, known_values, write_events

from infotok_lit.study.cells import row_cells
from infotok_lit.study.events import read_curves
from infotok_lit.study.report import write_report

ROWS, SEEDS = ["plain", "a", "b"], (0, 1, 2)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def truth(row: str, metric: str) -> np.ndarray:
    return np.array([known_values(row, seed)[METRICS[metric].tag] for seed in SEEDS])


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The folder of a study that is done and reported."""
    bench = Bench(tmp_path_factory.mktemp("done"))
    study = bench.study(ROWS, SEEDS, references=["plain", "a"], confidence=0.9)
    bench.run(study, workers=2)
    return write_report(study).parent


def test_every_number_of_the_table_follows_from_what_was_logged(out) -> None:
    lines = {(line["row"], line["metric"]): line for line in read(out / "table.csv")}
    assert set(lines) == {(row, metric) for row in ROWS for metric in METRICS}
    for (row, metric), line in lines.items():
        if (row, metric) == ("plain", "rate"):
            assert not any(value for name, value in line.items() if name not in ("row", "metric"))
            continue
        values = truth(row, metric)
        check(line, "", values)
        for reference in ("plain", "a"):
            if reference == row or (reference, metric) == ("plain", "rate"):
                assert line[f"minus_{reference}_mean"] == ""
                continue
            other = truth(reference, metric)
            check(line, f"minus_{reference}_", values - other)
            assert float(line[f"minus_{reference}_p"]) == pytest.approx(stats.ttest_rel(values, other).pvalue)


def check(line: dict[str, str], prefix: str, values: np.ndarray) -> None:
    margin = stats.t.ppf(0.95, 2) * values.std(ddof=1) / math.sqrt(3)
    expected = {
        "n": 3,
        "mean": values.mean(),
        "sd": values.std(ddof=1),
        "ci_low": values.mean() - margin,
        "ci_high": values.mean() + margin,
    }
    assert {name: float(line[prefix + name]) for name in expected} == pytest.approx(expected)


def test_the_cells_are_listed_one_by_one(out) -> None:
    lines = read(out / "cells.csv")
    assert [(line["variant"], int(line["seed"])) for line in lines] == [(row, seed) for seed in SEEDS for row in ROWS]
    for line in lines:
        known = known_values(line["variant"], int(line["seed"]))
        assert line["state"] == "finished" and (out / line["folder"] / "cell.json").exists()
        assert {m: line[m] for m in METRICS} == {
            m: str(known[METRICS[m].tag]) if METRICS[m].tag in known else "" for m in METRICS
        }


def test_the_markdown_rounds_the_same_numbers_and_marks_the_best(out) -> None:
    text = (out / "report.md").read_text()
    means, minus_plain, minus_a = text.split("\n## ")[1:4]
    means = {cells[0]: cells for cells in map(row_of, means.splitlines()) if cells}
    best = {"answers": max, "loss": min}
    for place, metric in enumerate(("answers", "loss", "rate"), start=2):
        averages = {row: truth(row, metric).mean() for row in ROWS if (row, metric) != ("plain", "rate")}
        for row, average in averages.items():
            shown = means[row][place]
            is_best = metric in best and average == best[metric](averages.values())
            assert shown.startswith("**") == is_best
            assert float(shown.strip("*").split(" ± ")[0]) == pytest.approx(average, abs=6e-4)
    assert minus_plain.startswith("Differences to plain") and minus_a.startswith("Differences to a")
    p_value = stats.ttest_rel(truth("b", "loss"), truth("a", "loss")).pvalue
    assert f"(p = {p_value:.3f})" in next(line for line in minus_a.splitlines() if line.startswith("| b |"))
    assert "rate" not in minus_a, "what is not judged is not compared"


def row_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []


def test_pictures_and_commands_are_there(out) -> None:
    for name in ("table", "means", "curves", "curves/plain", "curves/a", "curves/b"):
        picture = np.array(Image.open(out / f"{name}.png").convert("L"))
        assert min(picture.shape) > 100 and picture.min() < 100 < picture.max()
    script = (out / "commands.sh").read_text()
    assert len(re.findall(r"^\(cd ", script, flags=re.MULTILINE)) == 9
    assert subprocess.run(["sh", "-n", out / "commands.sh"]).returncode == 0
    assert re.search(r"torch \d.*optuna \d", (out / "report.md").read_text())


def test_a_report_is_recomputed_from_raw_files_alone(bench) -> None:
    """Neither Optuna's storage nor an earlier report is needed, and a changed event file changes the table."""
    study = bench.study(ROWS, SEEDS)
    bench.run(study, workers=2)
    out = write_report(study).parent
    before = {path: path.read_bytes() for path in sorted(out.glob("*.*"))}
    for path in out.glob("*.*"):
        path.unlink()
    write_report(study)
    kept = {path: content for path, content in before.items() if path.suffix in (".csv", ".md", ".sh", ".png")}
    assert {path: path.read_bytes() for path in kept} == kept
    run = next(cell for cell in row_cells(study) if (cell.variant, cell.seed) == ("a", 0)).run_folder
    write_events(run / "events.out.tfevents.2.later", {METRICS["answers"].tag: {3: 7.0}})
    write_report(study)
    expected = (7.0 + sum(truth("a", "answers")[1:])) / 3
    line = next(line for line in read(out / "table.csv") if (line["row"], line["metric"]) == ("a", "answers"))
    assert float(line["mean"]) == pytest.approx(expected)


def test_a_resumed_run_counts_the_later_of_two_values_for_a_step(tmp_path) -> None:
    write_events(tmp_path / "events.out.tfevents.1.x", {"loss": {0: 1.0, 1: 2.0, 2: 3.0}})
    write_events(tmp_path / "events.out.tfevents.2.x", {"loss": {1: 20.0, 2: 30.0, 3: 40.0}, "other": {0: 1.0}})
    assert read_curves(tmp_path, ["loss", "nowhere"]) == {"loss": {0: 1.0, 1: 20.0, 2: 30.0, 3: 40.0}}


def test_an_unfinished_study_reports_what_there_is(bench) -> None:
    study = bench.study(["plain", "a", "fails"], seeds=(0, 1))
    bench.run(study)
    later = replace(study, seeds=[0, 1, 2])
    text = write_report(later).read_text()
    assert "| a | 2/3 |" in text and "| fails | 0/3 |" in text
    assert "fails, seed 0: failed; fit ended with exit status 3" in text and "something broke" in text
    assert "a, seed 2: waiting" in text


def test_cells_of_different_versions_are_pointed_out(bench) -> None:
    study = bench.study(["a", "b"], seeds=(0,))
    bench.run(study)
    path = row_cells(study)[0].folder / "cell.json"
    record = json.loads(path.read_text())
    record["attempts"][-1]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(record))
    text = write_report(study).read_text()
    assert "different versions" in text and "torch 1.0" in text


def test_nothing_has_run_yet(bench: Bench) -> None:
    study = bench.study(["plain", "a"])
    assert "| a | 0/2 |" in write_report(study).read_text()
