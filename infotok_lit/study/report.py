"""Everything that a study hands back, recomputed from its cells' raw event files each time."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from infotok_lit.command_line import write_whole
from infotok_lit.study.cells import row_cells
from infotok_lit.study.config import Study
from infotok_lit.study.figures import mean_curves_figure, means_figure, row_curves_figure, table_figure
from infotok_lit.study.record import LOG_FILE, log_tail
from infotok_lit.study.results import CellResult, read_results
from infotok_lit.study.table import best_rows, grid, markdown, summarise, table_csv, to_csv

REPORT_FILE = "report.md"
DPI = 130


def write_report(study: Study) -> Path:
    """Write tables, figures, commands and versions into the study's folder; the path of `report.md`."""
    out = Path(study.out)
    out.mkdir(parents=True, exist_ok=True)
    results = read_results(study, row_cells(study))
    parts = [f"# {study.name}", _budget(study)]
    if study.rows:
        parts.append(_rows_report(study, results, out))
    parts += [_unfinished(results), _versions(results)]
    _write(out / "cells.csv", cells_csv(study, results))
    _write(out / "commands.sh", _commands(results))
    _write(out / REPORT_FILE, "\n\n".join(part for part in parts if part) + "\n")
    return out / REPORT_FILE


def cells_csv(study: Study, results: Sequence[CellResult]) -> str:
    """One line per cell: what came out, and where it is."""
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
    return to_csv(header, lines)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    write_whole(path, picture.getvalue())


def _rows_report(study: Study, results: Sequence[CellResult], out: Path) -> str:
    entries = summarise(study, results)
    header, lines = grid(study, entries)
    _write(out / "table.csv", table_csv(study, entries))
    save_figure(table_figure(header, lines), out / "table.png")
    save_figure(means_figure(study, results, entries), out / "means.png")
    tags = list(dict.fromkeys([*(metric.tag for metric in study.metrics.values()), *study.curves]))
    by_row = {row: [result for result in results if result.cell.variant == row] for row in study.rows}
    save_figure(mean_curves_figure(by_row, tags), out / "curves.png")
    for row, own in by_row.items():
        save_figure(row_curves_figure(row, own, tags), out / "curves" / f"{row}.png")
    return "\n\n".join(
        [
            markdown(header, _with_best(study, lines, best_rows(study, entries))),
            _reading(study),
            "![Means](means.png)\n\n![Curves](curves.png)",
        ]
    )


def _with_best(study: Study, lines: list[list[str]], best: set[tuple[str, str]]) -> list[list[str]]:
    """The lines with the best mean of each metric in bold."""
    stride = 1 + len(study.compared_with)
    places = {name: 2 + number * stride for number, name in enumerate(study.metrics)}
    marked = [list(line) for line in lines]
    for line in marked:
        for name, place in places.items():
            if (line[0], name) in best:
                line[place] = f"**{line[place]}**"
    return marked


def _budget(study: Study) -> str:
    return f"{study.steps} steps; seeds {', '.join(map(str, study.seeds))}; {' + '.join(study.configs)}."


def _reading(study: Study) -> str:
    level = f"{100 * study.confidence:g} %"
    return (
        f"Mean over seeds ± half the width of Student's {level} confidence interval; differences are taken seed by "
        "seed, with the p-value of a two-sided paired t-test, not corrected for the number of comparisons. In bold: "
        "the best mean."
    )


def _unfinished(results: Sequence[CellResult]) -> str:
    lines = []
    for result in results:
        if result.state == "finished":
            continue
        lines.append(f"- {result.cell.label}: {result.state}" + _why(result))
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
    """A script of all commands."""
    lines = ["#!/bin/sh"]
    for result in results:
        if result.record is not None:
            lines += [f"# {result.cell.label}", f"(\n{result.record.script().partition(chr(10))[2].strip()}\n)"]
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    write_whole(path, text.encode())
