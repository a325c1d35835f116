"""Everything that a study hands back, recomputed from its cells' raw event files each time."""

from collections.abc import Sequence
from pathlib import Path

from infotok_lit.study.cells import Cell, row_cells
from infotok_lit.study.config import Study
from infotok_lit.study.figures import mean_curves_figure, means_figure, row_curves_figure, tables_figure
from infotok_lit.study.output import markdown, write_csv, write_figure, write_text
from infotok_lit.study.record import LOG_FILE, log_tail
from infotok_lit.study.results import CellResult, read_results
from infotok_lit.study.search import known_points
from infotok_lit.study.sweep_report import write_sweep_report
from infotok_lit.study.table import Entry, difference_table, full_table, means_table, summarise

REPORT_FILE = "report.md"


def write_report(study: Study) -> Path:
    """Write tables, figures, commands and versions into the study's folder; the path of `report.md`."""
    out = Path(study.out)
    points = [] if study.search is None else known_points(study)
    cells: list[Cell] = [*row_cells(study), *(cell for job in points for cell in job.cells)]
    results = read_results(study, cells)
    entries = summarise(study, results)
    parts = [f"# {study.name}", _budget(study)]
    if study.rows:
        parts.append(_write_rows(study, results, entries, out))
    if study.search is not None:
        parts.append(write_sweep_report(study, points, entries, out))
    parts += [_unfinished(results), _versions(results)]
    write_csv(out / "cells.csv", *cells_table(study, results))
    write_text(out / "commands.sh", _commands(results))
    write_text(out / REPORT_FILE, "\n\n".join(part for part in parts if part) + "\n")
    return out / REPORT_FILE


def cells_table(study: Study, results: Sequence[CellResult]) -> tuple[list[str], list[list[object]]]:
    """Header, and one line per cell: what came out, and where it is."""
    header = ["variant", "seed", "state", "seconds", "reason", "folder", *study.metrics]
    lines = [
        [
            result.cell.variant,
            result.cell.seed,
            result.state,
            None if result.record is None else round(result.record.seconds, 1),
            None if result.record is None else result.record.reason,
            result.cell.key,
            *(result.values.get(name) for name in study.metrics),
        ]
        for result in results
    ]
    return header, lines


def _write_rows(study: Study, results: Sequence[CellResult], entries: Sequence[Entry], out: Path) -> str:
    write_csv(out / "table.csv", *full_table(study, entries))
    differences = [difference_table(study, entries, reference) for reference in study.compared_with]
    write_figure(out / "table.png", tables_figure([means_table(study, entries), *differences]))
    write_figure(out / "means.png", means_figure(study, results, entries))
    tags = _tags_over_steps(study, results)
    by_row = {row: [result for result in results if result.cell.variant == row] for row in study.rows}
    if tags:
        write_figure(out / "curves.png", mean_curves_figure(by_row, tags))
        for row, own in by_row.items():
            write_figure(out / "curves" / f"{row}.png", row_curves_figure(row, own, tags))
    tables = [means_table(study, entries, emphasis="**"), *differences]
    shown = [f"## {table.title}\n\n{markdown(table.header, table.lines)}" for table in tables]
    pictures = ["![Means](means.png)", *(["![Learning curves](curves.png)"] if tags else [])]
    return "\n\n".join([*shown, _reading(study), *pictures])


def _tags_over_steps(study: Study, results: Sequence[CellResult]) -> list[str]:
    """The tags that some run has at more than one step; the others are in the figure of means."""
    tags = dict.fromkeys([*(metric.tag for metric in study.metrics.values()), *study.curves])
    return [tag for tag in tags if any(len(result.curves.get(tag, {})) > 1 for result in results)]


def _budget(study: Study) -> str:
    return f"{study.steps} steps; seeds {', '.join(map(str, study.seeds))}; {' + '.join(study.configs)}."


def _reading(study: Study) -> str:
    level = f"{100 * study.confidence:g} %"
    return (
        f"Mean over seeds ± half the width of Student's {level} confidence interval. Differences are taken seed by "
        "seed; p is that of a two-sided paired t-test, not corrected for the number of comparisons. In bold: the best."
    )


def _unfinished(results: Sequence[CellResult]) -> str:
    lines = [f"- {result.cell.label}: {result.state}{_why(result)}" for result in results if result.state != "finished"]
    return "## Not finished\n\n" + "\n".join(lines) if lines else ""


def _why(result: CellResult) -> str:
    if result.state != "failed":
        return ""
    tail = "\n".join(f"      {line}" for line in log_tail(result.cell.folder))
    return f"; {result.record.reason}. The end of {result.cell.folder / LOG_FILE}:\n\n{tail}\n"


def _versions(results: Sequence[CellResult]) -> str:
    """The versions that the cells ran with; several sets of them are a warning."""
    sets: dict[str, list[str]] = {}
    for result in results:
        if result.record is not None and result.record.attempts:
            versions = result.record.attempts[-1].versions
            text = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
            sets.setdefault(text, []).append(result.cell.label)
    if not sets:
        return ""
    lines = [text if len(sets) == 1 else f"- {text}: {'; '.join(cells)}" for text, cells in sets.items()]
    warning = "The cells ran with different versions.\n\n" if len(sets) > 1 else ""
    return f"## Versions\n\n{warning}" + "\n".join(lines) + "\n\nThe commands are in [commands.sh](commands.sh)."


def _commands(results: Sequence[CellResult]) -> str:
    """All commands in one script, each in a shell of its own."""
    ran = [result for result in results if result.record is not None]
    return "#!/bin/sh\n" + "".join(f"# {result.cell.label}\n({result.record.shell_line()})\n" for result in ran)
