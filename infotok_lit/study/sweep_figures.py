"""The figures of a sweep."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from infotok_lit.study.config import Dimension, Study
from infotok_lit.study.front import Point
from infotok_lit.study.statistics import Estimate


def front_figure(study: Study, points: Sequence[Point], rows: Mapping[str, Mapping[str, Estimate]]) -> Figure:
    """The first two objectives against each other: all points, their front, and the rows (metric -> estimate)."""
    first, second = study.search.objectives[:2]
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for on_front, colour, label in ((False, "#aaaaaa", "points"), (True, "C3", "Pareto front")):
        chosen = [point.estimates for point in points if point.on_front is on_front]
        _draw(axes, chosen, first, second, color=colour, label=label)
    front = sorted((p.estimates[first].mean, p.estimates[second].mean) for p in points if p.on_front)
    if front and len(study.search.objectives) == 2:
        axes.plot(*zip(*front, strict=True), color="C3", linewidth=0.8, linestyle=":")
    for number, (row, estimates) in enumerate(rows.items()):
        if first in estimates and second in estimates:
            _draw(axes, [estimates], first, second, color=f"C{number % 10}", label=row, marker="s")
    axes.set_xlabel(f"{first} ({study.metrics[first].better} is better)")
    axes.set_ylabel(f"{second} ({study.metrics[second].better} is better)")
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


def _draw(
    axes: Axes, estimates: Sequence[Mapping[str, Estimate]], first: str, second: str, marker: str = "o", **look: str
) -> None:
    if not estimates:
        return
    x, y = ([estimate[name].mean for estimate in estimates] for name in (first, second))
    margins = [[estimate[name].margin or 0.0 for estimate in estimates] for name in (first, second)]
    axes.errorbar(x, y, xerr=margins[0], yerr=margins[1], fmt=marker, markersize=4, elinewidth=0.5, **look)


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
