"""Everything that a study hands back, recomputed from its cells' folders each time."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from infotok_lit.evaluation.paper import IMPOSSIBLE, SOURCE
from infotok_lit.files import replacing, write_whole
from infotok_lit.study.cells import Job, row_cells
from infotok_lit.study.config import Study
from infotok_lit.study.figures import (
    curves_figure,
    dimensions_figure,
    front_figure,
    means_figure,
    short_name,
    tables_figure,
)
from infotok_lit.study.record import LOG_FILE, CellResult, log_tail, read_results, what_was_not_asked
from infotok_lit.study.search import Point, estimates, known_points, measured_points
from infotok_lit.study.table import (
    Summary,
    controls,
    decision_table,
    difference_table,
    full_table,
    means_table,
    number,
    paper_table,
)
from infotok_lit.tables import Table

REPORT_FILE = "report.md"
DPI = 130


def write_report(study: Study) -> Path:
    """Write tables, figures, commands and versions into the study's folder; the path of `report.md`."""
    out = Path(study.out)
    out.mkdir(parents=True, exist_ok=True)
    points = [] if study.search is None else known_points(study)
    results = read_results(study, [*row_cells(study), *(cell for job in points for cell in job.cells)])
    summary = Summary(study, results)
    seeds = ", ".join(map(str, study.seeds))
    parts = [f"# {study.name}", f"{study.steps} steps; seeds {seeds}; {' + '.join(study.configs)}."]
    if study.rows:
        parts += _write_rows(summary, results, out)
    if study.search is not None:
        parts += _write_sweep(summary, points, out)
    parts += [_unfinished(study, results), _versions(results)]
    _write_csv(out / "cells.csv", cells_table(study, results))
    write_whole(out / "commands.sh", _commands(results).encode())
    write_whole(out / REPORT_FILE, ("\n\n".join(part for part in parts if part) + "\n").encode())
    return out / REPORT_FILE


def cells_table(study: Study, results: Sequence[CellResult]) -> Table:
    """One line per cell: what came out, and where it is."""
    header = ["variant", "seed", "state", "seconds", "reason", "folder", *study.metrics]
    lines: list[list[object]] = []
    for result in results:
        cell, record = result.cell, result.record
        known = [cell.variant, cell.seed, record.state, round(record.seconds, 1), record.reason, cell.key]
        lines.append([*known, *(result.values.get(name) for name in study.metrics)])
    return Table("", header, lines)


def points_table(study: Study, points: Sequence[Point]) -> Table:
    """One line per point: where it is, what it set, what came out, in full."""
    metrics = [column for name in study.metrics for column in (name, f"{name} sd")]
    lines: list[list[object]] = []
    for point in points:
        estimates = [point.estimates.get(name) for name in study.metrics]
        values = [column for of in estimates for column in ((None, None) if of is None else (of.mean, of.sd))]
        settings = [point.job.params[name] for name in study.search.space]
        lines.append([point.job.key, point.on_front, *settings, *values])
    return Table("", ["folder", "on_front", *study.search.space, *metrics], lines)


def _write_rows(summary: Summary, results: Sequence[CellResult], out: Path) -> list[str]:
    study = summary.study
    _write_csv(out / "table.csv", full_table(summary))
    others = [difference_table(summary, reference) for reference in study.compared_with]
    if study.analysis is not None:
        _write_csv(out / "decisions.csv", decision_table(summary, full=True))
        others.insert(0, decision_table(summary))
    others = [table for table in others if table.lines]
    _write_figure(out / "table.png", tables_figure([means_table(summary), *others]))
    _write_figure(out / "means.png", means_figure(summary))
    # The tags that some run has at more than one step; the others are in the figure of means.
    tags = dict.fromkeys([*(metric.tag for metric in study.metrics.values()), *study.curves])
    tags = [tag for tag in tags if any(len(result.curves.get(tag, {})) > 1 for result in results)]
    if tags:
        by_row = {row: list(own.values()) for row, own in summary.results.items()}
        _write_figure(out / "curves.png", curves_figure(by_row, tags))
        (out / "curves").mkdir(exist_ok=True)
        for row, own in summary.results.items():
            by_seed = {f"seed {seed}": [result] for seed, result in own.items()}
            _write_figure(out / "curves" / f"{row}.png", curves_figure(by_seed, tags, title=row))
    shown = [f"## {table.title}\n\n{table.markdown()}" for table in [means_table(summary, emphasis="**"), *others]]
    pictures = ["![Means](means.png)", *(["![Learning curves](curves.png)"] if tags else [])]
    return [*shown, _reading(study), *_beside_the_paper(summary), *controls(summary), *pictures]


def _beside_the_paper(summary: Summary) -> list[str]:
    table = paper_table(summary)
    if not table.lines:
        return []
    note = (
        f"Rows marked (paper) are printed in {SOURCE}. Its data, steps, seeds and scorers are not all stated there, "
        "and a metric here may be another measure of the same thing."
    )
    marked = any(str(cell).endswith("†") for line in table.lines for cell in line)
    return [f"## {table.title}\n\n{table.markdown()}", note + (f" {IMPOSSIBLE}" if marked else "")]


def _reading(study: Study) -> str:
    level = f"{100 * study.confidence:g} %"
    text = (
        f"Mean over seeds ± half the width of Student's {level} confidence interval. Differences are taken seed by "
        "seed; p is that of a two-sided paired t-test, not corrected for the number of comparisons. In bold: the best."
    )
    if study.analysis is None:
        return text
    plan = study.analysis
    return text + (
        f"\n\nTo be decided was the mean of {' and '.join(plan.endpoint)}. Higher or lower: p, corrected by Holm's "
        f"method for {len(plan.contrasts)} comparisons, is below {plan.level:g}. Equivalent: two one-sided tests place "
        f"the difference within ±{plan.margin:g}, at {plan.level:g} each. Undecided: neither; with the seeds needed, "
        f"one of the tests would decide with probability {plan.power:g}, were mean and spread as found. Steps: the "
        "median step at which the row reaches the reference's last value of the same seed, and how many seeds do."
    )


def _write_sweep(summary: Summary, jobs: Sequence[Job], out: Path) -> list[str]:
    study = summary.study
    points = measured_points(study, jobs)
    front = [point for point in points if point.on_front]
    _write_csv(out / "points.csv", points_table(study, points))
    _write_csv(out / "front.csv", points_table(study, front))
    head = f"## Sweep\n\n{len(points)} points measured on {len(study.seeds)} seed(s), {len(jobs)} started."
    if not points:
        return [head]
    _write_figure(out / "dimensions.png", dimensions_figure(study, points))
    pictures = ["![Dimensions](dimensions.png)"]
    if len(study.search.objectives) > 1:
        rows = {row: estimates(study, own.values()) for row, own in summary.results.items()}
        _write_figure(out / "front.png", front_figure(study, points, rows))
        pictures.insert(0, "![Pareto front](front.png)")
    lines: list[list[object]] = []
    for point in front:
        settings = [point.job.params[name] for name in study.search.space]
        shown = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in settings]
        values = [number(point.estimates[name].mean) for name in study.search.objectives]
        lines.append([Path(point.job.key).name, *values, *shown])
    table = Table("", ["point", *study.search.objectives, *map(short_name, study.search.space)], lines)
    return [head, "### Pareto front", table.markdown(), *pictures]


def _unfinished(study: Study, results: Sequence[CellResult]) -> str:
    lines = []
    for cell, record in ((result.cell, result.record) for result in results):
        lacking = what_was_not_asked(study, cell)
        if record.state == "finished" and not lacking:
            continue
        reason = lacking or record.reason
        line = f"- {cell.label}: {record.state}" + (f"; {reason}" if reason else "")
        if record.state == "failed":
            tail = "\n".join(f"      {line}" for line in log_tail(cell.folder))
            line += f". The end of {cell.folder / LOG_FILE}:\n\n{tail}\n"
        lines.append(line)
    return "## Not finished\n\n" + "\n".join(lines) if lines else ""


def _versions(results: Sequence[CellResult]) -> str:
    """The versions that the cells ran with; several sets of them are a warning."""
    sets: dict[str, list[str]] = {}
    for result in results:
        if result.versions:
            text = ", ".join(f"{name} {version}" for name, version in result.versions.items() if version)
            sets.setdefault(text, []).append(result.cell.label)
    if not sets:
        return ""
    lines = [text if len(sets) == 1 else f"- {text}: {'; '.join(cells)}" for text, cells in sets.items()]
    warning = "The cells ran with different versions.\n\n" if len(sets) > 1 else ""
    return f"## Versions\n\n{warning}" + "\n".join(lines) + "\n\nThe commands are in [commands.sh](commands.sh)."


def _commands(results: Sequence[CellResult]) -> str:
    """All commands in one script, each in a shell of its own."""
    ran = [result for result in results if result.record.command]
    return "#!/bin/sh\n" + "".join(f"# {result.cell.label}\n({result.record.shell_line()})\n" for result in ran)


def _write_figure(path: Path, figure: Figure) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=DPI)


def _write_csv(path: Path, table: Table) -> None:
    """None is an empty field, numbers are in full."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.header, *table.lines])
    write_whole(path, text.getvalue().encode())
