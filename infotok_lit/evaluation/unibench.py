"""UniBench: the model draws a prompt, then answers questions about its own images (UniEval, Li et al., 2025,
arXiv 2505.10483). The score is UniScore."""

import re
from collections.abc import Sequence
from pathlib import Path

from infotok_lit.errors import DataError
from infotok_lit.evaluation.benchmark import Benchmark, Drawing, Question, Score, average, require
from infotok_lit.evaluation.records import Row, by_name, checked, read_json, read_list
from infotok_lit.files import write_json

FILE = "uni_bench.json"
LETTERS = "ABCDE"
FIELDS = {"prompt_id": int, "prompt": str, "QAs": list}
QUESTION_FIELDS = {"QA_id": int, "question": str, "answer": tuple(LETTERS), "tag": str}


class UniBench(Benchmark):
    """1,234 prompts with four images each, and 4,231 questions about each of their images.

    Args:
        folder: holds uni_bench.json.
    """

    name = "unibench"
    title = "UniBench"
    rewritten = False
    headline = "uniscore"
    about_own_images = True
    max_new_tokens = 512  # as the official wrapper: the last letter counts, which may follow an explanation
    paper = {"uniscore": "UniBench"}
    size = 1234
    fetch = "Put uni_bench.json of https://github.com/xmed-lab/UniEval to DATA/unibench."

    def __init__(self, folder: Path, seed: int = 1024, images_per_prompt: int = 4) -> None:
        self.sources = [require(folder / FILE, type(self))]
        self.seed, self.images_per_prompt = seed, images_per_prompt
        self.cases = checked(read_json(folder / FILE), folder / FILE, FIELDS)
        by_name(self.cases, "prompt_id", folder / FILE)
        for case in self.cases:
            for entry in checked(
                case["QAs"], f"the QAs of prompt {case['prompt_id']} of {folder / FILE}", QUESTION_FIELDS
            ):
                if len(_tag(entry)) != 3:
                    raise DataError(
                        f"QA {entry['QA_id']} of {folder / FILE} has the tag {entry['tag']!r}, not three levels"
                    )
        self.asked = by_name([entry for case in self.cases for entry in case["QAs"]], "QA_id", folder / FILE)

    @property
    def facts(self) -> dict[str, object]:
        """With the longest answer: it was another in earlier versions, whose answers are not to be mixed with these."""
        return super().facts | {"max_new_tokens": self.max_new_tokens}

    def drawings(self) -> Sequence[Drawing]:
        return [
            Drawing(
                id=f"draw/{case['prompt_id']}/{sample}",
                prompt=case["prompt"],
                seed=self.seed + number * self.images_per_prompt + sample,
                file=f"{case['prompt_id']}/{sample}.png",
                group=str(case["prompt_id"]),
            )
            for number, case in enumerate(self.cases)
            for sample in range(self.images_per_prompt)
        ]

    def questions(self) -> Sequence[Question]:
        return [
            Question(
                id=f"ask/{entry['QA_id']}/{sample}",
                text=entry["question"],
                images=(f"{case['prompt_id']}/{sample}.png",),
                group=str(case["prompt_id"]),
            )
            for case in self.cases
            for sample in range(self.images_per_prompt)
            for entry in case["QAs"]
        ]

    def grade(self, rows: Sequence[Row]) -> list[Row]:
        """Only answers have a score; the rows of drawn images stay as they are."""
        return [row | self._answered(row) if "answer" in row else row for row in rows]

    def _scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        """`uniscore`: tags within tags are averaged level by level, and the 13 of the middle level, each rounded to
        three decimals, give the score. Beside it the mean over prompts, and the share of prompts with no mistake."""
        leaves: dict[tuple[str, str, str], list[float]] = {}
        prompts: dict[str, list[float]] = {}
        for row in rows:
            leaves.setdefault(tuple(row["tag"]), []).append(row["score"])
            prompts.setdefault(row["group"], []).append(row["score"])
        middle: dict[str, list[Score]] = {}
        for (_, name, _), values in leaves.items():
            middle.setdefault(name, []).append(average(values))
        parts = {
            name: Score(round(average(leaf.value for leaf in own).value, 3), sum(leaf.n for leaf in own))
            for name, own in middle.items()
        }
        return {
            "uniscore": Score(average(part.value for part in parts.values()).value, len(rows)),
            "case_uniscore": average(average(values).value for values in prompts.values()),
            "all_correct": average(float(min(values) == 1) for values in prompts.values()),
            **parts,
        }

    def write_official(self, folder: Path, rows: Sequence[Row]) -> None:
        """records.json: [QA_id, 1 right, 0 wrong or -1 unread, letter], what the official `statistics` is given."""
        records = [
            [int(row["id"].split("/")[1]), -1 if row["parsed"] is None else int(row["score"]), row["parsed"] or ""]
            for row in rows
            if "score" in row
        ]
        write_json(folder / "records.json", records)

    def aggregate(self, files: Sequence[Path]) -> list[Row]:
        """From such records; the official run's own call an unread letter "None"."""
        places = {str(entry["QA_id"]): str(case["prompt_id"]) for case in self.cases for entry in case["QAs"]}
        rows = []
        records = [record for file in files for record in read_list(file)]
        for number, record in enumerate(records):
            if not (isinstance(record, list) and len(record) == 3 and str(record[0]) in places):
                raise DataError(f"record {number + 1} is {record!r:.60}, not [QA_id, 1, 0 or -1, letter]")
            name, right, letter = record
            own = {"id": str(number), "group": places[str(name)], "tag": _tag(self.asked[str(name)])}
            rows.append(own | {"parsed": letter if letter in tuple(LETTERS) else None, "score": float(right == 1)})
        if not rows:
            raise DataError(f"{', '.join(map(str, files))}: there are no records")
        return rows

    def _answered(self, row: Row) -> Row:
        entry = self.asked[row["id"].split("/")[1]]
        parsed = read_option(row["answer"], options_of(entry["question"]))
        return {
            "tag": _tag(entry),
            "label": entry["answer"],
            "parsed": parsed,
            "score": float(parsed == entry["answer"]),
        }


def read_option(reply: str, options: dict[str, str]) -> str | None:
    """The official reading: the last letter with a bracket on either side; else a letter at the very end; else the
    option whose text, up to its first comma, occurs last; else None.

    Args:
        options: letter -> text.
    """
    bracketed = re.findall(r"\(([A-E])|([A-E])\)", reply)
    if bracketed:
        return "".join(bracketed[-1])
    if reply[-1:] and reply[-1] in LETTERS:
        return reply[-1]
    places = {
        letter: reply.lower().rfind(text.split(",")[0].lower()) for letter, text in options.items() if text and reply
    }
    found = max(places, key=places.__getitem__, default=None)
    return found if found is not None and places[found] >= 0 else None


def options_of(question: str) -> dict[str, str]:
    """Letter -> text of the options that a question spells out as "(A) ..., (B) ..."."""
    line = next((line for line in question.split("\n") if line.startswith("Options:")), "")
    parts = re.split(r"\(([A-E])\)", line)
    return {letter: text.strip().rstrip(",").strip() for letter, text in zip(parts[1::2], parts[2::2], strict=True)}


def _tag(entry: Row) -> list[str]:
    return [part.strip() for part in entry["tag"].split(",")]
