"""Linear CKA of the shared tokens: how alike are they to the other branch's, to captions, and to what they were."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from infotok_lit.batch import BRANCHES, Branch, GenerationBatch
from infotok_lit.metrics.cka import LinearCKA
from infotok_lit.models.common.text import text_key
from infotok_lit.modules.losses import BranchResult
from infotok_lit.objective.distributed import gather_rows
from infotok_lit.seeding import isolated_rng

GENERATION = BRANCHES.index("generation")
Rows = dict[Branch, Tensor]
"""Branch -> (n, D) mean tokens of the same images."""


class ImageSimilarity(pl.Callback, ABC):
    """At each validation, logs linear CKA between two views of the images of the generation branch.

    Rows are gathered, so the value is that of all processes' images at once. Logged are `debiased`, the one to read;
    `biased`, Kornblith's; `shuffled`, what the biased one is for pairs at random, its chance level; effective
    dimensions and the share of the largest channel of either side.
    """

    prefix: ClassVar[str]
    """Of the names that are logged."""
    sides: ClassVar[tuple[str, str]]
    """What the views are called there."""

    def __init__(self) -> None:
        self._alike: LinearCKA | None = None

    @abstractmethod
    def views(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: BranchResult, batch: GenerationBatch
    ) -> tuple[Tensor, Tensor]:
        """Two float32 rows for each image of a batch: (B, D) and (B, E)."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start anew."""
        self._alike = None

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: BranchResult,
        batch: GenerationBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a generation batch's images."""
        if dataloader_idx == GENERATION:
            views = self.views(trainer, pl_module, outputs, batch)
            names = torch.tensor([text_key(name) for name in batch.names], device=views[0].device)
            self.add(*gather_rows(names, *views))

    def add(self, names: Tensor, first: Tensor, second: Tensor) -> None:
        """Compare both views (n, D), (n, E) of all processes' images; `names` (n,) are digests."""
        if self._alike is None:
            self._alike = LinearCKA(first.shape[1], second.shape[1], sync_on_compute=False).to(first.device)
        self._alike.update(first, second)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log."""
        if self._alike is not None:
            log_similarity(pl_module, self.prefix, self._alike, self.sides)


class TokenSimilarity(ImageSimilarity):
    """At each validation, logs linear CKA between the tokens of understanding and of generation for the same images.

    The images are those of the generation branch, as it sees them; the understanding branch sees them too. Each image
    is one sample: the mean of its tokens that are present (extra ones, such as Harmon's buffers, included), in float32.
    So widths and numbers of tokens may differ. The tokens of generation are those of training, hidden or noisy as they
    are there, under the same random numbers in each validation. Logged under `val/cka/...`.

    Args:
        drift: Compare the tokens with those before training as well, under `val/cka_drift/<branch>/...`. Needs the
            validation before training, `trainer.num_sanity_val_steps: -1`, and warns if there is none; those tokens
            become part of the checkpoint.
    """

    prefix = "val/cka"
    sides = BRANCHES

    def __init__(self, drift: bool = False) -> None:
        super().__init__()
        self.drift = drift
        self.before: dict[str, Tensor] = {}
        self._now: list[tuple[Tensor, Tensor, Tensor]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Say where there will be no drift, for want of tokens to compare with."""
        if stage == "fit" and self.drift and trainer.num_sanity_val_steps != float("inf"):
            self.drift = False
            if not trainer.fast_dev_run:
                rank_zero_warn(
                    "TokenSimilarity: no drift is logged, as it compares with the validation before training; for "
                    "that, set trainer.num_sanity_val_steps to -1"
                )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start anew."""
        super().on_validation_start(trainer, pl_module)
        self._now = []

    def views(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: BranchResult, batch: GenerationBatch
    ) -> tuple[Tensor, Tensor]:
        """The mean tokens of understanding, and of generation."""
        return understood_means(trainer, pl_module, batch), outputs.output.tokens.float().mean(1)

    def add(self, names: Tensor, first: Tensor, second: Tensor) -> None:
        """Keep them for the drift, too."""
        super().add(names, first, second)
        if self.drift:
            self._now.append((names.cpu(), first.cpu(), second.cpu()))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log."""
        super().on_validation_epoch_end(trainer, pl_module)
        if self._now:
            names, *rows = (torch.cat(parts) for parts in zip(*self._now, strict=True))
            self._log_drift(trainer, pl_module, names, dict(zip(BRANCHES, rows, strict=True)))

    def state_dict(self) -> dict[str, Any]:
        """The tokens before training."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the tokens before the run."""
        self.before = state_dict["before"]

    def _log_drift(self, trainer: pl.Trainer, pl_module: pl.LightningModule, names: Tensor, now: Rows) -> None:
        if not self.before:
            if trainer.global_step:
                rank_zero_warn("TokenSimilarity: the tokens before training were not kept: no drift is logged")
            if trainer.global_step or trainer.state.fn != "fit":
                return
            self.before = {"names": names, **now}
        places = {name: place for place, name in enumerate(self.before["names"].tolist())}
        if not all(name in places for name in names.tolist()):
            rank_zero_warn("TokenSimilarity: the validation images are not those before training: no drift is logged")
            return
        same = torch.tensor([places[name] for name in names.tolist()])
        for branch, rows in now.items():
            metric = LinearCKA(rows.shape[1], rows.shape[1], sync_on_compute=False)
            metric.update(self.before[branch][same], rows)
            log_similarity(pl_module, f"val/cka_drift/{branch}", metric, ("before", "now"))


class TextSimilarity(ImageSimilarity):
    """At each validation, logs linear CKA between understanding tokens and final text states of the same pairs.

    The pairs are those of the generation branch. An image is the mean of its understanding tokens; a caption is the
    mean of the language model's last hidden states over its own tokens, fed without the image and without a template:
    after an image they would carry visual content, and be alike for that. The paper leaves this open. Logged under
    `val/cka_text/...`.
    """

    prefix = "val/cka_text"
    sides = ("tokens", "text")

    def views(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: BranchResult, batch: GenerationBatch
    ) -> tuple[Tensor, Tensor]:
        """The mean tokens of the images, and the mean states of their captions."""
        images = understood_means(trainer, pl_module, batch)
        with trainer.precision_plugin.val_step_context():
            states = pl_module.base.last_hidden_states(batch.text.ids, batch.text.mask)
        weights = batch.text.mask.float()[..., None]
        return images, (states.float() * weights).sum(1) / weights.sum(1)


def understood_means(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: GenerationBatch) -> Tensor:
    """(B, D) float32: the mean token of understanding of each image of a generation batch."""
    with isolated_rng(0, pl_module.device), trainer.precision_plugin.val_step_context():
        return pl_module.base.understood_tokens(batch.pixel_values).float().mean(1)


def log_similarity(pl_module: pl.LightningModule, prefix: str, metric: LinearCKA, sides: tuple[str, str]) -> None:
    """Log what can be computed, with the sides by name: `rank_x` becomes, say, `rank_understanding`."""
    for name, value in metric.compute().items():
        ending = {"_x": f"_{sides[0]}", "_y": f"_{sides[1]}"}.get(name[-2:])
        if not torch.isnan(value):
            pl_module.log(f"{prefix}/{name[:-2] + ending if ending else name}", value.float().to(pl_module.device))
