"""The figures of a study. Every function returns a figure that is not attached to any window."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from infotok_lit.study.config import Study
from infotok_lit.study.events import Curve
from infotok_lit.study.results import CellResult
from infotok_lit.study.table import Entry, seed_values

COLUMNS = 3
PANEL = (4.2, 3.0)
"""Width and height of a panel in inches."""


def table_figure(header: Sequence[str], lines: Sequence[Sequence[str]]) -> Figure:
    """A table as a picture."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    figure = Figure(figsize=(0.085 * sum(widths) + 0.15 * len(widths), 0.3 * (len(lines) + 1) + 0.1))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    shares = [width / sum(widths) for width in widths]
    table = axes.table([*lines], colLabels=header, colWidths=shares, cellLoc="right", bbox=(0, 0, 1, 1))
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    for (line, column), cell in table.get_celld().items():
        cell.set_edgecolor("#cccccc")
        if line == 0:
            cell.set_text_props(weight="bold")
        if column == 0:
            cell.set_text_props(ha="left")
    return figure


def means_figure(study: Study, results: Sequence[CellResult], entries: Sequence[Entry]) -> Figure:
    """A panel per metric: every seed as a dot, means with confidence intervals."""
    figure, panels = _panels(list(study.metrics), height=0.3 * len(study.rows) + 1.0)
    for name, axes in panels.items():
        for place, row in enumerate(study.rows):
            values = list(seed_values(results, row, name).values())
            axes.plot(values, [place] * len(values), ".", color="#999999", zorder=1)
        for entry in entries:
            if entry.metric == name and entry.estimate is not None:
                place = list(study.rows).index(entry.row)
                axes.errorbar(
                    entry.estimate.mean, place, xerr=entry.estimate.margin, fmt="o", color="C0", capsize=3, zorder=2
                )
        axes.set_yticks(range(len(study.rows)), list(study.rows))
        axes.invert_yaxis()
        axes.set_title(name)
    return figure


def row_curves_figure(row: str, results: Sequence[CellResult], tags: Sequence[str]) -> Figure:
    """A panel per tag: one line per seed of a row."""
    figure, panels = _panels(tags)
    for tag, axes in panels.items():
        for result in results:
            if tag in result.curves:
                axes.plot(*_points(result.curves[tag]), label=f"seed {result.cell.seed}", **_line(result.curves[tag]))
        _legend(axes)
        axes.set_title(tag, fontsize=9)
    figure.suptitle(row)
    return figure


def mean_curves_figure(variants: Mapping[str, Sequence[CellResult]], tags: Sequence[str]) -> Figure:
    """A panel per tag: one line per variant, the mean over its seeds, with their range shaded."""
    figure, panels = _panels(tags)
    colours = colormaps["tab10"]
    for tag, axes in panels.items():
        for number, (variant, results) in enumerate(variants.items()):
            curves = [result.curves[tag] for result in results if tag in result.curves]
            steps = sorted(set.intersection(*map(set, curves))) if curves else []
            if not steps:
                continue
            values = np.array([[curve[step] for step in steps] for curve in curves])
            mean = dict(zip(steps, values.mean(0), strict=True))
            colour = colours(number % 10)
            axes.plot(*_points(mean), label=variant, color=colour, **_line(mean))
            axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        _legend(axes)
        axes.set_title(tag, fontsize=9)
    return figure


def _panels(names: Sequence[str], height: float = PANEL[1]) -> tuple[Figure, dict]:
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(PANEL[0] * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in axes[len(names) :]:
        unused.axis("off")
    return figure, dict(zip(names, axes, strict=False))


def _points(curve: Curve) -> tuple[list[int], list[float]]:
    steps = sorted(curve)
    return steps, [curve[step] for step in steps]


def _line(curve: Curve) -> dict[str, object]:
    return {"linewidth": 1, "marker": "o" if len(curve) < 3 else None, "markersize": 3}


def _legend(axes: object) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
