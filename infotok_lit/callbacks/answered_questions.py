"""Shows what the model understands: answers beside the truth, and where the shared tokens spend their bits."""

import lightning.pytorch as pl
import matplotlib
import numpy as np
from torch import Tensor
from torch.nn import functional as F

from infotok_lit.batch import BRANCHES, UnderstandingBatch
from infotok_lit.callbacks.figures import publish
from infotok_lit.errors import SettingsError
from infotok_lit.modules.losses import BranchResult
from infotok_lit.pictures import captioned_grid, to_uint8

UNDERSTANDING = BRANCHES.index("understanding")
OPACITY = 0.55


class AnsweredQuestions(pl.Callback):
    """At each validation, two grids over the first understanding samples: questions with answers, and rate maps.

    A rate map lays bits per token over the image. It needs a term with a posterior (compactness or sufficiency).

    Args:
        shown: How many samples the grids show.
    """

    def __init__(self, shown: int = 16) -> None:
        if shown < 1:
            raise SettingsError("AnsweredQuestions: shown must be 1 or more")
        self.shown = shown

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: BranchResult,
        batch: UnderstandingBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Publish both grids for the first batch."""
        if dataloader_idx != UNDERSTANDING or batch_idx > 0:
            return
        images = to_uint8(batch.pixel_values[: self.shown])
        answers = [
            f"Q: {question} A: {answer} (truth: {truth})"
            for question, answer, truth in zip(batch.questions, outputs.answers, batch.answers, strict=True)
        ]
        publish(trainer, "val/answers", lambda: captioned_grid(list(images), answers[: len(images)]))
        if outputs.objective.token_rates is not None:
            rates = outputs.objective.token_rates[: len(images)]
            maps = overlay(images, rates[:, outputs.output.layout.num_extra :], outputs.output.layout.grid)
            texts = [f"{float(rate.sum()):.0f} bits, at most {float(rate.max()):.1f} in a token" for rate in rates]
            publish(trainer, "val/token_rates", lambda: captioned_grid(list(maps), texts))


def overlay(images: np.ndarray, rates: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Lay bits per token (B, h*w) over images (B, height, width, 3) uint8; yellow is the highest rate of the batch."""
    maps = rates.float().cpu().unflatten(1, grid).unsqueeze(1)
    maps = F.interpolate(maps, size=images.shape[1:3], mode="nearest").squeeze(1)
    heat = matplotlib.colormaps["viridis"]((maps / maps.max().clamp(min=1e-9)).numpy())[..., :3]
    return (255 * ((1 - OPACITY) * images / 255 + OPACITY * heat)).round().astype(np.uint8)
