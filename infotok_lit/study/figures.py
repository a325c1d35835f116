"""The figures of a study. Every function returns a figure that is not attached to any window."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from infotok_lit.study.config import Study
from infotok_lit.study.events import Curve
from infotok_lit.study.results import CellResult
from infotok_lit.study.table import Entry, Table, seed_values

COLUMNS = 3
PANEL = (4.2, 3.0)
"""Width and height of a panel in inches."""


def tables_figure(tables: Sequence[Table]) -> Figure:
    """Tables as a picture, one below the other."""
    heights = [len(table.lines) + 2.5 for table in tables]
    widths = [[max(len(line[i]) for line in [t.header, *t.lines]) + 2 for i in range(len(t.header))] for t in tables]
    figure = Figure(figsize=(0.085 * max(map(sum, widths)), 0.27 * sum(heights)))
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights).flatten()
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.3 / sum(heights), hspace=0.15)
    for axes, table, characters in zip(panels, tables, widths, strict=True):
        axes.axis("off")
        axes.set_title(table.title, fontsize=10, loc="left")
        _draw_table(axes, table, characters, sum(characters) / max(map(sum, widths)))
    return figure


def means_figure(study: Study, results: Sequence[CellResult], entries: Sequence[Entry]) -> Figure:
    """A panel per metric: every seed as a dot, means with confidence intervals."""
    rows = list(study.rows)
    figure, panels = _panels(list(study.metrics), height=0.3 * len(rows) + 1.0)
    for name, axes in panels.items():
        for place, row in enumerate(rows):
            values = list(seed_values(results, row, name).values())
            axes.plot(values, [place] * len(values), ".", color="#999999", zorder=1)
        for entry in entries:
            if entry.metric == name and entry.estimate is not None:
                mean, margin = entry.estimate.mean, entry.estimate.margin
                axes.errorbar(mean, rows.index(entry.row), xerr=margin, fmt="o", color="C0", capsize=3, zorder=2)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(name)
    return figure


def row_curves_figure(row: str, results: Sequence[CellResult], tags: Sequence[str]) -> Figure:
    """A panel per tag: one line per seed of a row."""
    figure, panels = _panels(tags)
    for tag, axes in panels.items():
        for result in results:
            if tag in result.curves:
                _draw_curve(axes, result.curves[tag], f"seed {result.cell.seed}")
        _finish_curves(axes, tag)
    figure.suptitle(row)
    _add_legend(figure)
    return figure


def mean_curves_figure(variants: Mapping[str, Sequence[CellResult]], tags: Sequence[str]) -> Figure:
    """A panel per tag: one line per variant, the mean over its seeds, with their range shaded."""
    figure, panels = _panels(tags)
    for tag, axes in panels.items():
        for number, (variant, results) in enumerate(variants.items()):
            curves = [result.curves[tag] for result in results if tag in result.curves]
            steps = sorted(set.intersection(*map(set, curves))) if curves else []
            if steps:
                values = np.array([[curve[step] for step in steps] for curve in curves])
                # Of its ten pairs of a dark and a light colour, the dark ones first.
                colour = colormaps["tab20"]((2 * number + number // 10) % 20)
                _draw_curve(axes, dict(zip(steps, values.mean(0), strict=True)), variant, colour)
                axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        _finish_curves(axes, tag)
    _add_legend(figure)
    return figure


def _draw_table(axes: Axes, table: Table, characters: Sequence[int], share: float) -> None:
    widths = [count / sum(characters) for count in characters]
    drawn = axes.table(table.lines, colLabels=table.header, colWidths=widths, cellLoc="right", bbox=(0, 0, share, 1))
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    for (line, column), cell in drawn.get_celld().items():
        cell.set_edgecolor("#cccccc")
        cell.set_text_props(weight="bold" if line == 0 else None, ha="left" if column == 0 else "right")


def _panels(names: Sequence[str], height: float = PANEL[1]) -> tuple[Figure, dict[str, Axes]]:
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(PANEL[0] * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in axes[len(names) :]:
        unused.axis("off")
    return figure, dict(zip(names, axes, strict=False))


def _draw_curve(axes: Axes, curve: Curve, label: str, colour: object = None) -> None:
    steps = sorted(curve)
    marker = "o" if len(steps) < 3 else None
    axes.plot(
        steps, [curve[step] for step in steps], label=label, color=colour, linewidth=1, marker=marker, markersize=3
    )


def _finish_curves(axes: Axes, tag: str) -> None:
    axes.set_title(tag, fontsize=9)
    axes.set_xlabel("step", fontsize=8)


def _add_legend(figure: Figure) -> None:
    """One legend beside all panels, as a row is drawn alike in each."""
    named = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if named:
        figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=8)
