"""The tables of a study, like Table 5 of the paper: rows by metrics, over seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from infotok_lit.study.config import Metric, Study
from infotok_lit.study.results import CellResult
from infotok_lit.study.statistics import Comparison, Estimate, Seeds, compare, estimate

ARROWS = {"higher": " ↑", "lower": " ↓", "none": ""}


@dataclass(frozen=True)
class Entry:
    """One row and one metric.

    Args:
        estimate: Over the finished seeds; None if there is none.
        comparisons: Against each reference but the row itself.
    """

    row: str
    metric: str
    estimate: Estimate | None
    comparisons: Mapping[str, Comparison]


@dataclass(frozen=True)
class Table:
    """A table for people."""

    title: str
    header: list[str]
    lines: list[list[str]]


def summarise(study: Study, results: Sequence[CellResult]) -> list[Entry]:
    """An entry for each row and metric."""
    entries = []
    for metric in study.metrics:
        seeds = {row: seed_values(results, row, metric) for row in study.rows}
        for row in study.rows:
            against = {
                reference: compare(seeds[row], seeds[reference], study.confidence)
                for reference in study.compared_with
                if reference != row
            }
            known = {reference: comparison for reference, comparison in against.items() if comparison is not None}
            entries.append(Entry(row, metric, estimate(seeds[row], study.confidence), known))
    return entries


def seed_values(results: Sequence[CellResult], variant: str, metric: str) -> Seeds:
    """Seed -> value of a metric, over the finished cells of a variant."""
    return {
        result.cell.seed: result.values[metric]
        for result in results
        if result.cell.variant == variant and metric in result.values
    }


def best_rows(study: Study, entries: Sequence[Entry]) -> set[tuple[str, str]]:
    """(row, metric) of the best mean of every metric that is judged; several where they are equal."""
    best = set()
    for name, metric in judged(study).items():
        means = {e.row: e.estimate.mean for e in entries if e.metric == name and e.estimate is not None}
        top = (max if metric.better == "higher" else min)(means.values(), default=None)
        best |= {(row, name) for row, mean in means.items() if mean == top}
    return best


def judged(study: Study) -> dict[str, Metric]:
    """The metrics of which more or less is better."""
    return {name: metric for name, metric in study.metrics.items() if metric.better != "none"}


def full_table(study: Study, entries: Sequence[Entry]) -> tuple[list[str], list[list[object]]]:
    """Header, and one line per row and metric, with every number in full."""
    columns: list[tuple[str, Callable[[Entry], object]]] = [
        ("row", lambda entry: entry.row),
        ("metric", lambda entry: entry.metric),
        *_estimate_columns("", lambda entry: entry.estimate),
    ]
    for reference in study.compared_with:
        columns += _estimate_columns(f"minus_{reference}_", lambda entry, r=reference: _difference(entry, r))
        columns.append((f"minus_{reference}_p", lambda entry, r=reference: _p_value(entry, r)))
    return [name for name, _ in columns], [[cell(entry) for _, cell in columns] for entry in entries]


def means_table(study: Study, entries: Sequence[Entry], emphasis: str = "") -> Table:
    """Means with confidence intervals; the best ones between `emphasis`."""
    best = best_rows(study, entries)
    header = ["row", "seeds", *(name + ARROWS[metric.better] for name, metric in study.metrics.items())]
    lines = []
    for row in study.rows:
        own = _by_metric(row, entries)
        count = max((entry.estimate.count for entry in own.values() if entry.estimate is not None), default=0)
        marks = {name: emphasis if (row, name) in best else "" for name in own}
        means = [f"{marks[name]}{_mean(own[name].estimate)}{marks[name]}" for name in study.metrics]
        lines.append([row, f"{count}/{len(study.seeds)}", *means])
    return Table("Means over seeds", header, lines)


def difference_table(study: Study, entries: Sequence[Entry], reference: str) -> Table:
    """Paired differences of every row to a reference, with confidence intervals and tests."""
    header = ["row", *(name + ARROWS[metric.better] for name, metric in judged(study).items())]
    rows = [row for row in study.rows if row != reference]
    lines = [[row, *(_compared(_by_metric(row, entries)[name], reference) for name in judged(study))] for row in rows]
    return Table(f"Differences to {reference}, seed by seed", header, lines)


def _by_metric(row: str, entries: Sequence[Entry]) -> dict[str, Entry]:
    return {entry.metric: entry for entry in entries if entry.row == row}


def _estimate_columns(
    prefix: str, of: Callable[[Entry], Estimate | None]
) -> list[tuple[str, Callable[[Entry], object]]]:
    def field(read: Callable[[Estimate], object]) -> Callable[[Entry], object]:
        return lambda entry: None if of(entry) is None else read(of(entry))

    return [
        (f"{prefix}n", field(lambda e: e.count)),
        (f"{prefix}mean", field(lambda e: e.mean)),
        (f"{prefix}sd", field(lambda e: e.sd)),
        (f"{prefix}ci_low", field(lambda e: None if e.margin is None else e.mean - e.margin)),
        (f"{prefix}ci_high", field(lambda e: None if e.margin is None else e.mean + e.margin)),
    ]


def _difference(entry: Entry, reference: str) -> Estimate | None:
    return entry.comparisons[reference].difference if reference in entry.comparisons else None


def _p_value(entry: Entry, reference: str) -> float | None:
    return entry.comparisons[reference].p_value if reference in entry.comparisons else None


def _mean(of: Estimate | None) -> str:
    if of is None:
        return ""
    return number(of.mean) if of.margin is None else f"{number(of.mean)} ± {number(of.margin)}"


def _compared(entry: Entry, reference: str) -> str:
    difference = _difference(entry, reference)
    if difference is None:
        return ""
    margin = "" if difference.margin is None else f" ± {number(difference.margin)}"
    p_value = _p_value(entry, reference)
    test = "" if p_value is None else f" (p {'< 0.001' if p_value < 0.001 else f'= {p_value:.3f}'})"
    sign = "+" if difference.mean >= 0 else "-"
    return f"{sign}{number(abs(difference.mean))}{margin}{test}"


def number(value: float) -> str:
    """Three decimals, or three significant digits where that says more."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.1 else f"{value:.3g}"
