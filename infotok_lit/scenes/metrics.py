"""Scores on Scenes: drawn images against their captions, answers against the truth, and what to hold them against.

Beside every score stand what chance would reach, and how often the parser of the images is right itself.
"""

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from infotok_lit.errors import SettingsError
from infotok_lit.scenes.generator import Slot, draw_scene
from infotok_lit.scenes.grammar import CATEGORIES, Category, Prompt, draw_captioned_scene, parse_caption
from infotok_lit.scenes.parser import parse_image, satisfies, score
from infotok_lit.scenes.questions import QUESTION_KINDS, question_kind
from infotok_lit.scenes.render import render
from infotok_lit.scenes.spec import SPECS, SceneSpec

RoundTrip = Callable[[Tensor], Tensor]
"""Images (B, 3, height, width) in [-1, 1] -> the same after an autoencoder."""
_OTHER = "other"
_ANSWER_BUCKETS = 4096


class SceneScore(Metric):
    """Share of drawn images that show what their caption asks for, by GenEval's formula.

    Args:
        spec: the family of scenes that the images belong to, a name in SPECS or the parameters themselves.
    """

    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, spec: str | SceneSpec = "scenes32") -> None:
        super().__init__()
        if isinstance(spec, str) and spec not in SPECS:
            raise SettingsError(f"spec must be one of {tuple(SPECS)}, got {spec!r}")
        self.spec = SPECS[spec] if isinstance(spec, str) else spec
        self.add_state("correct", torch.zeros(len(CATEGORIES), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(len(CATEGORIES), dtype=torch.int64), dist_reduce_fx="sum")

    def knows(self, caption: str) -> bool:
        """Whether a caption is one that these scenes can be judged by."""
        try:
            self._prompt(caption)
        except ValueError:
            return False
        return True

    def _prompt(self, caption: str) -> Prompt:
        prompt = parse_caption(caption)
        if prompt.vocabulary is not self.spec.vocabulary:
            raise SettingsError(f"not a caption of the Scenes grammar of {self.spec.vocabulary.noun}s: {caption!r}")
        return prompt

    def update(self, images: Tensor, captions: Sequence[str]) -> None:
        """Adds images (B, 3, H, W) float in [-1, 1], each with its caption.

        Raises:
            ValueError: the numbers differ.
            SettingsError: a caption that it does not know.
        """
        _check_lengths(images=images, captions=captions)
        for image, caption in zip(_levels(images), captions, strict=True):
            prompt = self._prompt(caption)
            category = CATEGORIES.index(prompt.category)
            self.correct[category] += int(score(image, prompt, self.spec))
            self.total[category] += 1

    def compute(self) -> dict[str, Tensor]:
        """The score of each category that occurred, "overall", their plain mean, and its "standard_error".

        Both are nan before any update.
        """
        occurred = self.total > 0
        scores = self.correct[occurred] / self.total[occurred]
        names = [name for name, present in zip(CATEGORIES, occurred.tolist(), strict=True) if present]
        error = _variance(self.correct[occurred], self.total[occurred]).sum().sqrt() / occurred.sum()
        return dict(zip(names, scores, strict=True)) | {"overall": scores.mean(), "standard_error": error}


class QAExactMatch(Metric):
    """Share of answers that equal the truth, up to letter case and surrounding white space."""

    full_state_update = False
    kinds = (*QUESTION_KINDS, _OTHER)
    correct: Tensor
    answer_counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros(len(self.kinds), dtype=torch.int64), dist_reduce_fx="sum")
        # Answers are counted by a digest, so that the counts of all processes add up.
        counts = torch.zeros(len(self.kinds), _ANSWER_BUCKETS, dtype=torch.int64)
        self.add_state("answer_counts", counts, dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], answers: Sequence[str], questions: Sequence[str]) -> None:
        """Adds predicted answers with the true ones and their questions.

        Raises:
            ValueError: the numbers differ.
        """
        _check_lengths(predictions=predictions, answers=answers, questions=questions)
        for prediction, answer, question in zip(predictions, answers, questions, strict=True):
            kind = self.kinds.index(question_kind(question) or _OTHER)
            truth = _normalise(answer)
            self.correct[kind] += int(_normalise(prediction) == truth)
            self.answer_counts[kind, zlib.crc32(truth.encode()) % _ANSWER_BUCKETS] += 1

    def compute(self) -> dict[str, Tensor]:
        """Accuracy per kind that occurred, "overall" over all questions, its "standard_error", and "chance".

        "chance" is the accuracy of always giving the most frequent true answer of the question's kind.
        """
        totals = self.answer_counts.sum(dim=1)
        scores = {
            kind: self.correct[number] / totals[number] for number, kind in enumerate(self.kinds) if totals[number] > 0
        }
        scores["overall"] = self.correct.sum() / totals.sum()
        scores["standard_error"] = _variance(self.correct.sum(), totals.sum()).sqrt()
        scores["chance"] = self.answer_counts.amax(dim=1).sum() / totals.sum()
        return scores


def drawing_chance(
    spec: str | SceneSpec = "scenes32",
    num_scenes: int = 1000,
    seed: int = 0,
    categories: Sequence[Category] = CATEGORIES,
) -> dict[str, float]:
    """What SceneScore gives perfect images that ignore their captions: the mean over all pairs of different scenes.

    Args:
        categories: of the captions, in turn.
    """
    spec, rng = SceneScore(spec).spec, np.random.default_rng(seed)
    prompts, found = [], []
    for number in range(num_scenes):
        prompt, scene = draw_captioned_scene(rng, spec, "train", categories[number % len(categories)])
        prompts.append(prompt)
        found.append(parse_image(render(scene, spec), spec))
    shown = {prompt: [satisfies(objects, prompt) for objects in found] for prompt in set(prompts)}
    shares: dict[str, list[float]] = {}
    for number, prompt in enumerate(prompts):
        others = sum(shown[prompt]) - shown[prompt][number]
        shares.setdefault(prompt.category, []).append(others / (num_scenes - 1))
    scores = {category: float(np.mean(each)) for category, each in shares.items()}
    return scores | {"overall": float(np.mean(list(scores.values())))}


def parser_accuracy(
    spec: str | SceneSpec = "scenes32", round_trip: RoundTrip | None = None, num_scenes: int = 300, seed: int = 0
) -> float:
    """Share of objects in true images whose kind and colour the parser finds in their cell; the mean over the kinds.

    Garments are of those that the judge was not trained on.

    Args:
        round_trip: what the images pass through before: a model's autoencoder.
        num_scenes: how many images, each with as many objects as the family shows.
    """
    spec = SPECS[spec] if isinstance(spec, str) else spec
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(rng, spec, "val", [Slot()] * spec.max_objects) for _ in range(num_scenes)]
    images = np.stack([render(scene, spec) for scene in scenes])
    if round_trip is not None:
        images = _levels(round_trip(_pixels(images)))
    right: dict[str, list[bool]] = {kind: [] for kind in spec.vocabulary.kinds}
    for scene, image in zip(scenes, images, strict=True):
        found = {(item.cell, item.kind, item.colour) for item in parse_image(image, spec)}
        for item in scene.objects:
            right[item.kind].append((item.cell, item.kind, item.colour) in found)
    return float(np.mean([np.mean(values) for values in right.values()]))


def _variance(right: Tensor, number: Tensor) -> Tensor:
    """Of a share right / number. One more of either kind is assumed, as nothing is certain where all were right."""
    share = (right + 1) / (number + 2)
    return share * (1 - share) / number


def _pixels(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def _levels(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    levels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def _normalise(text: str) -> str:
    return text.strip().casefold()


def _check_lengths(**arguments: Sequence[str] | Tensor) -> None:
    lengths = {name: len(values) for name, values in arguments.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"expected equally many of each, got {lengths}")
