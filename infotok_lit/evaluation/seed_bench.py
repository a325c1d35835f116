"""SEED-Bench, its image part: four options, nine dimensions (Li et al., 2023, arXiv 2307.16125).

Two benchmarks on one file: `seed` asks for a letter, as most papers do; `seed_likelihood` takes the option that the
model finds likeliest, as its authors do. The video part (dimensions 10 to 12) is left out.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from infotok_lit.evaluation.benchmark import (
    Benchmark,
    Question,
    Rules,
    Score,
    average,
    require,
    rule_named,
    scores_by,
)
from infotok_lit.evaluation.records import Row, checked, read_json, to_lines
from infotok_lit.evaluation.tables import Table, TableImage
from infotok_lit.files import write_whole

LETTERS = ("A", "B", "C", "D")
FIELDS = {
    "question_id": str | int, "data_id": str | int, "data_type": str, "question": str, "answer": LETTERS,
    "question_type_id": str | int,
} | {f"choice_{letter.lower()}": str | int | float for letter in LETTERS}  # fmt: skip
SUFFIX = "\nAnswer with the option's letter from the given choices directly."
MARKS = ".()[],:;!*#{}"
"""What VLMEvalKit reads as white space between words."""
QUESTIONS = "SEED-Bench.json"
IMAGES = "SEED-Bench-image"


def official(reply: str, options: Sequence[str]) -> str | None:
    """The reply must be the letter. There is no official rule for letters: this is LLaVA's."""
    return reply if reply in LETTERS else None


def lmms_eval(reply: str, options: Sequence[str]) -> str | None:
    """The first character, whatever word it begins."""
    first = reply.strip()[:1].upper()
    return first if first in LETTERS else None


def vlmevalkit(reply: str, options: Sequence[str]) -> str | None:
    """The only letter that is a word, if it is among the last four; else the first one after "answer is"; else, unless
    the reply is more than twice as long as all options together, the only option whose text occurs."""
    words = reply.translate(str.maketrans(dict.fromkeys(MARKS, " "))).split()
    alone = [letter for letter in LETTERS if letter in words]
    if len(alone) == 1 and words.index(alone[0]) >= len(words) - 4:
        return alone[0]
    said = re.search(r"answer\s+is\s+\**([A-D])", reply, re.IGNORECASE)
    if said:
        return said[1].upper()
    named = [letter for letter, text in zip(LETTERS, options, strict=True) if text.lower() in reply.lower()]
    return named[0] if len(named) == 1 and len(reply) <= 2 * sum(map(len, options)) else None


class SeedBench(Benchmark):
    """Letters.

    Args:
        folder: SEED-Bench.json with SEED-Bench-image/, or a Hugging Face dataset folder.
    """

    name = "seed"
    title = "SEED-Bench, images"
    headline = "accuracy"
    paper = {"accuracy": "SEED"}
    RULES = {"official": official, "lmms-eval": lmms_eval, "vlmevalkit": vlmevalkit}
    size = 14_233
    fetch = (
        f"From https://huggingface.co/datasets/AILab-CVC/SEED-Bench (CC BY-NC 4.0) put {QUESTIONS} and {IMAGES}/ to "
        "DATA/seed, or download `hf download lmms-lab/SEED-Bench --repo-type dataset --local-dir DATA/seed`."
    )

    def __init__(self, folder: Path, rules: Rules = "official") -> None:
        self.rule, self.rules = rule_named(self, rules), rules
        self.folder = require(folder, type(self))
        self.table: Table | None = None
        if (folder / QUESTIONS).is_file():
            self.sources = (folder / QUESTIONS,)
            content = read_json(folder / QUESTIONS)
            rows = checked(content.get("questions") if isinstance(content, dict) else None, self.sources[0], FIELDS)
        else:
            self.table = Table(folder, ("image",), "test", FIELDS, self.fetch)
            self.sources = self.table.files
            rows = self.table.rows
        placed = [row | {"place": number} for number, row in enumerate(rows) if row["data_type"] == "image"]
        self.records = _by_id(placed)
        self.image_places = {str(record["data_id"]): record["place"] for record in self.records.values()}

    def questions(self) -> Sequence[Question]:
        asked = []
        for name, record in self.records.items():
            options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, _options(record), strict=True))
            image = str(record["data_id"])
            asked.append(Question(name, f"{record['question']}\n{options}{SUFFIX}", (image,), image))
        return asked

    def image_source(self, name: str) -> Path | TableImage:
        if self.table is not None:
            return TableImage(self.table, self.image_places[name])
        plain = self.folder / IMAGES / name
        found = [plain, *(plain.with_name(plain.name + suffix) for suffix in (".jpg", ".png"))]
        return next((file for file in found if file.is_file()), plain)

    def grade(self, rows: Sequence[Row]) -> list[Row]:
        graded = []
        for row in rows:
            record = self.records[row["id"]]
            parsed = self._choice(row, _options(record))
            dimension = f"dimension {record['question_type_id']}"
            score = float(parsed == record["answer"])
            graded.append(row | {"label": record["answer"], "part": dimension, "parsed": parsed, "score": score})
        return graded

    def _scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        """Over all image questions, and per dimension."""
        return {"accuracy": average(row["score"] for row in rows), **scores_by(rows, "part")}

    def write_official(self, folder: Path, rows: Sequence[Row]) -> None:
        """One line per question, as the leaderboard wants them."""
        lines = [
            {"question_id": str(self.records[row["id"]]["question_id"]), "prediction": row["parsed"] or ""}
            for row in rows
        ]
        write_whole(folder / "results.jsonl", to_lines(lines).encode())

    def _choice(self, row: Row, options: Sequence[str]) -> str | None:
        return self.rule(row["answer"], options)


class SeedBenchLikelihood(SeedBench):
    """The likeliest of the four options as an answer to the bare question, per token."""

    name = "seed_likelihood"
    title = "SEED-Bench, images, by likelihood"
    RULES = {"official": None}

    def questions(self) -> Sequence[Question]:
        return [
            Question(name, record["question"], (str(record["data_id"]),), str(record["data_id"]), _options(record))
            for name, record in self.records.items()
        ]

    def _choice(self, row: Row, options: Sequence[str]) -> str | None:
        values = row["likelihoods"]
        return LETTERS[values.index(max(values))]


def _by_id(rows: Sequence[Row]) -> dict[str, Row]:
    """The rows by their question_id; ID#2 where it is another's already. Each row is a question that counts."""
    found: dict[str, Row] = {}
    for row in rows:
        name, number = str(row["question_id"]), 1
        while (key := name if number == 1 else f"{name}#{number}") in found:
            number += 1
        found[key] = row
    return found


def _options(record: Row) -> tuple[str, ...]:
    return tuple(str(record[f"choice_{letter.lower()}"]) for letter in LETTERS)
