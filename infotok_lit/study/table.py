"""The tables of a study, like Table 5 of the paper: rows by metrics, over seeds; and what was planned to be decided."""

import math
from collections.abc import Sequence
from statistics import fmean, median

from infotok_lit.evaluation.paper import paper_scores, printed
from infotok_lit.study.config import Metric, Study
from infotok_lit.study.record import CellResult, Curve
from infotok_lit.study.statistics import (
    MOST_SEEDS,
    Comparison,
    Decision,
    Estimate,
    Seeds,
    compare,
    decide,
    estimate,
    steps_to,
)
from infotok_lit.tables import Table

ARROWS = {"higher": " ↑", "lower": " ↓", "none": ""}
ESTIMATE = ("n", "mean", "sd", "ci_low", "ci_high")
"""The columns of an estimate, where its numbers are in full."""


class Summary:
    """What the finished cells of the rows measured, over their seeds."""

    def __init__(self, study: Study, results: Sequence[CellResult]) -> None:
        self.study = study
        finished = [result for result in results if result.record.state == "finished"]
        self.results = {row: {r.cell.seed: r for r in finished if r.cell.variant == row} for row in study.rows}

    def seeds(self, row: str, metric: str) -> Seeds:
        """Seed -> value of a metric, where it has one that is finite."""
        known = {seed: of.values.get(metric, math.nan) for seed, of in self.results[row].items()}
        return {seed: value for seed, value in known.items() if math.isfinite(value)}

    def endpoint(self, row: str) -> Seeds:
        """Seed -> the mean of the metrics that the study is to decide about."""
        metrics = [self.seeds(row, name) for name in self.study.analysis.endpoint]
        whole = [seed for seed in self.results[row] if all(seed in values for values in metrics)]
        return {seed: fmean(values[seed] for values in metrics) for seed in whole}

    def endpoint_curve(self, row: str, seed: int) -> Curve:
        """Step -> the endpoint, where the run has measured all of it."""
        tags = [self.study.metrics[name].tag for name in self.study.analysis.endpoint]
        curves = [self.results[row][seed].curves[tag] for tag in tags]
        means = {step: fmean(curve[step] for curve in curves) for step in set.intersection(*map(set, curves))}
        return {step: mean for step, mean in means.items() if math.isfinite(mean)}

    def estimate(self, row: str, metric: str) -> Estimate | None:
        """A metric over the seeds of a row."""
        return estimate(self.seeds(row, metric), self.study.confidence)

    def compare(self, row: str, metric: str, reference: str) -> Comparison | None:
        """A metric of a row against a reference; None for the row itself."""
        if row == reference:
            return None
        return compare(self.seeds(row, metric), self.seeds(reference, metric), self.study.confidence)

    def best(self, metric: str) -> set[str]:
        """The rows with the best mean of a metric that is judged; several where they are equal."""
        means = {row: of.mean for row in self.study.rows if (of := self.estimate(row, metric)) is not None}
        better = self.study.metrics[metric].better
        if better == "none" or not means:
            return set()
        top = (max if better == "higher" else min)(means.values())
        return {row for row, mean in means.items() if mean == top}


def judged(study: Study) -> dict[str, Metric]:
    """The metrics of which more or less is better."""
    return {name: metric for name, metric in study.metrics.items() if metric.better != "none"}


def full_table(summary: Summary) -> Table:
    """One line per row and metric, with every number in full."""
    references = summary.study.compared_with
    differences = [f"minus_{reference}_{column}" for reference in references for column in (*ESTIMATE, "p")]
    lines: list[list[object]] = []
    for metric in summary.study.metrics:
        for row in summary.study.rows:
            line = [row, metric, *in_full(summary.estimate(row, metric))]
            for reference in references:
                compared = summary.compare(row, metric, reference)
                line += [*in_full(compared and compared.difference), compared and compared.p_value]
            lines.append(line)
    return Table("", ["row", "metric", *ESTIMATE, *differences], lines)


def in_full(of: Estimate | None) -> list[object]:
    """The numbers of an estimate, by ESTIMATE."""
    if of is None:
        return [None] * len(ESTIMATE)
    ends = [None, None] if of.margin is None else [of.mean - of.margin, of.mean + of.margin]
    return [of.count, of.mean, of.sd, *ends]


def means_table(summary: Summary, emphasis: str = "") -> Table:
    """Means with confidence intervals; the best ones between `emphasis`."""
    study = summary.study
    lines: list[list[object]] = []
    for row in study.rows:
        marks = {name: emphasis if row in summary.best(name) else "" for name in study.metrics}
        seeds = len(summary.results[row])
        means = [f"{marks[name]}{_shown(summary.estimate(row, name), seeds)}{marks[name]}" for name in study.metrics]
        lines.append([row, f"{seeds}/{len(study.seeds_of(row))}", *means])
    return Table("Means over seeds", ["row", "seeds", *_titles(study.metrics)], lines)


def paper_table(summary: Summary) -> Table:
    """Means of the rows and metrics that repeat the paper's, each row above what the paper prints of it."""
    metrics = {name: metric.paper for name, metric in summary.study.metrics.items() if metric.paper is not None}
    lines: list[list[object]] = []
    for name, row in summary.study.rows.items():
        if row.paper is not None and metrics:
            theirs = paper_scores(row.paper)
            seeds = len(summary.results[name])
            lines.append([name, *(_shown(summary.estimate(name, metric), seeds) for metric in metrics)])
            lines.append([f"{row.paper} (paper)", *(printed(of, theirs.get(of)) for of in metrics.values())])
    return Table("Beside the paper's numbers", ["row", *metrics], lines)


def difference_table(summary: Summary, reference: str) -> Table:
    """Paired differences of every row to a reference, with confidence intervals and tests."""
    metrics = judged(summary.study)
    lines: list[list[object]] = []
    for row in summary.study.rows:
        if row != reference:
            compared = [summary.compare(row, name, reference) for name in metrics]
            lines.append([row, *(_shown_difference(each, len(summary.results[row])) for each in compared)])
    return Table(f"Differences to {reference}, seed by seed", ["row", *_titles(metrics)], lines)


def decisions(summary: Summary) -> list[tuple[str, str, Decision]]:
    """What each planned comparison decides: (row, reference, decision)."""
    analysis, study = summary.study.analysis, summary.study
    compared = [
        compare(summary.endpoint(row), summary.endpoint(reference), study.confidence)
        for row, reference in analysis.contrasts
    ]
    decided = decide(compared, analysis.margin, analysis.level, analysis.power)
    return [(*pair, decision) for pair, decision in zip(analysis.contrasts, decided, strict=True)]


def steps_to_reference(summary: Summary, row: str, reference: str) -> list[float]:
    """Per common seed, the step at which a row reaches the last endpoint of a reference; infinite if it never does."""
    better = summary.study.metrics[summary.study.analysis.endpoint[0]].better
    goals = {seed: goal for seed, goal in summary.endpoint(reference).items() if seed in summary.endpoint(row)}
    found = [steps_to(summary.endpoint_curve(row, seed), goal, better) for seed, goal in goals.items()]
    return [math.inf if step is None else step for step in found]


def decision_table(summary: Summary, full: bool = False) -> Table:
    """The planned comparisons; `full`: with every number in full, for a file."""
    lines: list[list[object]] = []
    for row, reference, each in decisions(summary):
        steps = steps_to_reference(summary, row, reference)
        middle, reached = median(steps) if steps else None, sum(map(math.isfinite, steps))
        compared = each.comparison
        difference = compared and compared.difference
        tests = (compared and compared.p_value, each.corrected, each.equivalence)
        end = (each.verdict, _needed(each))
        if full:
            shown = [*in_full(difference), *tests, each.verdict, each.seeds_needed, middle, reached]
        elif difference is None:
            shown = ["0", *[""] * 4, *end, ""]
        else:
            typical = f"{middle:,.0f}" if math.isfinite(middle) else f"> {summary.study.steps:,}"
            when = f"{typical} ({reached} of {len(steps)})" if reached else "never"
            shown = [
                str(difference.count),
                _signed(difference),
                *map(p_value, tests),
                each.verdict,
                _needed(each),
                when,
            ]
        lines.append([f"{row} - {reference}", *shown])
    header = ["contrast", "n", "difference", "p", "p (Holm)", "p (equivalence)", "verdict", "seeds needed", "steps"]
    if full:
        header = [*header[:1], *ESTIMATE, "p", "p_holm", "p_equivalence", "verdict", "seeds_needed", "steps", "reached"]
    return Table("What was to be decided", header, lines)


def controls(summary: Summary) -> list[str]:
    """A sentence for each control: whether it equals its row in every judged metric."""
    said = []
    for name, row in summary.study.rows.items():
        if row.control_of is None:
            continue
        pairs = [
            (own.values[metric], summary.results[row.control_of][seed].values[metric])
            for seed, own in summary.results[name].items()
            if seed in summary.results[row.control_of]
            for metric in judged(summary.study)
            if metric in own.values and metric in summary.results[row.control_of][seed].values
        ]
        # As both may be NaN, and max() overlooks one that is not its first.
        apart = [abs(own - other) for own, other in pairs if not (math.isnan(own) and math.isnan(other))]
        largest = max((math.inf if math.isnan(each) else each for each in apart), default=0.0)
        verdict = "has nothing to be compared with yet" if not pairs else f"differs by up to {largest:.3g}"
        said.append(f"Control: {name} {f'equals {row.control_of}' if pairs and largest == 0 else verdict}.")
    return said


def number(value: float) -> str:
    """Three decimals, or three significant digits where that says more."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.1 else f"{value:.3g}"


def p_value(value: float | None) -> str:
    """A p-value with three decimals."""
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _needed(of: Decision) -> str:
    """The seeds that would decide what is undecided."""
    if of.verdict != "undecided" or of.seeds_needed is None:
        return "unknown" if of.verdict == "undecided" else ""
    return f"{of.seeds_needed:,}" if math.isfinite(of.seeds_needed) else f"> {MOST_SEEDS:,}"


def _titles(metrics: dict[str, Metric]) -> list[str]:
    return [name + ARROWS[metric.better] for name, metric in metrics.items()]


def _shown(of: Estimate | None, seeds: int) -> str:
    """A mean with its interval; and of how many seeds, where a row has finished more."""
    if of is None:
        return ""
    margin = "" if of.margin is None else f" ± {number(of.margin)}"
    return f"{number(of.mean)}{margin}" + (f" (n = {of.count})" if of.count < seeds else "")


def _signed(difference: Estimate) -> str:
    margin = "" if difference.margin is None else f" ± {number(difference.margin)}"
    return f"{'+' if difference.mean >= 0 else '-'}{number(abs(difference.mean))}{margin}"


def _shown_difference(of: Comparison | None, seeds: int) -> str:
    """A difference with its test; and over how many seeds, where the row has finished more."""
    if of is None:
        return ""
    known = [] if of.p_value is None else [f"p {'' if of.p_value < 0.001 else '= '}{p_value(of.p_value)}"]
    known += [f"n = {of.difference.count}"] if of.difference.count < seeds else []
    return _signed(of.difference) + (f" ({', '.join(known)})" if known else "")
