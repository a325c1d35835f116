"""Scenes as a data source: an endless supply of exactly labelled images that needs no download."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from infotok_lit.batch import BRANCHES, Branch, GenerationSample, Sample, Source, UnderstandingSample
from infotok_lit.errors import SettingsError
from infotok_lit.scenes.generator import Scene
from infotok_lit.scenes.grammar import CATEGORIES, Category, draw_captioned_scene, write_caption
from infotok_lit.scenes.negatives import false_captions, false_exchanges
from infotok_lit.scenes.questions import QUESTION_KINDS, QuestionKind, describe_scene, draw_question
from infotok_lit.scenes.render import render
from infotok_lit.scenes.spec import SPECS, SPLITS, SpecName, Split


class Scenes(Source):
    """Procedurally drawn scenes with captions and questions.

    Args:
        spec: the family of scenes: shapes at 32 px with 2x2 places (`scenes32`), the same with distractors in the
            shapes' own colours (`scenes32_hard`), shapes at 64 px with 3x3 places (`scenes64`), or photographs of
            garments at 32 px with 2x2 places (`garments32`).
        split: "train" and "val" never show the held-out combinations and placements; each image of "held_out" does.
            "val" and "held_out" show other photographs than "train".
        num_samples: how many indices there are per branch.
        seed: seed of the whole data set; a sample depends on nothing but seed, split, branch and index.
        texture: strength of the background texture in [0, 1]; None keeps the family's own.
        jitter: the most pixels that a centre moves from its cell's centre; None keeps the family's own.
        categories: the caption categories of the generation branch, equally likely; a repeated one is likelier.
        question_kinds: the question kinds of the understanding branch, likewise.
        dense_captions: the share of the generation branch whose caption is the full description of a scene of one to
            four objects. They belong to no category and are not scored: they teach what words mean where the short
            captions leave most of an image open.

    Raises:
        SettingsError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        spec: SpecName = "scenes32",
        split: Split = "train",
        num_samples: int = 1_000_000,
        seed: int = 0,
        texture: float | None = None,
        jitter: float | None = None,
        categories: tuple[Category, ...] = CATEGORIES,
        question_kinds: tuple[QuestionKind, ...] = QUESTION_KINDS,
        dense_captions: float = 0.0,
    ) -> None:
        _check_choices("spec", (spec,), tuple(SPECS))
        _check_choices("split", (split,), SPLITS)
        _check_choices("categories", categories, CATEGORIES)
        _check_choices("question_kinds", question_kinds, QUESTION_KINDS)
        if num_samples < 1 or seed < 0:
            raise SettingsError(f"num_samples must be positive and seed not negative, got {num_samples} and {seed}")
        if not 0 <= dense_captions <= 1:
            raise SettingsError(f"dense_captions is a share: give it between 0 and 1, not {dense_captions}")
        preset = SPECS[spec]
        self.spec = replace(
            preset,
            texture=preset.texture if texture is None else texture,
            jitter=preset.jitter if jitter is None else jitter,
        )
        self.name = spec
        self.split_name: Split = split
        self.seed = seed
        self.categories = tuple(categories)
        self.question_kinds = tuple(question_kinds)
        self.dense_captions = dense_captions
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def split(self, share: float) -> tuple[Source, Source]:
        """The scenes of "train", and as large a share of those of "val"; SettingsError for any others."""
        if self.split_name != "train":
            return super().split(share)
        held_back = copy.copy(self)
        held_back.split_name = "val"
        held_back._num_samples = max(1, round(share * self._num_samples))
        return self, held_back

    def draw(self, branch: Branch, index: int) -> tuple[Scene, str, str]:
        """The ground truth of a sample: its scene, its caption or question, and the answer ("" for a caption)."""
        if not 0 <= index < self._num_samples:
            raise IndexError(
                f"index {index} is outside the {self._num_samples} samples of {self.name}/{self.split_name}"
            )
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split_name), BRANCHES.index(branch), index])
        if branch == "generation" and self.dense_captions and rng.random() < self.dense_captions:
            scene, _, _ = draw_question(rng, self.spec, self.split_name, "description")
            return scene, describe_scene(scene, self.spec), ""
        if branch == "generation":
            category = self.categories[rng.integers(len(self.categories))]
            prompt, scene = draw_captioned_scene(rng, self.spec, self.split_name, category)
            return scene, write_caption(prompt), ""
        kind = self.question_kinds[rng.integers(len(self.question_kinds))]
        return draw_question(rng, self.spec, self.split_name, kind)

    def hard_negatives(self, branch: Branch, index: int) -> Sequence[str] | Sequence[tuple[str, str]]:
        """All false texts of the grammar that differ from the sample's own in one attribute."""
        scene, text, answer = self.draw(branch, index)
        if branch == "generation":
            return false_captions(scene, text, self.spec, self.split_name)
        return false_exchanges(scene, text, answer, self.spec, self.split_name)

    def sample(self, branch: Branch, index: int, rng: np.random.Generator | None = None) -> Sample:
        """The sample of an index. `rng` is not used: an index is the same scene in every epoch."""
        scene, text, answer = self.draw(branch, index)
        image = Image.fromarray(render(scene, self.spec))
        name = f"{self.name}/{self.split_name}/{branch}/{index}"
        if branch == "generation":
            return GenerationSample(image=image, caption=text, name=name)
        return UnderstandingSample(image=image, question=text, answer=answer, name=name)


def _check_choices(argument: str, chosen: tuple[str, ...], known: tuple[str, ...]) -> None:
    unknown = [item for item in chosen if item not in known]
    if unknown or not chosen:
        raise SettingsError(f"{argument} must be chosen from {known}, got {chosen}")
