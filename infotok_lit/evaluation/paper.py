"""The numbers of the paper's tables, to stand beside ours, and which of them cannot be."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

from infotok_lit.assets import BENCHMARKS

TABLES = BENCHMARKS / "paper_tables.json"
SOURCE = "arXiv 2602.01554"
PER_TAG = 40
"""Images of each GenEval++ tag: one for each of its prompts."""
ROUNDING = 0.005
"""How far a printed value may lie from the measured one."""


@dataclass(frozen=True)
class PaperRow:
    """One model in one of the paper's tables."""

    model: str
    base: str
    variant: str
    scores: dict[str, float]
    """Column, such as GenEval/counting -> value: fractions, MME in points, FID as it is."""
    size: str | None = None


def paper_rows(columns: Iterable[str]) -> list[PaperRow]:
    """Every model that the paper reports in one of the columns, once each."""
    wanted = set(columns)
    found: dict[tuple[str, str, str | None], PaperRow] = {}
    for table in json.loads(TABLES.read_text(encoding="utf-8"))["tables"].values():
        for row in map(lambda entry: PaperRow(**entry), table["rows"]):
            scores = {column: value for column, value in row.scores.items() if column in wanted}
            # Table 5 repeats rows of the others without their size.
            known = any((row.base, row.variant) == key[:2] for key in found) and row.size is None
            if scores and not known:
                found.setdefault((row.base, row.variant, row.size), replace(row, scores=scores))
    return list(found.values())


def impossible(column: str, value: float) -> bool:
    """Whether no run of the benchmark as published can give a value: one image each for 40 prompts gives fortieths."""
    benchmark, _, tag = column.partition("/")
    if benchmark != "GenEval++" or tag in ("", "overall"):
        return False
    nearest = round(value * PER_TAG) / PER_TAG
    return abs(value - nearest) > ROUNDING + 1e-9
