"""GenEval: 553 prompts in six tasks, four images each, in the official layout (Ghosh et al., 2023, arXiv 2310.11513).

Two benchmarks with one scorer: the plain prompts, and Show-o2's, which write each out in a paragraph.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infotok_lit.assets import BENCHMARKS
from infotok_lit.errors import DataError
from infotok_lit.evaluation.benchmark import Benchmark, Drawing, Score, average, open_drawn, scores_by
from infotok_lit.evaluation.geneval_rules import TAGS, Detection, judge, read_scene
from infotok_lit.evaluation.geneval_vision import ImageJudge
from infotok_lit.evaluation.records import Row, checked, read_json_lines, to_lines
from infotok_lit.files import write_whole

IMAGES = "images"


class GenEval(Benchmark):
    """The plain prompts. Images lie where the official `evaluate_images.py` looks for them: IMAGEDIR is `images`.

    Args:
        image_judge: detector and classifier; without them the images are only drawn.
    """

    name = "geneval"
    title = "GenEval"
    paper = {tag: f"GenEval/{tag}" for tag in (*TAGS, "overall")}
    rewritten = False
    metadata_file = BENCHMARKS / "geneval" / "evaluation_metadata.jsonl"

    def __init__(self, seed: int = 0, images_per_prompt: int = 4, image_judge: ImageJudge | None = None) -> None:
        self.sources = (self.metadata_file,)
        self.metadata = read_json_lines(self.metadata_file)
        self.seed, self.images_per_prompt = seed, images_per_prompt
        self.grader = None if image_judge is None else DetectorGrader(image_judge, self)

    def drawings(self) -> Sequence[Drawing]:
        return [
            Drawing(
                id=f"{number:05d}/{sample:05d}",
                prompt=metadata["prompt"],
                seed=self.seed + number * self.images_per_prompt + sample,
                file=f"{IMAGES}/{number:05d}/samples/{sample:05d}.png",
                group=f"{number:05d}",
            )
            for number, metadata in enumerate(self.metadata)
            for sample in range(self.images_per_prompt)
        ]

    def grade(self, rows: Sequence[Row]) -> list[Row]:
        graded = []
        for row in rows:
            score = float(row["verdict"]["correct"]) if "verdict" in row else None
            graded.append(row | {"tag": self.metadata_of(row)["tag"], "score": score})
        return graded

    def _scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        return task_scores(rows)

    def metadata_of(self, row: Row) -> dict[str, Any]:
        """The prompt's line of the metadata file."""
        return self.metadata[int(row["group"])]

    def write_official(self, folder: Path, rows: Sequence[Row]) -> None:
        """metadata.jsonl beside the samples, and results.jsonl as `evaluate_images.py` writes it."""
        for group, row in {row["group"]: row for row in rows}.items():
            content = to_lines([self.metadata_of(row)]).encode()
            write_whole(folder / IMAGES / group / "metadata.jsonl", content)
        results = [
            {
                "filename": row["image"],
                "tag": row["tag"],
                "prompt": row["prompt"],
                "correct": bool(row["score"]),
                "reason": "\n".join(row["verdict"]["reasons"]),
                "metadata": json.dumps(self.metadata_of(row)),
            }
            for row in rows
            if row["score"] is not None
        ]
        path = folder / "results.jsonl"
        if results:
            write_whole(path, to_lines(results).encode())
        else:
            # What another judge found is not this result's.
            path.unlink(missing_ok=True)

    def aggregate(self, files: Sequence[Path]) -> list[Row]:
        """From the official results.jsonl."""
        fields = {"tag": str, "correct": bool | int, "metadata": str}
        rows = [row for file in files for row in checked(read_json_lines(file), file, fields)]
        for number, row in enumerate(rows, 1):
            if row["correct"] not in (0, 1):
                raise DataError(
                    f"row {number} of {', '.join(map(str, files))}: correct is {row['correct']}, not 0 or 1"
                )
        return [
            {"id": str(number), "group": row["metadata"], "tag": row["tag"], "score": float(row["correct"])}
            for number, row in enumerate(rows)
        ]


class RewrittenGenEval(GenEval):
    """Show-o2's prompts."""

    name = "geneval_rewritten"
    title = "GenEval, prompts rewritten by Show-o2"
    rewritten = True
    metadata_file = BENCHMARKS / "geneval_rewritten" / "geneval_meta_data_rewritten.jsonl"


def task_scores(rows: Sequence[Row]) -> dict[str, Score]:
    """The score of each tag that occurs and `overall`, their plain mean; and two shares that the official summary
    prints beside it: of correct images, and of prompts with at least one. All rows have a score."""
    tags = scores_by(rows, "tag")
    best: dict[str, float] = {}
    for row in rows:
        best[row["group"]] = max(best.get(row["group"], 0.0), row["score"])
    return {tag: tags[tag] for tag in TAGS if tag in tags} | {
        "overall": Score(average(tag.value for tag in tags.values()).value, len(rows)),
        "correct_images": average(row["score"] for row in rows),
        "prompts_with_a_correct_image": average(best.values()),
    }


class DetectorGrader:
    """Verdicts on images by what is seen in them, kept as scenes that `--detections` can judge again."""

    batch_size = 8

    def __init__(self, image_judge: ImageJudge, benchmark: GenEval) -> None:
        self.image_judge, self.benchmark = image_judge, benchmark
        self.name = image_judge.name

    def verdicts(self, rows: Sequence[Row], folder: Path) -> list[Row]:
        """One stored scene per image."""
        verdicts = []
        for row in rows:
            metadata = self.benchmark.metadata_of(row)
            image = open_drawn(folder / row["image"])
            verdict, detections = self.image_judge(image, metadata)
            verdicts.append(
                {
                    "id": row["id"],
                    "metadata": metadata,
                    "image_size": [image.height, image.width],
                    "detections": [stored(one) for one in detections],
                    "correct": verdict.correct,
                    "reasons": list(verdict.reasons),
                }
            )
        return verdicts

    def facts(self, verdicts: Sequence[Row]) -> dict[str, Any]:
        """Nothing but time."""
        return {}


def stored(detection: Detection) -> Row:
    """A detection as it is kept in a scene."""
    box = [round(value, 2) for value in detection.box]
    return {"class": detection.label, "box": box, "score": detection.score, "color": detection.colour}


def judge_stored(path: Path) -> tuple[list[Row], list[str]]:
    """Judge the stored scenes of a file again.

    Returns:
        Their graded rows; and what to tell about scenes that came with a verdict, ending with how many agree.
    """
    rows, told, compared, agreeing = [], [], 0, 0
    for number, content in enumerate(checked(read_json_lines(path), path, {"metadata": dict}), 1):
        scene = read_scene(content, f"scene {number} of {path}")
        verdict = judge(scene.metadata, scene.detections)
        group = json.dumps(scene.metadata, sort_keys=True)
        rows.append({"id": str(number), "group": group, "tag": scene.metadata["tag"], "score": float(verdict.correct)})
        if scene.correct is not None:
            compared += 1
            agreeing += scene.correct == verdict.correct
        if scene.correct not in (None, verdict.correct):
            why = "; ".join(verdict.reasons) or "all is as asked"
            told.append(f"scene {number} is {'' if scene.correct else 'not '}correct in {path.name}; here: {why}")
    if compared:
        told.append(f"verdicts agree: {agreeing} of {compared}")
    return rows, told
