"""MME: two yes/no questions about each image, one true and one false (Fu et al., 2023, arXiv 2306.13394).

Its authors allow academic research only and forbid passing the files on, so everything comes from the user.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from infotok_lit.errors import DataError
from infotok_lit.evaluation.benchmark import Benchmark, Question, Rules, Score, require, rule_named
from infotok_lit.evaluation.records import Row, read_text
from infotok_lit.evaluation.tables import Table, TableImage
from infotok_lit.evaluation.yes_no import mme_lmms_eval, mme_official, vlmevalkit
from infotok_lit.files import write_whole

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
FIELDS = {"question_id": str, "question": str, "answer": ("Yes", "No"), "category": str}
"""Of a row of the Hugging Face copy."""
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


class Entry(NamedTuple):
    """One question."""

    subtask: str
    image: str
    question: str
    label: str
    row: int | None = None
    """Where the image is, in a table."""


class Mme(Benchmark):
    """14 subtasks. A subtask gives accuracy plus the share of images with both answers right, in per cent.

    Args:
        folder: the official release (one folder per subtask), or one SUBTASK.txt per subtask with
            `image<TAB>question<TAB>answer` beside folders of images, or a Hugging Face dataset folder.
    """

    name = "mme"
    title = "MME"
    headline = "overall"
    paper = {"overall": "MME"}
    RULES = {"official": mme_official, "lmms-eval": mme_lmms_eval, "vlmevalkit": vlmevalkit}
    size = 2374
    fetch = (
        "Ask its authors for MME_Benchmark_release_version and put its 14 folders to DATA/mme, or download "
        "`hf download lmms-lab/MME --repo-type dataset --local-dir DATA/mme`."
    )

    def __init__(self, folder: Path, rules: Rules = "official") -> None:
        self.rule, self.rules = rule_named(self, rules), rules
        self.folder = require(folder, type(self))
        self.table: Table | None = None
        texts = self._texts()
        self.sources = [file for _, file in texts]
        found = [entry for subtask, file in texts for entry in self._entries(subtask, file)]
        if not found:
            self.table = Table(folder, ("image",), "test", FIELDS, self.fetch)
            self.sources = self.table.files
            found = [
                Entry(row["category"], row["question_id"], row["question"], row["answer"], number)
                for number, row in enumerate(self.table.rows)
            ]
        self.entries = {f"{entry.subtask}/{entry.image}/{number}": entry for number, entry in enumerate(found)}
        self.images = {f"{entry.subtask}/{entry.image}": entry for entry in found}

    def questions(self) -> Sequence[Question]:
        images = [f"{entry.subtask}/{entry.image}" for entry in self.entries.values()]
        return [
            Question(name, entry.question, (image,), image)
            for (name, entry), image in zip(self.entries.items(), images, strict=True)
        ]

    def image_source(self, name: str) -> Path | TableImage:
        entry = self.images[name]
        if self.table is not None:
            return TableImage(self.table, entry.row)
        places = [self.folder / entry.subtask / entry.image, self.folder / entry.subtask / "images" / entry.image]
        return next((place for place in places if place.is_file()), places[0])

    def grade(self, rows: Sequence[Row]) -> list[Row]:
        graded = []
        for row in rows:
            entry = self.entries[row["id"]]
            label, reading = entry.label.lower(), self.rule(row["answer"])
            own = {"subtask": entry.subtask, "label": label, "parsed": reading.parsed}
            graded.append(row | own | {"score": float(reading.value == label)})
        return graded

    def _scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        """Points: `overall` of 2,800 is `perception` of 2,000 plus `cognition` of 800, and those sum their subtasks."""
        subtasks: dict[str, list[Row]] = {}
        for row in rows:
            subtasks.setdefault(row["subtask"], []).append(row)
        points = {subtask: _points(own) for subtask, own in subtasks.items()}
        parts = {}
        for name, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
            own = [points[subtask] for subtask in members if subtask in points]
            if own:
                parts[name] = Score(sum(score.value for score in own), sum(score.n for score in own))
        if not parts:
            return {}
        overall = Score(sum(part.value for part in parts.values()), sum(part.n for part in parts.values()))
        return {"overall": overall, **parts, **points}

    def write_official(self, folder: Path, rows: Sequence[Row]) -> None:
        """results/SUBTASK.txt, as the official calculation reads them: the lines of an image together."""
        results: dict[str, dict[str, list[str]]] = {}
        for row in rows:
            entry = self.entries[row["id"]]
            question, answer = (" ".join(text.split()) for text in (entry.question, row["answer"]))
            line = f"{entry.image}\t{question}\t{entry.label}\t{answer}\n"
            results.setdefault(entry.subtask, {}).setdefault(entry.image, []).append(line)
        (folder / "results").mkdir(exist_ok=True)
        for subtask, images in results.items():
            lines = [line for own in images.values() for line in own]
            write_whole(folder / "results" / f"{subtask}.txt", "".join(lines).encode())

    def _texts(self) -> list[tuple[str, Path]]:
        """(subtask, question file): one per subtask, or one per image."""
        found = []
        for subtask in (*PERCEPTION, *COGNITION):
            single, own = self.folder / f"{subtask}.txt", self.folder / subtask
            each = sorted([*own.glob("*.txt"), *own.glob("questions_answers_YN/*.txt")])
            found += [(subtask, file) for file in ([single] if single.is_file() else each)]
        return found

    def _entries(self, subtask: str, file: Path) -> Iterator[Entry]:
        for number, line in enumerate(read_text(file).split("\n"), 1):
            if not line.strip():
                continue
            image = [] if file.parent == self.folder else [_image_beside(file)]
            fields = [*image, *line.split("\t")]
            if len(fields) < 3 or fields[2].strip().lower() not in ("yes", "no"):
                raise DataError(
                    f"line {number} of {file} needs image, question and Yes or No, split by tabs: {line!r:.60}"
                )
            yield Entry(subtask, fields[0], fields[1], fields[2].strip())


def _points(rows: Sequence[Row]) -> Score:
    """Of one subtask: 100 x accuracy + 100 x the share of images whose questions are all answered rightly."""
    images: dict[str, float] = {}
    for row in rows:
        images[row["group"]] = min(images.get(row["group"], 1.0), row["score"])
    accuracy = sum(row["score"] for row in rows) / len(rows)
    return Score(100 * (accuracy + sum(images.values()) / len(images)), len(rows))


def _image_beside(text: Path) -> str:
    """The image that a question file of the official release belongs to."""
    folders = (text.parent, text.parent.parent / "images")
    found = [file for folder in folders for file in folder.glob(f"{text.stem}.*") if file.suffix != ".txt"]
    return found[0].name if found else f"{text.stem}.jpg"
