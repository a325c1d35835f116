"""MM-Vet and MM-Vet v2: open questions graded by a judge (Yu et al., 2023 and 2024, arXiv 2308.02490, 2408.00765).

The paper's column "MMV2" cites the first and is called like the second, so both are here. Questions come from the
user (CC BY-NC 4.0). The official judge is gpt-4-0613; its instructions and examples are restated in our own words.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from infotok_lit.errors import DataError
from infotok_lit.evaluation.benchmark import Benchmark, Question, Score, average, require
from infotok_lit.evaluation.endpoint import Endpoint
from infotok_lit.evaluation.judge import JudgeGrader, text_part
from infotok_lit.evaluation.records import Fields, Row, by_name, checked, read_json
from infotok_lit.evaluation.tables import Table, TableImage
from infotok_lit.files import write_json

FIELDS = {"question": str, "answer": str, "capability": list}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
TEMPERATURES = (0.0, 0.5, 1.0, 1.5, 2.0)
"""As the official script raises them while the judge's answer is no grade."""

INSTRUCTIONS = """Grade a model's answer to a question by comparing it with the truth. In the truth, <AND> joins \
things that must all be in the answer for it to be fully right, and <OR> joins things of which one is enough. <image> \
stands for a picture that you do not see. The grade is one of 0.0, 0.1, 0.2, ... 1.0: 0.0 is fully wrong, 1.0 fully \
right. Complete the last cell of the table with the grade and nothing else.

Question | Truth | Answer | Grade
--- | --- | --- | ---
Which numbers solve the puzzle? | 4 <AND> 9 | It is 7. | 0.0
Which numbers solve the puzzle? | 4 <AND> 9 | 4 | 0.5
Which numbers solve the puzzle? | 4 <AND> 9 | It must be 9 and 4. | 1.0
What is on the table? | cup <OR> mug | A cup of tea. | 1.0
Why is the sign funny? | It forbids signs, and is one itself. | It is a sign with some text on it. | 0.2
"""


class MmVet(Benchmark):
    """The first version: 218 questions, one image each.

    Args:
        folder: the unpacked release: mm-vet.json and images/, or a Hugging Face dataset folder.
        endpoint: the judge; without one the questions are only answered.
    """

    name = "mm_vet"
    title = "MM-Vet"
    headline = "total"
    paper = {"total": "MMV2"}
    max_new_tokens = 512
    graded: ClassVar[Literal["drawings", "questions"]] = "questions"
    instructions = INSTRUCTIONS
    max_judge_tokens = 3
    file: ClassVar[str] = "mm-vet.json"
    more_fields: ClassVar[Fields] = {"imagename": str}
    """That an official record has beside FIELDS."""
    size = 218
    fetch = (
        "Unpack mm-vet.zip from https://github.com/yuweihao/MM-Vet/releases to DATA/mm_vet (v2: mm-vet-v2.zip to "
        "DATA/mm_vet_v2)."
    )

    def __init__(self, folder: Path, endpoint: Endpoint | None = None) -> None:
        self.folder = require(folder, type(self))
        self.table: Table | None = None
        if (folder / self.file).is_file():
            self.sources = [folder / self.file]
            fields = FIELDS | self.more_fields
            self.records = checked(read_json(folder / self.file), folder / self.file, fields, dict)
            for name, record in self.records.items():
                if not all(isinstance(one, str) for one in record["capability"]):
                    raise DataError(f"row {name} of {folder / self.file}: capability is no list of names")
                if "imagename" not in record and not split_question(record["question"])[1]:
                    raise DataError(f"row {name} of {folder / self.file}: there is no image in the question")
        else:
            fields = FIELDS | {"question_id": str, "capability": str}
            self.table = Table(folder, ("image",), "test", fields, self.fetch)
            self.sources = self.table.files
            rows = [
                row | {"capability": row["capability"].split(","), "imagename": str(number)}
                for number, row in enumerate(self.table.rows)
            ]
            self.records = by_name(rows, "question_id", folder)
        self.grader = None if endpoint is None else JudgeGrader(endpoint, self, TEMPERATURES)

    def questions(self) -> Sequence[Question]:
        asked = []
        for name, record in self.records.items():
            text, images = split_question(record["question"])
            images = images or (record["imagename"],)
            asked.append(Question(name, text, images, "|".join(images)))
        return asked

    def image_source(self, name: str) -> Path | TableImage:
        return self.folder / "images" / name if self.table is None else TableImage(self.table, int(name))

    def judge_content(self, row: Row, folder: Path) -> list[dict[str, Any]]:
        record = self.records[row["id"]]
        truth = re.sub(r"\s*<(AND|OR)>\s*", r" <\1> ", record["answer"])
        text, images = split_question(record["question"])
        cells = (text + "<image>" * len(images), truth, row["answer"])
        line = " | ".join(cell.replace("\n", " ") for cell in cells)
        return [text_part(f"{self.instructions}{line} |")]

    def read_verdict(self, text: str) -> float | None:
        """The number that the reply begins with, as the official script takes it; None unless it is from 0 to 1."""
        try:
            grade = float(text.strip().split(" ")[0].strip("\n |"))
        except ValueError:
            return None
        return grade if 0 <= grade <= 1 else None

    def grade(self, rows: Sequence[Row]) -> list[Row]:
        """An answer whose grade could not be read gets 0, as in the official script."""
        graded = []
        for row in rows:
            score, verdict = None, row.get("verdict")
            if verdict is not None:
                score = float(verdict["reading"] or 0.0)
            graded.append(row | {"capability": self.records[row["id"]]["capability"], "score": score})
        return graded

    def _scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        """`total` over all questions, and per capability; the official script prints a hundred times these."""
        names = sorted({name for row in rows for name in row["capability"]})
        return {"total": average(row["score"] for row in rows)} | {
            name: average(row["score"] for row in rows if name in row["capability"]) for name in names
        }

    def write_official(self, folder: Path, rows: Sequence[Row]) -> None:
        """answers.json, which the official evaluators read."""
        write_json(folder / "answers.json", {row["id"]: row["answer"] for row in rows})

    def aggregate(self, files: Sequence[Path]) -> list[Row]:
        """From an official grade file: id -> {"score": one grade per run}; runs are averaged."""
        groups = {question.id: question.group for question in self.questions()}
        rows = []
        for file in files:
            for name, entry in checked(read_json(file), file, {"score": list}, dict).items():
                if (
                    name not in groups
                    or not entry["score"]
                    or not all(isinstance(one, int | float) and 0 <= one <= 1 for one in entry["score"])
                ):
                    raise DataError(f"row {name} of {file} is no question of {self.title} with grades from 0 to 1")
                rows.append({"id": name, "group": groups[name], "verdict": {"reading": average(entry["score"]).value}})
        return self.grade(rows)


class MmVetV2(MmVet):
    """The second version: 517 questions, with images anywhere in them, laid side by side here."""

    name = "mm_vet_v2"
    title = "MM-Vet v2"
    file = "mm-vet-v2.json"
    size = 517
    more_fields = {}


def split_question(text: str) -> tuple[str, tuple[str, ...]]:
    """A question whose images stand between <IMG> marks -> its words, and the names of its images."""
    parts = text.split("<IMG>")
    images = tuple(part.strip() for part in parts if part.strip().lower().endswith(IMAGE_SUFFIXES))
    words = [part for part in parts if part.strip() not in images]
    return (text, ()) if len(parts) == 1 else (" ".join(" ".join(words).split()), images)
