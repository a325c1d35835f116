"""What a sweep hands back: its points, and the front of what can be had of one task for how much of the other."""

from collections.abc import Sequence
from pathlib import Path

from infotok_lit.study.cells import Job
from infotok_lit.study.config import Study
from infotok_lit.study.front import Point, measured_points
from infotok_lit.study.output import markdown, write_csv, write_figure
from infotok_lit.study.statistics import Estimate
from infotok_lit.study.sweep_figures import dimensions_figure, front_figure, short_name
from infotok_lit.study.table import Entry, number


def write_sweep_report(study: Study, jobs: Sequence[Job], entries: Sequence[Entry], out: Path) -> str:
    """Write the sweep's tables and figures; its part of the report.

    Args:
        jobs: The points that have been started.
        entries: Of the rows, which are shown beside the points.
    """
    points = measured_points(study, jobs)
    write_csv(out / "points.csv", *points_table(study, points))
    write_csv(out / "front.csv", *points_table(study, [point for point in points if point.on_front]))
    head = f"## Sweep\n\n{len(points)} points measured on {len(study.seeds)} seed(s), {len(jobs)} started."
    if not points:
        return head
    write_figure(out / "dimensions.png", dimensions_figure(study, points))
    parts = [head, "### Pareto front", markdown(*_front_for_people(study, points))]
    if len(study.search.objectives) > 1:
        write_figure(out / "front.png", front_figure(study, points, _estimates(study, entries)))
        parts.append("![Pareto front](front.png)")
    return "\n\n".join([*parts, "![Dimensions](dimensions.png)"])


def points_table(study: Study, points: Sequence[Point]) -> tuple[list[str], list[list[object]]]:
    """Header, and one line per point: where it is, what it set, what came out, in full."""
    metrics = [column for name in study.metrics for column in (name, f"{name} sd")]
    header = ["folder", "on_front", *study.search.space, *metrics]
    lines = []
    for point in points:
        estimates = [point.estimates.get(name) for name in study.metrics]
        values = [column for of in estimates for column in ((None, None) if of is None else (of.mean, of.sd))]
        settings = [point.job.params[name] for name in study.search.space]
        lines.append([point.job.key, point.on_front, *settings, *values])
    return header, lines


def _estimates(study: Study, entries: Sequence[Entry]) -> dict[str, dict[str, Estimate]]:
    """Row -> metric -> estimate, where there is one."""
    known = [entry for entry in entries if entry.estimate is not None]
    return {row: {entry.metric: entry.estimate for entry in known if entry.row == row} for row in study.rows}


def _front_for_people(study: Study, points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    header = ["point", *study.search.objectives, *map(short_name, study.search.space)]
    lines = []
    for point in points:
        if point.on_front:
            values = [number(point.estimates[name].mean) for name in study.search.objectives]
            settings = [point.job.params[name] for name in study.search.space]
            shown = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in settings]
            lines.append([point.job.folder.name, *values, *shown])
    return header, lines
