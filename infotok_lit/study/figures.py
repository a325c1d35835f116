"""The figures of a study. Every function returns a figure that is not attached to any window."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from infotok_lit.study.config import Dimension, Study
from infotok_lit.study.record import CellResult
from infotok_lit.study.search import Point
from infotok_lit.study.statistics import Estimate
from infotok_lit.study.table import Summary
from infotok_lit.tables import Table

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


def means_figure(summary: Summary) -> Figure:
    """A panel per metric: every seed as a dot, means with confidence intervals."""
    rows = list(summary.study.rows)
    figure, panels = _panels(list(summary.study.metrics), height=0.3 * len(rows) + 1.0)
    for metric, axes in panels.items():
        for place, row in enumerate(rows):
            values = list(summary.seeds(row, metric).values())
            axes.plot(values, [place] * len(values), ".", color="#999999", zorder=1)
            of = summary.estimate(row, metric)
            if of is not None:
                axes.errorbar(of.mean, place, xerr=of.margin, fmt="o", color="C0", capsize=3, zorder=2)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(metric)
    return figure


def curves_figure(groups: Mapping[str, Sequence[CellResult]], tags: Sequence[str], title: str = "") -> Figure:
    """A panel per tag: one line per group of results, the mean over them, with their range shaded."""
    figure, panels = _panels(tags)
    for tag, axes in panels.items():
        for number, (label, results) in enumerate(groups.items()):
            curves = [result.curves[tag] for result in results if tag in result.curves]
            steps = sorted(set.intersection(*map(set, curves))) if curves else []
            if steps:
                values = np.array([[curve[step] for step in steps] for curve in curves])
                # Of its ten pairs of a dark and a light colour, the dark ones first.
                look = {"color": colormaps["tab20"]((2 * number + number // 10) % 20), "linewidth": 1}
                axes.plot(
                    steps, values.mean(0), label=label, marker="o" if len(steps) < 3 else None, markersize=3, **look
                )
                axes.fill_between(steps, values.min(0), values.max(0), color=look["color"], alpha=0.15, linewidth=0)
        axes.set_title(tag, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
    figure.suptitle(title)
    _add_legend(figure)
    return figure


def front_figure(study: Study, points: Sequence[Point], rows: Mapping[str, Mapping[str, Estimate]]) -> Figure:
    """The first two objectives against each other: all points, their front, and the rows (metric -> estimate)."""
    names = study.search.objectives[:2]
    figure, panels = _panels(["points and rows"], height=4.0)
    axes = panels["points and rows"]
    for on_front, colour, label in ((False, "#aaaaaa", "points"), (True, "C3", "Pareto front")):
        _draw_points(axes, [p.estimates for p in points if p.on_front is on_front], names, color=colour, label=label)
    front = sorted([point.estimates[name].mean for name in names] for point in points if point.on_front)
    if front and len(study.search.objectives) == 2:
        axes.plot(*zip(*front, strict=True), color="C3", linewidth=0.8, linestyle=":")
    for number, (row, estimates) in enumerate(rows.items()):
        if all(name in estimates for name in names):
            _draw_points(axes, [estimates], names, color=f"C{number % 10}", label=row, marker="s")
    axes.set_xlabel(f"{names[0]} ({study.metrics[names[0]].better} is better)")
    axes.set_ylabel(f"{names[1]} ({study.metrics[names[1]].better} is better)")
    axes.legend(fontsize=8)
    return figure


def dimensions_figure(study: Study, points: Sequence[Point]) -> Figure:
    """A panel per objective and dimension: what each setting goes with."""
    space, objectives = study.search.space, study.search.objectives
    figure = Figure(figsize=(3.2 * len(space), 2.6 * len(objectives)), layout="constrained")
    grid = figure.subplots(len(objectives), len(space), squeeze=False)
    for row, objective in zip(grid, objectives, strict=True):
        for axes, (name, dimension) in zip(row, space.items(), strict=True):
            _draw_dimension(axes, name, dimension, points, objective)
        row[0].set_ylabel(objective)
    for axes, name in zip(grid[-1], space, strict=True):
        axes.set_xlabel(short_name(name), fontsize=8)
    return figure


def short_name(name: str) -> str:
    """A dotted name without what all of them share."""
    return name.removeprefix("model.init_args.").removeprefix("objective.")


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


def _draw_points(
    axes: Axes, estimates: Sequence[Mapping[str, Estimate]], names: Sequence[str], marker: str = "o", **look: str
) -> None:
    if estimates:
        (x, x_margins), (y, y_margins) = (
            zip(*((each[name].mean, each[name].margin or 0.0) for each in estimates), strict=True) for name in names
        )
        axes.errorbar(x, y, xerr=x_margins, yerr=y_margins, fmt=marker, markersize=4, elinewidth=0.5, **look)


def _draw_dimension(axes: Axes, name: str, dimension: Dimension, points: Sequence[Point], objective: str) -> None:
    values = [point.job.params[name] for point in points]
    if dimension.options is not None:
        options = list(dimension.options)
        # Spread a little, so that equal choices do not hide each other.
        spread = np.random.default_rng(0).uniform(-0.15, 0.15, len(values))
        values = [options.index(value) + shift for value, shift in zip(values, spread, strict=True)]
        axes.set_xticks(range(len(options)), [str(option) for option in options], fontsize=7)
    elif dimension.log:
        axes.set_xscale("log")
    colours = ["C3" if point.on_front else "#aaaaaa" for point in points]
    axes.scatter(values, [point.estimates[objective].mean for point in points], c=colours, s=12)


def _add_legend(figure: Figure) -> None:
    """One legend beside all panels, as a row is drawn alike in each."""
    named = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if named:
        figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=8)
