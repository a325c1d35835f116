"""GQA, the balanced test-development questions (Hudson and Manning, 2019, arXiv 1902.09506)."""

import string
from collections.abc import Sequence
from pathlib import Path

from infotok_lit.evaluation.benchmark import Benchmark, Question, Rules, Score, average, require, rule_named
from infotok_lit.evaluation.records import Row, by_name, checked, read_json
from infotok_lit.evaluation.tables import Table, TableImage
from infotok_lit.files import write_json

QUESTIONS = "testdev_balanced_questions.json"
FIELDS = {"imageId": str, "question": str, "answer": str}
SUFFIX = "\nAnswer the question using a single word or phrase."


def official(answer: str, truth: str) -> bool:
    """Exact equality, once full stops at the end are gone and letters are small, as LLaVA's conversion has it."""
    return answer.strip().rstrip(".").lower() == truth


def lmms_eval(answer: str, truth: str) -> bool:
    """Without case and without ASCII punctuation, on both sides."""
    answer, truth = (text.lower().translate(str.maketrans("", "", string.punctuation)) for text in (answer, truth))
    return answer.strip() == truth.strip()


def vlmevalkit(answer: str, truth: str) -> bool:
    """But for case and white space at the ends; a full stop is wrong."""
    return answer.strip().lower() == truth.strip().lower()


class Gqa(Benchmark):
    """12,578 questions about 398 images; the score is the share of answers that equal the truth.

    Args:
        folder: the official questions with images/IMAGEID.jpg, or the two folders of the Hugging Face copy.
    """

    name = "gqa"
    title = "GQA"
    headline = "accuracy"
    paper = {"accuracy": "GQA"}
    RULES = {"official": official, "lmms-eval": lmms_eval, "vlmevalkit": vlmevalkit}
    size = 12_578
    fetch = (
        f"From https://cs.stanford.edu/people/dorarad/gqa/download.html put {QUESTIONS} and images/ to DATA/gqa, or "
        "download `hf download lmms-lab/GQA --repo-type dataset --include 'testdev_balanced*' --local-dir DATA/gqa`."
    )

    def __init__(self, folder: Path, rules: Rules = "official") -> None:
        self.rule, self.rules = rule_named(self, rules), rules
        self.folder = require(folder, type(self))
        self.table: Table | None = None
        official_file = folder / QUESTIONS
        if official_file.is_file():
            self.sources = (official_file,)
            self.records = checked(read_json(official_file), official_file, FIELDS, dict)
        else:
            where = require(folder / "testdev_balanced_instructions", type(self))
            asked = Table(where, fields=FIELDS | {"id": str}, fetch=self.fetch)
            self.sources = asked.files
            self.records = by_name(asked.rows, "id", where)
            where = require(folder / "testdev_balanced_images", type(self))
            self.table = Table(where, ("image",), fields={"id": str}, fetch=self.fetch)
            self.places = {row["id"]: number for number, row in enumerate(self.table.rows)}

    def questions(self) -> Sequence[Question]:
        return [
            Question(name, record["question"] + SUFFIX, (record["imageId"],), record["imageId"])
            for name, record in self.records.items()
        ]

    def image_source(self, name: str) -> Path | TableImage:
        if self.table is None:
            return self.folder / "images" / f"{name}.jpg"
        # One that the table lacks is a file that is not there.
        return TableImage(self.table, self.places[name]) if name in self.places else self.table.folder / name

    def grade(self, rows: Sequence[Row]) -> list[Row]:
        graded = []
        for row in rows:
            truth = self.records[row["id"]]["answer"]
            parsed = row["answer"].strip() or None
            graded.append(row | {"label": truth, "parsed": parsed, "score": float(self.rule(row["answer"], truth))})
        return graded

    def _scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        return {"accuracy": average(row["score"] for row in rows)}

    def write_official(self, folder: Path, rows: Sequence[Row]) -> None:
        """The predictions for the official `eval.py`: answers as LLaVA's conversion leaves them."""
        predictions = [
            {"questionId": row["id"], "prediction": row["answer"].strip().rstrip(".").lower()} for row in rows
        ]
        write_json(folder / "testdev_balanced_predictions.json", predictions)
