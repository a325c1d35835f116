"""Scenes and Garments as benchmarks like the others: drawn images against their captions, answers against the truth."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from infotok_lit.assets import GARMENT_JUDGE
from infotok_lit.evaluation.benchmark import Benchmark, Drawing, Question, Score, average, open_drawn, scores_by
from infotok_lit.evaluation.records import Row, digest
from infotok_lit.scenes import SPECS, Scenes, parse_caption, question_kind, score
from infotok_lit.scenes.metrics import parser_accuracy
from infotok_lit.scenes.spec import GARMENTS, SpecName


class ScenesBenchmark(Benchmark):
    """Both tasks on scenes that no training sample shows; nothing to fetch.

    Args:
        count: how many images to draw, and how many questions to ask.
    """

    name = "scenes32"
    title = "Scenes, 32 pixels"
    headline = "generation"
    headlines = ("generation", "understanding")
    max_new_tokens = 48
    spec: ClassVar[SpecName] = "scenes32"

    def __init__(self, seed: int = 0, count: int = 300) -> None:
        self.seed, self.count = seed, count
        self.scenes = Scenes(self.spec, split="val", num_samples=count)
        self.grader = SceneGrader(self.spec)

    @property
    def facts(self) -> dict[str, object]:
        return super().facts | {"count": self.count}

    def drawings(self) -> Sequence[Drawing]:
        return [
            Drawing(
                id=f"draw/{number:05d}",
                prompt=self.scenes.draw("generation", number)[1],
                seed=self.seed + number,
                file=f"images/{number:05d}.png",
                group=f"{number:05d}",
            )
            for number in range(self.count)
        ]

    def questions(self) -> Sequence[Question]:
        return [
            Question(f"ask/{number:05d}", self.scenes.draw("understanding", number)[1], (str(number),), f"{number:05d}")
            for number in range(self.count)
        ]

    def open_image(self, name: str, folder: Path) -> Image.Image:
        return self.scenes.sample("understanding", int(name)).image

    def grade(self, rows: Sequence[Row]) -> list[Row]:
        return [row | (self._drawn(row) if "prompt" in row else self._answered(row)) for row in rows]

    def _scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        """`generation`, the mean of its categories as in GenEval; `understanding`, over all questions; each part."""
        parts = scores_by(rows, "part")
        drawn = [part for name, part in parts.items() if name.startswith("generation/")]
        answered = [row["score"] for row in rows if row["part"].startswith("understanding/")]
        found = {}
        if drawn:
            found["generation"] = Score(average(part.value for part in drawn).value, sum(part.n for part in drawn))
        if answered:
            found["understanding"] = average(answered)
        return found | dict(sorted(parts.items()))

    def _drawn(self, row: Row) -> Row:
        verdict = row.get("verdict")
        part = "generation/" + parse_caption(row["prompt"]).category
        return {"part": part, "score": None if verdict is None else float(verdict["correct"])}

    def _answered(self, row: Row) -> Row:
        answer = self.scenes.draw("understanding", int(row["group"]))[2]
        parsed = row["answer"].strip().casefold()
        return {
            "part": f"understanding/{question_kind(row['question'])}",
            "parsed": parsed or None,
            "score": float(parsed == answer.strip().casefold()),
        }


class Scenes64Benchmark(ScenesBenchmark):
    """The larger scenes."""

    name = "scenes64"
    title = "Scenes, 64 pixels"
    spec = "scenes64"


class GarmentsBenchmark(ScenesBenchmark):
    """Photographs of garments that are in no training sample; a small network judges what is drawn."""

    name = "garments32"
    title = "Garments, 32 pixels"
    spec = "garments32"


class SceneGrader:
    """Whether drawn images show their captions: by the analytic parser or, for garments, by the network that ships."""

    batch_size = 100

    def __init__(self, spec: SpecName) -> None:
        self.spec = SPECS[spec]
        self.name = f"network-{digest([GARMENT_JUDGE])[:6]}" if self.spec.vocabulary is GARMENTS else "parser"

    @cached_property
    def accuracy(self) -> float:
        """The share of the objects in true images that it names rightly."""
        return parser_accuracy(self.spec)

    def verdicts(self, rows: Sequence[Row], folder: Path) -> list[Row]:
        """Images of another size are brought to that of the scenes first."""
        side, verdicts = self.spec.image_size, []
        for row in rows:
            image = open_drawn(folder / row["image"])
            pixels = np.array(image.resize((side, side), Image.Resampling.BOX))
            verdicts.append({"id": row["id"], "correct": bool(score(pixels, parse_caption(row["prompt"]), self.spec))})
        return verdicts

    def facts(self, verdicts: Sequence[Row]) -> dict[str, Any]:
        """How often it is right itself: no score can be told more exactly."""
        return {"accuracy": self.accuracy}
