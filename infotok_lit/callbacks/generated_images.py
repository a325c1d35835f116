"""Generates the validation captions: a grid to look at and, for Scenes, a score."""

from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL.Image import Image
from torch import Tensor

from infotok_lit.batch import BRANCHES, Branch
from infotok_lit.callbacks.figures import publish
from infotok_lit.data.datamodule import UnifiedDataModule
from infotok_lit.errors import SettingsError
from infotok_lit.pictures import captioned_grid, to_uint8
from infotok_lit.scenes import Scenes
from infotok_lit.scenes.grammar import CATEGORIES, Category
from infotok_lit.scenes.metrics import RoundTrip, SceneScore, drawing_chance, parser_accuracy
from infotok_lit.scenes.spec import SpecName

GENERATION = BRANCHES.index("generation")
CHANCE_SCENES = 300
"""Over all their pairs, the chance of one draw of so many scenes lies within some 0.005 of another's."""
JUDGED_SCENES = 150


class GeneratedImages(pl.Callback):
    """At each validation, generate images from captions; log a grid, and the score by GenEval's formula for Scenes.

    Beside the score stand its chance level, and how often the parser of the images is right about true ones that have
    passed through the model's autoencoder. Of other data the grid shows each image beside its target.

    Args:
        num_images: How many captions to generate per process, the first of the validation set; always the same ones.
            Default: 96 where they are scored, to be looked at elsewhere 8.
        score: The family of Scenes that the captions come from; None for no score, as other data has no parser.
            Default: what generation is validated on says.
        shown: How many of the images the grid shows.
        seed: Seed of the first image; image i has seed + i.
    """

    def __init__(
        self,
        num_images: int | None = None,
        score: SpecName | Literal["auto"] | None = "auto",
        shown: int = 16,
        seed: int = 0,
    ) -> None:
        if (num_images is not None and num_images < 1) or shown < 1:
            raise SettingsError("num_images and shown must be 1 or more")
        self.num_images = num_images
        self.shown = shown
        self.seed = seed
        self.score = score
        self.metric: SceneScore | None = None
        self._images: list[np.ndarray] = []
        self._targets: list[np.ndarray] = []
        self._captions: list[str] = []
        self._parser_accuracy: float | None = None
        self._chances: dict[tuple[Category, ...], float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out what there is to score."""
        family = scenes_of(trainer, "generation") if self.score == "auto" else self.score
        self.metric = None if family is None else SceneScore(family)
        if self.num_images is None:
            self.num_images = 8 if family is None else 96

    def _chance(self, categories: tuple[Category, ...]) -> float:
        """What perfect images for captions of these categories would score if they ignored their own."""
        if categories not in self._chances:
            found = drawing_chance(self.metric.spec, CHANCE_SCENES, categories=categories)
            self._chances[categories] = found["overall"]
        return self._chances[categories]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last validation's images."""
        self._images, self._targets, self._captions = [], [], []
        if self.metric is not None:
            self.metric.to(pl_module.device).reset()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Generate the captions of a generation batch, until there are enough."""
        captions = batch.captions[: self.num_images - len(self._images)] if dataloader_idx == GENERATION else []
        if not captions:
            return
        first = self.seed + trainer.global_rank * self.num_images + len(self._images)
        images = pl_module.base.generate(captions, seed=first)
        self._images.extend(to_uint8(images))
        self._targets.extend(to_uint8(batch.pixel_values[: len(captions)]))
        self._captions.extend(captions)
        if self.metric is not None:
            self._score(images, captions)

    def _score(self, images: Tensor, captions: list[str]) -> None:
        scored = [number for number, caption in enumerate(captions) if self.metric.knows(caption)]
        if len(scored) < len(captions):
            rank_zero_warn("GeneratedImages: captions that are not those of Scenes are generated but not scored")
        self.metric.update(images[scored], [captions[number] for number in scored])

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the scores over all processes, and this process's grid."""
        if self.metric is not None:
            scores = self.metric.compute()
            # With nothing to score there is no number: not a zero.
            if not torch.isnan(scores["overall"]):
                if self._parser_accuracy is None:
                    self._parser_accuracy = parser_accuracy(self.metric.spec, _round_trip(pl_module), JUDGED_SCENES)
                asked = tuple(name for name in CATEGORIES if name in scores)
                scores |= {"chance": self._chance(asked), "parser_accuracy": self._parser_accuracy}
                pl_module.log_dict({f"val/generation/score/{name}": value for name, value in scores.items()})
        if self._images:
            publish(trainer, "val/drawings", self._grid)

    def _grid(self) -> Image:
        images, captions = self._images[: self.shown], self._captions[: self.shown]
        if self.metric is not None:
            return captioned_grid(images, captions)
        pairs = zip(self._targets, images, strict=False)
        texts = [text for caption in captions for text in (f"target: {caption}", "generated")]
        return captioned_grid([image for pair in pairs for image in pair], texts)


def _round_trip(pl_module: pl.LightningModule) -> RoundTrip | None:
    """What the model's autoencoder makes of images, as it is at inference; None for a model without one."""
    autoencoder = getattr(pl_module.base, "autoencoder", None)
    if not (hasattr(autoencoder, "encode") and hasattr(autoencoder, "decode")):
        return None
    return lambda images: autoencoder.decode(autoencoder.encode(images.to(pl_module.device)))


def scenes_of(trainer: pl.Trainer, branch: Branch) -> str | None:
    """The family of Scenes that a branch is validated on; None for other data."""
    if not isinstance(trainer.datamodule, UnifiedDataModule):
        return None
    source = trainer.datamodule.validation_sources[branch]
    return source.name if isinstance(source, Scenes) else None


def training_scenes(trainer: pl.Trainer) -> Scenes | None:
    """What understanding is trained on, if that is Scenes alone."""
    if not isinstance(trainer.datamodule, UnifiedDataModule):
        return None
    source = trainer.datamodule.training_sources["understanding"]
    return source if isinstance(source, Scenes) else None
