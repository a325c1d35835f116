"""A model that draws and answers at once, by a rule, and counts what it is asked for."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from infotok_lit.evaluation.models import EvaluatedModel


class FakeModel(EvaluatedModel):
    """Draws noise from the seed; answers by `reply(image, question)`.

    Args:
        most: after so many batches the next one raises KeyboardInterrupt, as if the user had stopped the run.
    """

    def __init__(self, reply: Callable[[Image.Image, str], str] = lambda image, question: "yes", most: int = 10**9):
        self.name, self.path = "fake", Path("fake")
        self.reply, self.left = reply, most
        self.drawn: list[tuple[str, int]] = []
        self.asked: list[str] = []

    def description(self):
        return {"name": self.name, "sampler": {"steps": 1}, "dtype": "float32"}

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        self._count()
        self.drawn += zip(prompts, seeds, strict=True)
        return [noise(seed) for seed in seeds]

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int) -> list[str]:
        self._count()
        self.asked += questions
        return [self.reply(image, question) for image, question in zip(images, questions, strict=True)]

    def likelihoods(self, images, questions, options) -> list[list[float]]:
        self._count()
        self.asked += questions
        # The longest option is the likeliest.
        return [[float(len(option)) for option in choices] for choices in options]

    def _count(self) -> None:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1


def noise(seed: int, side: int = 24) -> Image.Image:
    """A picture that tells its seed."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))
