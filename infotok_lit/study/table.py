"""The table of a study, like Table 5 of the paper: rows by metrics, over seeds."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from infotok_lit.study.config import Study
from infotok_lit.study.results import CellResult
from infotok_lit.study.statistics import Comparison, Estimate, Seeds, compare, estimate


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
    """(row, metric) of the best mean of every metric that is judged."""
    best = set()
    for name, metric in study.metrics.items():
        means = {e.row: e.estimate.mean for e in entries if e.metric == name and e.estimate is not None}
        if metric.better == "none" or len(means) < 2:
            continue
        top = max(means.values()) if metric.better == "higher" else min(means.values())
        best |= {(row, name) for row, mean in means.items() if mean == top}
    return best


def table_csv(study: Study, entries: Sequence[Entry]) -> str:
    """One line per row and metric, every number in full."""
    columns: list[tuple[str, Callable[[Entry], object]]] = [
        ("row", lambda entry: entry.row),
        ("metric", lambda entry: entry.metric),
        *_estimate_columns("", lambda entry: entry.estimate),
    ]
    for reference in study.compared_with:
        columns += _estimate_columns(f"minus_{reference}_", lambda entry, r=reference: _difference(entry, r))
        columns.append((f"minus_{reference}_p", lambda entry, r=reference: _p_value(entry, r)))
    return to_csv([name for name, _ in columns], [[cell(entry) for _, cell in columns] for entry in entries])


def to_csv(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """CSV; None is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return text.getvalue()


def grid(study: Study, entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """The table for people: header, and a line per row; differences and tests follow each mean."""
    header = ["row", "seeds"]
    for name, metric in study.metrics.items():
        arrow = {"higher": " ↑", "lower": " ↓", "none": ""}[metric.better]
        header += [name + arrow, *(f"{name} − {reference}" for reference in study.compared_with)]
    by_place = {(entry.row, entry.metric): entry for entry in entries}
    lines = []
    for row in study.rows:
        own = [by_place[row, metric] for metric in study.metrics]
        count = max((entry.estimate.count for entry in own if entry.estimate is not None), default=0)
        line = [row, f"{count}/{len(study.seeds)}"]
        for entry in own:
            line += [_mean(entry), *(_compared(entry, reference) for reference in study.compared_with)]
        lines.append(line)
    return header, lines


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all columns but the first to the right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


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


def _mean(entry: Entry) -> str:
    if entry.estimate is None:
        return ""
    margin = "" if entry.estimate.margin is None else f" ± {_number(entry.estimate.margin)}"
    return _number(entry.estimate.mean) + margin


def _compared(entry: Entry, reference: str) -> str:
    difference = _difference(entry, reference)
    if difference is None:
        return ""
    margin = "" if difference.margin is None else f" ± {_number(difference.margin)}"
    p_value = _p_value(entry, reference)
    test = "" if p_value is None else f" (p {'< 0.001' if p_value < 0.001 else f'= {p_value:.3f}'})"
    return f"{difference.mean:+.3f}{margin}{test}"


def _number(value: float) -> str:
    return f"{value:.3f}"
