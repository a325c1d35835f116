"""POPE: is there a ... in the image? (Li et al., 2023, arXiv 2305.10355). Labels ship; the images are COCO's."""

from collections.abc import Sequence
from pathlib import Path

from infotok_lit.assets import BENCHMARKS
from infotok_lit.errors import MissingFileError
from infotok_lit.evaluation.benchmark import Benchmark, Question, Rules, Score, average, rule_named
from infotok_lit.evaluation.records import Row, checked, read_json_lines, to_lines
from infotok_lit.evaluation.yes_no import pope_lmms_eval, pope_official, vlmevalkit
from infotok_lit.files import write_whole

SPLITS = ("random", "popular", "adversarial")
FIELDS = {"question_id": int | str, "image": str, "text": str, "label": ("yes", "no")}


class Pope(Benchmark):
    """Three times 3,000 questions on 500 images. A question that stands in several splits is asked once.

    Args:
        folder: holds COCO_val2014_*.jpg, in it or in val2014; and perhaps its own coco_pope_SPLIT.json in place of
            those that ship.
    """

    name = "pope"
    title = "POPE"
    headline = "accuracy"
    paper = {"accuracy": "POPE", "f1": "POPE"}
    RULES = {"official": pope_official, "lmms-eval": pope_lmms_eval, "vlmevalkit": vlmevalkit}
    size = 5127
    fetch = (
        "The images are COCO's val2014 (http://images.cocodataset.org/zips/val2014.zip, 6.2 GB), of which POPE uses "
        "500: unpack them to DATA/pope/val2014."
    )

    def __init__(self, folder: Path, rules: Rules = "official") -> None:
        self.rule, self.rules = rule_named(self, rules), rules
        self.folder = folder
        own = [folder / f"coco_pope_{split}.json" for split in SPLITS]
        shipped = [BENCHMARKS / "pope" / file.name for file in own]
        missing = [file.name for file in own if not file.is_file()]
        if 0 < len(missing) < len(own):
            text = f"{folder} has labels of POPE, but not {' and '.join(missing)}"
            raise MissingFileError(f"{text}: put all three there, or none, and those that ship are taken")
        self.sources = shipped if missing else own
        read = [checked(read_json_lines(file), file, FIELDS) for file in self.sources]
        self.splits = dict(zip(SPLITS, read, strict=True))

    def questions(self) -> Sequence[Question]:
        pairs = dict.fromkeys((line["image"], line["text"]) for lines in self.splits.values() for line in lines)
        return [Question(f"{image}: {text}", text, (image,), image) for image, text in pairs]

    def image_source(self, name: str) -> Path:
        flat = self.folder / name
        return flat if flat.is_file() else self.folder / "val2014" / name

    def grade(self, rows: Sequence[Row]) -> list[Row]:
        answers = {row["id"]: row for row in rows}
        graded = []
        for split, lines in self.splits.items():
            for line in lines:
                row = answers.get(f"{line['image']}: {line['text']}")
                if row is not None:
                    reading = self.rule(row["answer"])
                    own = {"id": f"{split}/{line['question_id']}", "split": split, "label": line["label"]}
                    score = float(reading.value == line["label"])
                    graded.append(row | own | {"read": reading.value, "parsed": reading.parsed, "score": score})
        return graded

    def _scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        """Accuracy and F1 (yes is positive) as means over the splits, and everything per split."""
        splits = {split: [row for row in rows if row["split"] == split] for split in SPLITS}
        per_split = {split: self._split_scores(own) for split, own in splits.items() if own}
        found = {
            name: Score(average(scores[name].value for scores in per_split.values()).value, len(rows))
            for name in ("accuracy", "f1", "yes_ratio")
        }
        return found | {f"{split}/{name}": score for split, own in per_split.items() for name, score in own.items()}

    def _split_scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        # In VLMEvalKit whatever is not yes counts as no here; lmms-eval leaves it out.
        read = [
            (row["label"], "no" if self.rules == "vlmevalkit" and row["read"] == "other" else row["read"])
            for row in rows
        ]
        hits, false_alarms, misses = (read.count(pair) for pair in (("yes", "yes"), ("no", "yes"), ("yes", "no")))
        precision = hits / (hits + false_alarms) if hits + false_alarms else 0.0
        recall = hits / (hits + misses) if hits + misses else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        values = {"precision": precision, "recall": recall, "f1": f1}
        return {
            "accuracy": average(row["score"] for row in rows),
            **{name: Score(value, len(rows)) for name, value in values.items()},
            "yes_ratio": average(float(row["read"] == "yes") for row in rows),
        }

    def write_official(self, folder: Path, rows: Sequence[Row]) -> None:
        """One answer file per split for the official `evaluate.py`, in the order of its label file."""
        for split in SPLITS:
            lines = [{"question": row["question"], "answer": row["answer"]} for row in rows if row["split"] == split]
            write_whole(folder / f"answers_{split}.jsonl", to_lines(lines).encode())
