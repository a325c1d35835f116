"""The tables say what the runs' results say, computed again here by other means."""

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
from study.studies import METRICS, STEPS, Bench, known_values

from infotok_lit.errors import SettingsError
from infotok_lit.study import report
from infotok_lit.study.cells import row_cells
from infotok_lit.study.config import Analysis, Metric, Row
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


def test_a_report_is_recomputed_from_raw_files_alone(bench, drawn, monkeypatch) -> None:
    """Neither Optuna's storage nor an earlier report is needed, and a changed result changes the table."""
    study = bench.study(["plain", "a"], SEEDS)
    bench.run(study, workers=2)
    out = write_report(study).parent
    before = {path: path.read_bytes() for path in sorted(out.glob("*.*"))}
    for path in out.glob("*.*"):
        path.unlink()
    write_report(study)
    kept = {path: content for path, content in before.items() if path.suffix in (".csv", ".md", ".sh", ".png")}
    assert {path: path.read_bytes() for path in kept} == kept
    path = next(c for c in row_cells(study) if (c.variant, c.seed) == ("a", 0)).run_folder / "result.json"
    changed = json.loads(path.read_text())
    changed["validation"][-1][METRICS["answers"].tag] = 7.0
    path.write_text(json.dumps(changed))
    monkeypatch.setattr(report, "_write_figure", lambda path, figure: None)
    write_report(study)
    expected = (7.0 + sum(truth("a", "answers")[1:])) / 3
    line = next(line for line in read(out / "table.csv") if (line["row"], line["metric"]) == ("a", "answers"))
    assert float(line["mean"]) == pytest.approx(expected)


def test_an_unfinished_study_reports_what_there_is(bench) -> None:
    study = bench.study(["plain", "a", "fails"], seeds=(0, 1))
    bench.run(study)
    later = replace(study, seeds=[0, 1, 2])
    text = write_report(later).read_text()
    assert "| a | 2/3 |" in text and "| fails | 0/3 |" in text
    assert "fails, seed 0: failed; fit ended with exit status 3" in text and "something broke" in text
    assert "a, seed 2: waiting" in text


def test_a_finished_cell_that_lacks_a_new_metric_is_named_and_nothing_is_complete(bench, capsys) -> None:
    study = bench.study(["a"], seeds=(0,))
    assert bench.run(study)
    optional = replace(study, metrics=METRICS | {"new": Metric("val/none", optional=True)})
    assert bench.run(optional) and "Not finished" not in write_report(optional).read_text()
    required = replace(study, metrics=METRICS | {"new": Metric("val/none")})
    assert not bench.run(required) and bench.starts() == {("a", 0): 1}
    why = f"it measured no finite val/none at step {STEPS}; it ran when the study had other metrics"
    assert f"lacking  a, seed 0: {why}" in capsys.readouterr().err.replace("\n", "")
    assert f"- a, seed 0: finished; {why}" in write_report(required).read_text()


def test_cells_of_different_versions_are_pointed_out(bench) -> None:
    study = bench.study(["a", "b"], seeds=(0,))
    bench.run(study)
    path = row_cells(study)[0].run_folder / "result.json"
    path.write_text(path.read_text().replace('"torch": "2.0"', '"torch": "1.0"'))
    text = write_report(study).read_text()
    assert "different versions" in text and "torch 1.0" in text


def test_nothing_has_run_yet(bench: Bench) -> None:
    study = bench.study(["plain", "a"])
    assert "| a | 0/2 |" in write_report(study).read_text()


def planned(bench: Bench, rows: dict[str, dict[int, tuple[float, float]]], **analysis) -> tuple[dict[str, dict], str]:
    """What is decided of rows, seed -> (answers, drawings) at the end, half of them at step 2; and the report."""
    study = bench.study(list(rows), tuple(next(iter(rows.values()))))
    for row, seeds in rows.items():
        for seed, (answers, loss) in seeds.items():
            bench.prepare(row, seed, {METRICS["answers"].tag: answers, "val/generation/score": loss, LOSS: 1.0})
            path = bench.home / "results" / f"{row}-{seed}.json"
            content = json.loads(path.read_text())
            half = {"step": 2, METRICS["answers"].tag: answers / 2, "val/generation/score": loss / 2}
            content["validation"] = [half, content["validation"][-1]]
            path.write_text(json.dumps(content))
    metrics = METRICS | {"drawings": replace(METRICS["answers"], tag="val/generation/score")}
    plan = Analysis(endpoint=["answers", "drawings"], **analysis)
    study = replace(study, metrics=metrics, analysis=plan)
    bench.run(study, workers=2)
    out = write_report(study).parent
    return {line["contrast"]: line for line in read(out / "decisions.csv")}, (out / "report.md").read_text()


LOSS = METRICS["loss"].tag


def test_a_planned_comparison_is_decided_about_the_mean_of_its_metrics(bench) -> None:
    """p-values, Holm's correction and steps are worked out here from the same numbers by hand and by scipy."""
    rng = np.random.default_rng(0)
    ends = {"b": 0.5, "a": 0.6, "c": 0.5}
    values = {row: {s: (end + 0.01 * rng.normal(), end) for s in range(4)} for row, end in ends.items()}
    contrasts = [("a", "b"), ("c", "b"), ("a", "c")]
    found, text = planned(bench, values, contrasts=contrasts, margin=0.03)
    means = {row: np.array([np.mean(pair) for pair in own.values()]) for row, own in values.items()}
    raw = {f"{x} - {y}": stats.ttest_rel(means[x], means[y]).pvalue for x, y in contrasts}
    order = sorted(raw, key=raw.get)
    holm = {order[0]: 3 * raw[order[0]], order[1]: max(3 * raw[order[0]], 2 * raw[order[1]])}
    holm[order[2]] = max(holm[order[1]], raw[order[2]])
    for (x, y), name in zip(contrasts, raw, strict=True):
        line = found[name]
        assert float(line["mean"]) == pytest.approx((means[x] - means[y]).mean())
        assert float(line["p"]) == pytest.approx(raw[name])
        assert float(line["p_holm"]) == pytest.approx(min(holm[name], 1.0))
        sides = [
            stats.ttest_1samp(means[x] - means[y], -0.03, alternative="greater").pvalue,
            stats.ttest_1samp(means[x] - means[y], 0.03, alternative="less").pvalue,
        ]
        assert float(line["p_equivalence"]) == pytest.approx(max(sides))
    assert (found["a - b"]["verdict"], found["c - b"]["verdict"]) == ("higher", "equivalent")
    # A straight line from half of its end at step 2 to its end at step 4.
    steps = 2 + 2 * (means["b"] - means["a"] / 2) / (means["a"] / 2)
    assert float(found["a - b"]["steps"]) == pytest.approx(np.median(steps)) and found["a - b"]["reached"] == "4"
    assert "| a - b | 4 | +0.1" in text and "Holm" in text


def test_what_is_undecided_says_how_many_seeds_would_decide(bench) -> None:
    values = {"b": {0: (0.5, 0.5), 1: (0.6, 0.6)}, "a": {0: (0.6, 0.6), 1: (0.62, 0.62)}}
    line = planned(bench, values, contrasts=[("a", "b")])[0]["a - b"]
    assert line["verdict"] == "undecided" and int(line["seeds_needed"]) > 2


def test_more_seeds_than_any_study_has_are_told_from_an_unknown_number(bench) -> None:
    """One seed has no spread; differences of +1 and -1, and a margin of a millionth, are never decided."""
    values = {"b": {0: (0.5, 0.5), 1: (0.5, 0.5)}, "a": {0: (1.5, 1.5), 1: (-0.5, -0.5)}, "c": {0: (0.5, 0.5)}}
    found, text = planned(bench, values, contrasts=[("a", "b"), ("c", "b")], margin=1e-6)
    assert (found["a - b"]["seeds_needed"], found["c - b"]["seeds_needed"]) == ("inf", "")
    assert "| undecided | > 100,000 |" in text and "| undecided | unknown |" in text


def test_a_comparison_without_a_common_seed_is_shown_and_counts(bench) -> None:
    """Holm's correction is for all that were planned; a row that reaches its reference in few seeds does so late."""
    values = {"b": {s: (0.5 + s / 1000, 0.5) for s in range(3)}, "a": {0: (0.6, 0.6), 1: (0.3, 0.3), 2: (0.32, 0.3)}}
    found, text = planned(bench, values | {"c": {}}, contrasts=[("a", "b"), ("c", "b")])
    assert float(found["a - b"]["p_holm"]) == pytest.approx(min(1.0, 2 * float(found["a - b"]["p"])))
    assert {name for name, value in found["c - b"].items() if value} == {"contrast", "verdict", "reached"}
    assert "| c - b | 0 |  |  |  |  | undecided | unknown |  |" in text and f"| > {STEPS} (1 of 3) |" in text


def test_a_number_of_fewer_seeds_than_its_row_has_says_so(bench) -> None:
    """One that is not finite counts as none."""
    study = bench.study(["a", "b"], seeds=(0, 1, 2))
    study = replace(study, metrics=METRICS | {"rate": replace(METRICS["rate"], better="lower")})
    for seed, value in ((0, None), (1, 2.0), (2, 4.0)):
        path = bench.home / "results" / f"a-{seed}.json"
        content = json.loads(path.read_text())
        content["validation"][-1][METRICS["rate"].tag] = value
        path.write_text(json.dumps(content))
    assert bench.run(study)
    text = write_report(study).read_text()
    assert " (n = 2) |" in text.split("| a | 3/3 |")[1].splitlines()[0] and "nan" not in text
    assert ", n = 2) |" in text.split("## Differences to a")[1].split("| b |")[1].splitlines()[0]


def test_a_control_of_one_seed_is_compared_with_its_row(bench) -> None:
    study = bench.study(["a", "placebo", "other"], seeds=(0, 1))
    bench.prepare("placebo", 0, known_values("a", 0))
    rows = study.rows | {
        name: Row(overrides=study.rows[name].overrides, seeds=[0], control_of="a") for name in ("placebo", "other")
    }
    study = replace(study, rows=rows)
    assert bench.run(study)
    assert bench.starts() == {("a", 0): 1, ("a", 1): 1, ("placebo", 0): 1, ("other", 0): 1}
    text = write_report(study).read_text()
    largest = max(abs(known_values("a", 0)[METRICS[m].tag] - known_values("other", 0)[METRICS[m].tag]) for m in BOTH)
    assert "Control: placebo equals a." in text and f"Control: other differs by up to {largest:.3g}." in text
    assert "| placebo | 1/1 |" in text


BOTH = ("answers", "loss")


def test_a_result_that_is_not_finite_is_no_value(bench) -> None:
    study = bench.study(["a"], seeds=(0,))
    path = bench.home / "results" / "a-0.json"
    content = json.loads(path.read_text())
    content["validation"][-1][METRICS["rate"].tag] = None
    path.write_text(json.dumps(content))
    assert bench.run(study), "the rate is optional"
    assert content["validation"][-1]["step"] == STEPS
    line = next(line for line in read(write_report(study).parent / "cells.csv"))
    assert line["rate"] == "nan" and line["answers"]


def test_the_papers_numbers_stand_below_ours_and_the_impossible_are_marked(tmp_path) -> None:
    bench = Bench(tmp_path)
    metrics = METRICS | {
        "answers": Metric(METRICS["answers"].tag, paper="MME"),
        "loss": Metric(METRICS["loss"].tag, better="lower", paper="GenEval++/color_attr"),
    }
    study = bench.study(["plain", "a"], (0, 1), metrics=metrics)
    full = "Show-o2/infotok_compactness_sufficiency_alignment"
    rows = {"plain": replace(study.rows["plain"], paper="Show-o2/baseline"), "a": replace(study.rows["a"], paper=full)}
    study = replace(study, rows=rows)
    bench.run(study)
    _, _, said = write_report(study).read_text().partition("## Beside the paper's numbers\n\n")
    header, _, *lines = said.splitlines()[:6]
    assert header == "| row | answers | loss |"
    assert lines[1] == "| Show-o2/baseline (paper) | 1714 | 0.28 |"
    # 40 images give fortieths, which 0.39 is not.
    assert lines[3] == f"| {full} (paper) | 1823 | 0.39 † |" and "† cannot come from 40 prompts" in said
    for line, row in ((lines[0], "plain"), (lines[2], "a")):
        mean = np.mean([known_values(row, seed)[METRICS["answers"].tag] for seed in (0, 1)])
        assert float(line.split("|")[2].split("±")[0]) == pytest.approx(mean, abs=5e-4)


def test_what_the_paper_does_not_have_is_said() -> None:
    with pytest.raises(SettingsError, match="the paper has no column GenEval/all; it has .*GenEval/overall"):
        Metric("x", paper="GenEval/all")
    with pytest.raises(SettingsError, match="the paper reports no Harmon/C; it has .*Harmon/finetune"):
        Row(paper="Harmon/C")
