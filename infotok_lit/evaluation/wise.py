"""WISE: prompts that need knowledge of the world (Niu et al., 2025, arXiv 2503.07265).

Two protocols that cannot be compared: `wise`, that of the papers until 2026 (three grades of 0 to 2 by
gpt-4o-2024-05-13), and `wise_verified`, that of 2026 (right or wrong by Qwen3.5-35B-A3B, with 668 other prompts).
No licence lets its files be passed on, so prompts come from the user and the judge's instructions are ours.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from infotok_lit.errors import DataError
from infotok_lit.evaluation.benchmark import Benchmark, Drawing, Score, require, scores_by
from infotok_lit.evaluation.endpoint import Endpoint
from infotok_lit.evaluation.judge import JudgeGrader, image_part, text_part
from infotok_lit.evaluation.records import Row, by_name, checked, read_json, read_json_lines, to_lines
from infotok_lit.files import write_whole

GRADES = {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1}
"""Grade -> its weight in WiScore; each is 0, 1 or 2."""

FIELDS = {"prompt_id": int, "Prompt": str, "Explanation": str, "Subcategory": str}
"""Of a prompt."""

NUMBER = r"[\s*_:=]*(-?[0-9]+(?:\.[0-9]+)?)"
"""After its name, perhaps in bold."""

INSTRUCTIONS = """You grade an image that was drawn from a text. The text does not say directly what should be seen; \
the explanation does.

Text: "{prompt}"
Explanation: "{explanation}"

Give three grades, each 0, 1 or 2. Be very strict: give 2 only where nothing at all could be better, and the lower \
grade wherever you doubt.
- Consistency: does the image show what text and explanation mean? 0: the main things are missing or contradicted; \
1: some are there, some missing or inexact; 2: everything, without exception.
- Realism: could it be a photograph? 0: physically impossible or plainly artificial; 1: small flaws; 2: no flaw in \
light, matter, space or physics.
- Aesthetic quality: 0: ugly; 1: pleasant and ordinary; 2: the work of a master.

Answer with these three lines and nothing else:
Consistency: <grade>
Realism: <grade>
Aesthetic Quality: <grade>"""

VERIFIED_INSTRUCTIONS = """An image was drawn from a text that does not say directly what should be seen; the \
explanation does.

Text: "{prompt}"
Explanation: "{explanation}"

Does the image correctly and plainly show what the explanation says? Judge the content only, not the style.
Answer with one line and nothing else: "Score: 1" if it does, "Score: 0" if it does not."""


class Wise(Benchmark):
    """The protocol of the papers until 2026: WiScore.

    Args:
        folder: the three official prompt files, in it or in `files_in`.
        endpoint: the judge; without one the images are only drawn.
    """

    name = "wise"
    title = "WISE (legacy protocol)"
    rewritten = False
    paper = {"overall": "WISE/overall"}
    size = 1000
    fetch = (
        "Clone https://github.com/PKU-YuanGroup/WISE and copy its prompt folder (WISE_legacy/data for wise, "
        "data_verified for wise_verified) to DATA/wise or DATA/wise_verified."
    )
    instructions = INSTRUCTIONS
    max_judge_tokens = 2000
    stored: ClassVar[Sequence[str]] = tuple(GRADES)
    """What an official result line says."""
    files: ClassVar[Sequence[str]] = (
        "cultural_common_sense.json", "spatio-temporal_reasoning.json", "natural_science.json",
    )  # fmt: skip
    last_ids: ClassVar[Mapping[str, int]] = {
        "culture": 400, "time": 567, "space": 700, "biology": 800, "physics": 900, "chemistry": 1000,
    }  # fmt: skip
    """Category -> its last prompt id; ids start at 1."""

    def __init__(self, folder: Path, seed: int = 0, endpoint: Endpoint | None = None) -> None:
        inner = folder / "data"
        where = inner if inner.is_dir() else folder
        self.sources = [require(where / file, type(self)) for file in self.files]
        self.seed = seed
        prompts = [prompt for file in self.sources for prompt in checked(read_json(file), file, FIELDS)]
        self.prompts = {int(number): prompt for number, prompt in by_name(prompts, "prompt_id", where).items()}
        for number in self.prompts:
            self.category(number)
        self.grader = None if endpoint is None else JudgeGrader(endpoint, self, (0.0, 0.0, 0.0))

    def drawings(self) -> Sequence[Drawing]:
        return [
            Drawing(str(number), prompt["Prompt"], self.seed + number, f"images/{number}.png", str(number))
            for number, prompt in self.prompts.items()
        ]

    def judge_content(self, row: Row, folder: Path) -> list[dict[str, Any]]:
        prompt = self.prompts[int(row["id"])]
        text = self.instructions.format(prompt=prompt["Prompt"], explanation=prompt["Explanation"])
        return [text_part(text), image_part(folder / row["image"])]

    def read_verdict(self, text: str) -> dict[str, float] | None:
        """The three grades; None unless all are there and 0, 1 or 2."""
        found = re.findall(rf"(consistency|realism|aesthetic quality){NUMBER}", text, re.IGNORECASE)
        grades = {name.lower().replace(" ", "_"): float(value) for name, value in found}
        good = set(grades) == set(GRADES) and set(grades.values()) <= {0, 1, 2}
        return grades if good else None

    def value(self, reading: Any) -> float:
        """WiScore in [0, 1] of one image."""
        return sum(weight * reading[name] for name, weight in GRADES.items()) / 2

    def grade(self, rows: Sequence[Row]) -> list[Row]:
        """An image whose verdict could not be read has no score: the official sum wants all of them."""
        graded = []
        for row in rows:
            reading = (row.get("verdict") or {}).get("reading")
            score = None if reading is None else self.value(reading)
            graded.append(row | {"part": self.category(int(row["id"])), "score": score})
        return graded

    def _scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        """Per category, and `overall`: the official weights are the categories' shares of the 1,000 images."""
        found = scores_by(rows, "part")
        parts = {name: found[name] for name in self.last_ids if name in found}
        # Each category weighs what its share of the 1,000 prompts is, also while some images have no verdict.
        bounds = [0, *self.last_ids.values()]
        weights = {name: end - start for name, (start, end) in zip(self.last_ids, pairwise(bounds), strict=True)}
        total = sum(weights[name] * part.value for name, part in parts.items()) / sum(weights[name] for name in parts)
        return {"overall": Score(total, len(rows)), **parts}

    def category(self, number: int) -> str:
        """Of a prompt id; DataError for one that is not from 1 to 1000."""
        found = [name for name, last in self.last_ids.items() if 0 < number <= last]
        if not found:
            raise DataError(f"{self.title} has no prompt_id {number}: they go from 1 to {max(self.last_ids.values())}")
        return found[0]

    def aggregate(self, files: Sequence[Path]) -> list[Row]:
        """From the official result lines: `prompt_id` and the grades; others than 0, 1 and 2 stand for a failure."""
        rows = {}
        fields = {"prompt_id": int} | dict.fromkeys(self.stored, int | float)
        for entry in (entry for file in files for entry in checked(read_json_lines(file), file, fields)):
            reading = self.stored_reading(entry)
            row = {"id": str(entry["prompt_id"]), "group": str(entry["prompt_id"])}
            rows[row["id"]] = row | {"verdict": {"reading": reading}}
        return self.grade(list(rows.values()))

    def stored_reading(self, entry: Row) -> Any:
        """The verdict in an official result line; None for a failure."""
        grades = {name: float(entry[name]) for name in GRADES}
        return grades if set(grades.values()) <= {0, 1, 2} else None

    def write_official(self, folder: Path, rows: Sequence[Row]) -> None:
        """scores.jsonl for the official calculation, of the images that have verdicts."""
        lines = []
        for row in rows:
            if row["score"] is not None:
                number, grades = int(row["id"]), self.official_grades(row["verdict"]["reading"])
                lines.append({"prompt_id": number, "Subcategory": self.prompts[number]["Subcategory"]} | grades)
        path = folder / "scores.jsonl"
        if lines:
            write_whole(path, to_lines(lines).encode())
        else:
            # What another judge gave is not this result's.
            path.unlink(missing_ok=True)

    def official_grades(self, reading: Any) -> Row:
        """The verdict as an official result line says it: the inverse of `stored_reading`."""
        return reading


class WiseVerified(Wise):
    """The protocol of 2026: right or wrong."""

    name = "wise_verified"
    title = "WISE Verified"
    paper = {}
    instructions = VERIFIED_INSTRUCTIONS
    max_judge_tokens = 64
    stored = ("score",)
    files = tuple(file.replace(".json", "_verified.json") for file in Wise.files)
    last_ids = {"culture": 400, "time": 520, "space": 640, "biology": 760, "physics": 880, "chemistry": 1000}

    def read_verdict(self, text: str) -> int | None:
        found = re.findall(rf"score{NUMBER}", text, re.IGNORECASE)
        return int(found[-1]) if found and found[-1] in ("0", "1") else None

    def value(self, reading: Any) -> float:
        return float(reading)

    def stored_reading(self, entry: Row) -> Any:
        return int(entry["score"]) if entry["score"] in (0, 1) else None

    def official_grades(self, reading: Any) -> Row:
        return {"score": reading}
