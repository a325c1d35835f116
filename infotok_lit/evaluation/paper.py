"""The numbers of the paper's tables, to stand beside ours, and which of them cannot be."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from infotok_lit.assets import BENCHMARKS
from infotok_lit.errors import SettingsError

TABLES = BENCHMARKS / "paper_tables.json"
SOURCE = "arXiv 2602.01554"
PER_TAG = 40
"""Images of each GenEval++ tag: one for each of its prompts."""
ROUNDING = 0.005
"""How far a printed value may lie from the measured one."""
FULL = "infotok_compactness_sufficiency_alignment"
"""What Table 5 calls the variant that is `infotok` in the others."""
IMPOSSIBLE = "† cannot come from 40 prompts with one image each."


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
    for row in _rows():
        scores = {column: value for column, value in row.scores.items() if column in wanted}
        # Table 5 repeats rows of the others without their size.
        known = any((row.base, row.variant) == key[:2] for key in found) and row.size is None
        if scores and not known:
            found.setdefault((row.base, row.variant, row.size), replace(row, scores=scores))
    return list(found.values())


def paper_scores(model: str) -> dict[str, float]:
    """Column -> what the paper reports of `BASE/VARIANT`, such as Harmon/finetune; of the smallest where it has sizes.

    Raises:
        SettingsError: the paper has no such model.
    """
    rows = sorted(_rows(), key=lambda row: float((row.size or "0B").removesuffix("B")))
    models: dict[str, dict[str, float]] = {}
    for row in rows:
        name = f"{row.base}/{FULL if row.variant == 'infotok' else row.variant}"
        models[name] = row.scores | models.get(name, {})
    if model not in models:
        raise SettingsError(f"the paper reports no {model}; it has {', '.join(models)}")
    return models[model]


def paper_columns() -> set[str]:
    """Every column of the paper's tables."""
    return {column for row in _rows() for column in row.scores}


def printed(column: str, value: float | None) -> str:
    """A value of the paper, marked where it cannot be; empty for none."""
    return "" if value is None else f"{value:g}{' †' if impossible(column, value) else ''}"


def impossible(column: str, value: float) -> bool:
    """Whether no run of the benchmark as published can give a value: one image each for 40 prompts gives fortieths."""
    benchmark, _, tag = column.partition("/")
    if benchmark != "GenEval++" or tag in ("", "overall"):
        return False
    nearest = round(value * PER_TAG) / PER_TAG
    return abs(value - nearest) > ROUNDING + 1e-9


def _rows() -> Iterator[PaperRow]:
    for table in json.loads(TABLES.read_text(encoding="utf-8"))["tables"].values():
        yield from (PaperRow(**entry) for entry in table["rows"])
