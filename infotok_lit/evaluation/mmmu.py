"""MMMU, validation: 900 college questions of 30 subjects (Yue et al., 2023, arXiv 2311.16502).

Answers are read by the official parser, or by lmms-eval's, which differs in two steps. The official parser takes a
random option where it finds none; here that answer is wrong, so that scores can be repeated, and the share of such
answers is reported.
"""

import ast
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Literal

from infotok_lit.errors import DataError
from infotok_lit.evaluation.benchmark import Benchmark, Question, Rules, Score, average, require, rule_named, scores_by
from infotok_lit.evaluation.records import Row, by_name
from infotok_lit.evaluation.tables import Table, TableImage
from infotok_lit.files import write_json

FIELDS = {"id": str, "question": str, "options": str | list, "answer": str, "question_type": str}
Style = Literal["official", "lmms-eval"]
CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""What stands before the point of a sentence."""
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
"""With thousands' commas, in scientific notation, and plain."""
IMAGES = tuple(f"image_{number}" for number in range(1, 8))
CHOICE_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
OPEN_SUFFIX = "\nAnswer the question using a single word or phrase."


def _read(reply: str, options: dict[str, str], truths: Sequence[str], style: Style) -> tuple[object, bool]:
    """(what was read in a reply, whether that is right)."""
    if options:
        letter = parse_choice(reply, options, style)
        return letter, letter in truths
    parsed = parse_open(reply)
    return parsed, open_is_right(parsed, truths, style)


class Mmmu(Benchmark):
    """Multiple choice and short answers. Where a question has several images, they are laid side by side.

    Args:
        folder: a Hugging Face dataset folder with the validation split.
    """

    name = "mmmu"
    title = "MMMU, validation"
    headline = "accuracy"
    paper = {"accuracy": "MMMU"}
    max_new_tokens = 128
    RULES = {"official": partial(_read, style="official"), "lmms-eval": partial(_read, style="lmms-eval")}
    size = 900
    fetch = (
        "Download it: `hf download lmms-lab/MMMU --repo-type dataset --include 'data/validation*' "
        "--local-dir DATA/mmmu`."
    )

    def __init__(self, folder: Path, rules: Rules = "official") -> None:
        self.rule, self.rules = rule_named(self, rules), rules
        self.table = Table(require(folder, type(self)), IMAGES, "validation", FIELDS, self.fetch)
        self.sources = self.table.files
        by_name(self.table.rows, "id", folder)
        self.places = {row["id"]: number for number, row in enumerate(self.table.rows)}
        self.images = {row["id"]: self._images(row, number) for number, row in enumerate(self.table.rows)}

    def questions(self) -> Sequence[Question]:
        asked = []
        for row in self.table.rows:
            options = _options(row)
            lines = "".join(f"\n({letter}) {text}" for letter, text in options.items())
            text = row["question"] + lines + (CHOICE_SUFFIX if options else OPEN_SUFFIX)
            asked.append(Question(row["id"], text, self.images[row["id"]], row["id"]))
        return asked

    def image_source(self, name: str) -> TableImage:
        question, _, column = name.rpartition("/")
        return TableImage(self.table, self.places[question], column)

    def grade(self, rows: Sequence[Row]) -> list[Row]:
        graded = []
        for row in rows:
            record = self.table.rows[self.places[row["id"]]]
            parsed, right = self.rule(row["answer"], _options(record), _truths(record))
            subject = row["id"].split("_", 1)[1].rpartition("_")[0]
            own = {"part": subject, "label": record["answer"], "parsed": parsed or None, "score": float(right)}
            graded.append(row | own)
        return graded

    def _scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        """Over all questions, and per subject."""
        return {"accuracy": average(row["score"] for row in rows), **scores_by(rows, "part")}

    def write_official(self, folder: Path, rows: Sequence[Row]) -> None:
        """What `main_eval_only.py` reads (letters that were found, short answers as they are), and the folder of
        `main_parse_and_eval.py`, which parses by itself."""
        found = {
            row["id"]: (row["parsed"] or "") if isinstance(row["parsed"], str | None) else row["answer"] for row in rows
        }
        write_json(folder / "predictions.json", found)
        subjects: dict[str, list[Row]] = {}
        for row in rows:
            record = self.table.rows[self.places[row["id"]]]
            options = _options(record)
            own = {"id": row["id"], "question_type": record["question_type"], "answer": _answer(record)}
            own |= {"all_choices": list(options), "index2ans": options, "response": row["answer"]}
            subjects.setdefault(row["part"], []).append(own)
        for subject, own in subjects.items():
            (folder / "parse_and_eval" / subject).mkdir(parents=True, exist_ok=True)
            write_json(folder / "parse_and_eval" / subject / "output.json", own)

    def _images(self, row: Row, number: int) -> tuple[str, ...]:
        """What `open_image` calls them; DataError unless there is one, and id, options and answer can be read."""
        try:
            _options(row), _answer(row)
            fault = "" if re.match(r"[^_]+_\w+_[^_]+$", row["id"]) else f"id {row['id']!r} is not SPLIT_SUBJECT_NUMBER"
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
            fault = f"options or answer is no list: {error}"
        found = tuple(f"{row['id']}/{column}" for column in IMAGES if self.table.has_image(number, column))
        if fault or not found:
            raise DataError(f"{self.table.where(number)}: {fault or 'there is no image'}")
        return found


def _options(record: Row) -> dict[str, str]:
    """Letter -> text; empty for a short answer."""
    given = record["options"]
    options = ast.literal_eval(given) if isinstance(given, str) else given
    if not isinstance(options, list | tuple | None):
        raise ValueError(f"it is {options!r:.60}")
    return dict(zip(ascii_uppercase, map(str, options or ()), strict=False))


def _answer(record: Row) -> str | list[str]:
    """The truth: a letter or a text, or several texts, which the file holds as one that spells a Python list."""
    given = record["answer"]
    return [str(one) for one in ast.literal_eval(given)] if given.startswith("[") else given


def _truths(record: Row) -> list[str]:
    answer = _answer(record)
    return answer if isinstance(answer, list) else [answer]


# How answers are read


def parse_choice(reply: str, options: dict[str, str], style: Style = "official") -> str | None:
    """The letter of the option that a reply names last; None if it names none.

    Args:
        options: letter -> text.
    """
    for mark in ",.!?;:'":
        reply = reply.strip(mark)
    reply = f" {reply} "
    # lmms-eval does not ask for a space before the letter, but still looks for the last one with it.
    forms = ["({})", " {} "] if style == "official" else ["({})", "{} ", "{}."]
    for form in forms:
        named = [letter for letter in options if form.format(letter) in reply]
        if named:
            place = form if form == "({})" else " {} "
            return max(named, key=lambda letter: reply.rfind(place.format(letter)))
    if len(reply.split()) > 5:
        places = {letter: reply.lower().rfind(text.lower()) for letter, text in options.items()}
        if max(places.values()) >= 0:
            return max(places, key=places.__getitem__)
    return None


def parse_open(reply: str) -> list[str | float]:
    """What a reply to an open question may mean: the ends of its sentences, and every number in them, normalised;
    nothing for an empty one."""
    # The official pattern would also split before capital letters, of which there are none once letters are small.
    lines = reply.strip().strip(".").lower().split("\n")
    ends = []
    for number, line in enumerate(lines):
        shortest = ""
        for cue in (*CUES, "=") if number == len(lines) - 1 else CUES:
            tail = line.split(cue)[-1].strip()
            if cue in line and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            ends.append(shortest)
    ends = ends or [reply.strip().strip(".").lower()]
    found = ends + [match for end in ends for pattern in NUMBERS for match in re.findall(pattern, end)]
    return list(dict.fromkeys(form for text in found for form in normalised(text) if form != ""))


def open_is_right(parsed: Sequence[str | float], truths: Sequence[str], style: Style = "official") -> bool:
    """Whether a true text occurs in one that was parsed, or a true number equals one.

    lmms-eval hands its checker a text where a list belongs, and so compares single characters, of which none can
    hold a true text: no open answer is right there.
    """
    if style == "lmms-eval":
        return False
    forms = [form for truth in truths for form in normalised(truth)]
    return any(
        any(isinstance(form, str) and form in one for form in forms) if isinstance(one, str) else one in forms
        for one in parsed
    )


def normalised(text: str) -> list[str | float]:
    """A number to two decimals, or the text in small letters; a single character is set off by a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
