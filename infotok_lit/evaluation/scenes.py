"""Scenes as a benchmark like the others: drawn images against their captions, answers against the truth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from infotok_lit.evaluation.benchmark import Benchmark, Drawing, Question, Score, average, scores_by
from infotok_lit.evaluation.records import Row
from infotok_lit.scenes import Scenes, SceneSpec, parse_caption, question_kind, score


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
    spec: Literal["scenes32", "scenes64"] = "scenes32"

    def __init__(self, seed: int = 0, count: int = 300) -> None:
        self.seed, self.count = seed, count
        self.scenes = Scenes(self.spec, split="val", num_samples=count)
        self.grader = ParserGrader(self.scenes.spec)

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

    def scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        """`generation`, the mean of its categories as in GenEval; `understanding`, over all questions; each part."""
        scored = [row for row in rows if row["score"] is not None]
        parts = scores_by(scored, "part")
        drawn = [part for name, part in parts.items() if name.startswith("generation/")]
        answered = [row["score"] for row in scored if row["part"].startswith("understanding/")]
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


class ParserGrader:
    """Whether drawn images show their captions, by the analytic parser."""

    name = "parser"
    batch_size = 100

    def __init__(self, spec: SceneSpec) -> None:
        self.spec = spec

    def verdicts(self, rows: Sequence[Row], folder: Path) -> list[Row]:
        """Images of another size are brought to that of the scenes first."""
        side, verdicts = self.spec.image_size, []
        for row in rows:
            with Image.open(folder / row["image"]) as image:
                pixels = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BOX))
            verdicts.append({"id": row["id"], "correct": bool(score(pixels, parse_caption(row["prompt"]), self.spec))})
        return verdicts

    def spent(self, verdicts: Sequence[Row]) -> dict[str, Any]:
        """Nothing but time."""
        return {}
