"""What is kept of an evaluation: items.jsonl, result.json, and a Markdown table beside the paper's rows."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from infotok_lit import __version__
from infotok_lit.evaluation.benchmark import Benchmark
from infotok_lit.evaluation.paper import IMPOSSIBLE, SOURCE, paper_rows, printed
from infotok_lit.evaluation.records import Row, to_lines
from infotok_lit.evaluation.running import Progress
from infotok_lit.files import write_json, write_whole

BLOCKS = 100
"""The most parts that are left out in turn for a standard error."""


@dataclass(frozen=True)
class Result:
    """The scores of one model on one benchmark."""

    model: str
    benchmark: Benchmark
    content: dict[str, Any]
    """What result.json holds."""

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """Name -> value, n and standard error."""
        return self.content["scores"]


def summarise(
    benchmark: Benchmark, rows: Sequence[Row], model: Mapping[str, Any], progress: Progress
) -> dict[str, Any]:
    """The content of result.json.

    Args:
        rows: graded.
        model: its description.
        progress: what this process has done.
    """
    errors = standard_errors(benchmark, rows)
    answered = [row for row in rows if "parsed" in row]
    grader, verdicts = benchmark.grader, [row["verdict"] for row in rows if "verdict" in row]
    graded, ungraded = (sum((row["score"] is None) == none for row in rows if "score" in row) for none in (False, True))
    items = [*benchmark.drawings(), *benchmark.questions()]
    covered = len({row["group"] for row in rows}) == len({item.group for item in items})
    return {
        "benchmark": benchmark.name,
        "scores": {
            name: {"value": score.value, "n": score.n, "standard_error": errors.get(name)}
            for name, score in benchmark.scores(rows).items()
        },
        "rows": len(rows),
        "graded": graded,
        "complete": covered and not ungraded,
        "shortfall": benchmark.shortfall(),
        "unparsed": sum(row["parsed"] is None for row in answered) / len(answered) if answered else None,
        "grader": None if grader is None else {"name": grader.name, **grader.facts(verdicts)},
        **benchmark.facts,
        "model": dict(model),
        "per_second": {stage: made / progress.seconds[stage] for stage, made in progress.made.items()},
        "versions": _versions(),
    }


def standard_errors(benchmark: Benchmark, rows: Sequence[Row], blocks: int = BLOCKS) -> dict[str, float]:
    """Score -> its standard error, by a delete-a-group jackknife; none for a score that rests on one group.

    The images of one prompt, and the questions about one image, stand or fall together, so whole groups are left out:
    each alone, or in equal blocks where there are many. For a mean of independent rows this is s / sqrt(n) exactly, of
    one category too; it holds as well for F1, for MME's pairs and for means of means.
    """
    errors = {name: _jackknife(values.values()) for name, values in _replicates(benchmark, rows, blocks).items()}
    return {name: error for name, error in errors.items() if error is not None}


class Change(NamedTuple):
    """How far a score moved between two runs on the same items."""

    value: float
    error: float | None
    """Its standard error, by the same jackknife: what both runs share does not count."""


def change(benchmark: Benchmark, before: Sequence[Row], now: Sequence[Row], blocks: int = BLOCKS) -> dict[str, Change]:
    """Score -> its change, for the scores that both have."""
    old, new = benchmark.scores(before), benchmark.scores(now)
    was, is_ = _replicates(benchmark, before, blocks), _replicates(benchmark, now, blocks)
    changes = {}
    for name in old.keys() & new.keys():
        error = None
        if was[name].keys() == is_[name].keys():
            error = _jackknife([value - was[name][block] for block, value in is_[name].items()])
        changes[name] = Change(new[name].value - old[name].value, error)
    return changes


def _replicates(benchmark: Benchmark, rows: Sequence[Row], blocks: int) -> dict[str, dict[int, float]]:
    """Score -> its value without each block of groups that it rests on, by the number of the block."""
    groups = {group: number for number, group in enumerate(dict.fromkeys(row["group"] for row in rows))}
    count = min(len(groups), blocks)
    whole = benchmark.scores(rows)
    replicates: dict[str, dict[int, float]] = {name: {} for name in whole}
    for block in range(count if count > 1 else 0):
        kept = [row for row in rows if groups[row["group"]] % count != block]
        for name, score in benchmark.scores(kept).items():
            # A block of other categories leaves a score as it is, and tells nothing about it.
            if score.n < whole[name].n:
                replicates[name][block] = score.value
    return replicates


def _jackknife(values: Collection[float]) -> float | None:
    """The standard error that leave-one-out values tell; None for fewer than two, or where one is no number."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    centre = sum(values) / len(values)
    return math.sqrt((len(values) - 1) / len(values) * sum((value - centre) ** 2 for value in values))


def write_result(folder: Path, result: Result, rows: Sequence[Row]) -> None:
    """Write items.jsonl, result.json and table.md."""
    write_whole(folder / "items.jsonl", to_lines(rows).encode())
    write_json(folder / "result.json", result.content)
    write_whole(folder / "table.md", table([result]).encode())


def table(results: Sequence[Result]) -> str:
    """Results of several models on one benchmark, and the paper's rows below them, in Markdown."""
    benchmark = results[0].benchmark
    names = list(dict.fromkeys(name for result in results for name in result.scores))
    names = names or list(benchmark.paper) or [benchmark.headline]
    names.sort(key=lambda name: name != benchmark.headline)
    lines = [f"**{benchmark.title}**", "", _line(["model", *names]), _line(["---"] * (len(names) + 1))]
    for result in results:
        lines.append(_line([result.model, *(_ours(result.scores.get(name)) for name in names)]))
    columns = [benchmark.paper.get(name) for name in names]
    marked = False
    for row in paper_rows(column for column in columns if column):
        values = [row.scores.get(column) if column else None for column in columns]
        cells = [printed(column, value) for column, value in zip(columns, values, strict=True)]
        marked |= any(cell.endswith("†") for cell in cells)
        # The rows of Table 5 are called after their terms alone, alike for each base.
        model = row.model if row.base in row.model else row.base
        lines.append(_line([f"{model}{f' {row.size}' if row.size else ''}, {row.variant} (paper)", *cells]))
    lines += ["", *_notes(results, marked)]
    return "\n".join(lines) + "\n"


def _notes(results: Sequence[Result], marked: bool) -> list[str]:
    benchmark = results[0].benchmark
    notes = ["± one standard error."]
    if benchmark.paper:
        notes[0] += f" Rows marked (paper) are printed in {SOURCE}; prompts, seeds and scorer are not all stated there."
    if marked:
        notes.append(IMPOSSIBLE)
    shortfall = results[0].content["shortfall"]
    if shortfall is not None:
        notes.append(f"{shortfall[0].upper()}{shortfall[1:]}: scores are not to be set beside others'.")
    for result in results:
        content = result.content
        if not content["complete"]:
            made, graded = content["rows"], content["graded"]
            unjudged = not graded and content["grader"] is None
            why = "name what judges them (docs/evaluation.md)" if unjudged else "not the whole benchmark"
            notes.append(f"{result.model}: {graded} graded of {made} made; {why}.")
        if content["unparsed"] is not None:
            share = f"{content['unparsed']:.1%}"
            notes.append(f"{result.model}: {share} of the answers could not be read ({benchmark.rules} rules).")
    accuracy = (results[0].content["grader"] or {}).get("accuracy")
    if accuracy is not None:
        notes.append(
            f"The images are judged by a program that names {accuracy:.1%} of the objects in true ones rightly."
        )
    return notes


def _ours(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    value, error = score["value"], score["standard_error"]
    digits = 1 if abs(value) > 2 else 3
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"infotok_lit": __version__} | {name: version(name) for name in ("torch", "transformers", "diffusers")}
