"""GenEval 2: 800 prompts of three to ten atoms (Kamath et al., 2025, arXiv 2512.16853), in the layout of its scorer.

The scorer (`evaluation.py`, Soft-TIFA with a vision model) reads a JSON file that maps prompts to image files. Its
data is under CC BY-NC 4.0, so it comes from the user.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from infotok_lit.errors import DataError
from infotok_lit.evaluation.benchmark import Benchmark, Drawing, Score, average, require
from infotok_lit.evaluation.records import Row, checked, read_json_lines, read_list
from infotok_lit.files import write_json

FILE = "geneval2_data.jsonl"
PATHS = "image_paths.json"
ROUNDING = 1e-3
"""How far above 1 a score may lie: the scorer adds up the probabilities of several spellings of an answer."""


class GenEval2(Benchmark):
    """One image per prompt; scores come from the official score lists.

    Args:
        folder: holds geneval2_data.jsonl.
    """

    name = "geneval2"
    title = "GenEval 2"
    rewritten = False
    headline = "soft_tifa_gm"
    size = 800
    fetch = f"Put {FILE} of https://github.com/facebookresearch/GenEval2 to DATA/geneval2."

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.sources, self.seed = [require(folder / FILE, type(self))], seed
        self.prompts = checked(read_json_lines(folder / FILE), folder / FILE, {"prompt": str, "skills": list})
        for number, entry in enumerate(self.prompts, 1):
            if not entry["skills"] or not all(isinstance(skill, str) for skill in entry["skills"]):
                raise DataError(f"row {number} of {folder / FILE}: skills is no list of names")

    def drawings(self) -> Sequence[Drawing]:
        return [
            Drawing(str(number), entry["prompt"], self.seed + number, f"images/{number:05d}.png", str(number))
            for number, entry in enumerate(self.prompts)
        ]

    def _scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        """Soft-TIFA: each prompt's geometric mean over its questions, averaged; the same with the arithmetic mean;
        and per skill, over questions."""
        skills: dict[str, list[float]] = {}
        for row in rows:
            for skill, value in zip(row["skills"], row["atoms"], strict=True):
                skills.setdefault(skill, []).append(value)
        return {
            "soft_tifa_gm": average(row["score"] for row in rows),
            "soft_tifa_am": average(average(row["atoms"]).value for row in rows),
            **{skill: average(values) for skill, values in sorted(skills.items())},
        }

    def write_official(self, folder: Path, rows: Sequence[Row]) -> None:
        """image_paths.json, for `--image_filepath_data`."""
        write_json(folder / PATHS, {row["prompt"]: str((folder / row["image"]).resolve()) for row in rows})

    def aggregate(self, files: Sequence[Path]) -> list[Row]:
        """From the official score lists: for each prompt in order, one score per question."""
        lists = [scores for file in files for scores in read_list(file)]
        if len(lists) != len(self.prompts):
            raise DataError(f"there are {len(self.prompts)} prompts in {FILE}, and {len(lists)} score lists")
        for number, (entry, scores) in enumerate(zip(self.prompts, lists, strict=True), 1):
            if not (isinstance(scores, list) and len(scores) == len(entry["skills"]) and all(map(_is_share, scores))):
                raise DataError(
                    f"score list {number} is {scores!r:.60}, not {len(entry['skills'])} numbers from 0 to 1"
                )
        return [
            {
                "id": str(number),
                "group": str(number),
                "skills": entry["skills"],
                "atoms": scores,
                "score": math.prod(scores) ** (1 / len(scores)),
            }
            for number, (entry, scores) in enumerate(zip(self.prompts, lists, strict=True))
        ]


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1 + ROUNDING
