"""Active units: how the rate is spread over the dimensions of the posterior."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from matplotlib.axes import Axes
from PIL.Image import Image
from torch import Tensor

from infotok_lit.batch import BRANCHES, Branch
from infotok_lit.callbacks.figures import BRANCH_COLOURS, GREY, panels, publish, rendered
from infotok_lit.modules.losses import BranchResult
from infotok_lit.objective.distributed import global_sum
from infotok_lit.objective.report import ACTIVE_NATS

ACTIVE_BITS = ACTIVE_NATS / math.log(2)
LOWEST_BITS = 1e-5
"""Where the axis ends at the latest."""


class ActiveUnits(pl.Callback):
    """At each validation, draws the rate of every dimension of the posterior, the largest first; both branches.

    A dimension is active if its mean KL over the validation set exceeds 0.01 nats. Batches count by their images, as in
    `val/<branch>/rate_bits_per_token`, which the dimensions add up to.
    """

    def __init__(self) -> None:
        self._sums: dict[Branch, Tensor] = {}
        self._images: dict[Branch, int] = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last validation."""
        self._sums, self._images = {}, {}

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: BranchResult,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add up the bits of each dimension."""
        if outputs.objective.unit_rates is None:
            return
        branch, images = BRANCHES[dataloader_idx], len(outputs.output.tokens)
        self._sums[branch] = self._sums.get(branch, 0.0) + images * outputs.objective.unit_rates
        self._images[branch] = self._images.get(branch, 0) + images

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Merge the processes and draw."""
        rates = {branch: self._global_rates(branch) for branch in BRANCHES if branch in self._sums}
        if rates:
            publish(trainer, "val/active_units", lambda: draw_active_units(rates))

    def _global_rates(self, branch: Branch) -> Tensor:
        """(d,) bits per token, over all processes."""
        sums = self._sums[branch]
        total = global_sum(torch.cat([sums, sums.new_tensor([self._images[branch]])]))
        return (total[:-1] / total[-1]).cpu()


def draw_active_units(rates: dict[Branch, Tensor]) -> Image:
    """Bits per token of each dimension (d,), by branch -> the picture."""
    figure, axes = panels(1, len(rates), "Active units: bits per token of each posterior dimension")
    for axis, (branch, bits) in zip(axes.flat, rates.items(), strict=True):
        _draw_panel(axis, branch, bits.sort(descending=True).values)
    return rendered(figure)


def _draw_panel(axis: Axes, branch: Branch, bits: Tensor) -> None:
    active = int((bits > ACTIVE_BITS).sum())
    places, heights = range(1, len(bits) + 1), bits.clamp(min=LOWEST_BITS)
    colour = BRANCH_COLOURS[branch]
    lowest = max(LOWEST_BITS, min(ACTIVE_BITS, float(bits.min())) / 3)
    axis.fill_between(places, lowest, heights, step="mid", color=colour, alpha=0.25)
    axis.step(places, heights, where="mid", color=colour)
    axis.axhline(ACTIVE_BITS, color=GREY, linestyle="--", linewidth=1, label="active above 0.01 nats")
    axis.set_yscale("log")
    axis.set_ylim(lowest, max(10 * ACTIVE_BITS, 2 * float(bits.max())))
    axis.set_xlim(0.5, len(bits) + 0.5)
    axis.set_title(f"{branch}: {active} of {len(bits)} active, {float(bits.sum()):.2f} bits/token", fontsize=11)
    axis.set_xlabel("dimension, sorted", fontsize=9)
    axis.set_ylabel("mean rate, bits per token", fontsize=9)
    axis.legend(fontsize=8, frameon=False)
