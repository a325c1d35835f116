"""The codebook of discrete tokens: how often codes are used, and where in images."""

from dataclasses import dataclass

import lightning.pytorch as pl
import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from PIL.Image import Image
from torch import Tensor

from infotok_lit.batch import BRANCHES, Batch, Branch
from infotok_lit.callbacks.figures import BRANCH_COLOURS, GREY, panels, publish, rendered
from infotok_lit.errors import SettingsError
from infotok_lit.modules.losses import BranchResult
from infotok_lit.objective.distributed import global_sum
from infotok_lit.pictures import captioned_grid, to_uint8


@dataclass(frozen=True)
class CodedImages:
    """The images that are shown."""

    pixel_values: Tensor
    """(B, 3, height, width)."""
    codes: Tensor
    """(B, h, w) int64, of the tokens that have a place."""


class Codebook(pl.Callback):
    """At each validation, draws how often each code is used, and maps of codes beside their images.

    Nothing is drawn for continuous tokens.

    Args:
        shown: How many images the maps show, the first of understanding.
    """

    def __init__(self, shown: int = 8) -> None:
        if shown < 1:
            raise SettingsError("Codebook: shown must be 1 or more")
        self.shown = shown
        self._counts: dict[Branch, Tensor] = {}
        self._images: CodedImages | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last validation."""
        self._counts, self._images = {}, None

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: BranchResult,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the codes; keep the first images."""
        if outputs.output.codes is None:
            return
        branch, codes = BRANCHES[dataloader_idx], outputs.output.codes
        counts = torch.bincount(codes.codes.flatten(), minlength=codes.num_codes)
        self._counts[branch] = self._counts.get(branch, 0) + counts
        if branch == "understanding" and batch_idx == 0:
            placed = codes.codes[: self.shown, outputs.output.layout.num_extra :].unflatten(
                1, outputs.output.layout.grid
            )
            self._images = CodedImages(batch.pixel_values[: self.shown], placed)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Merge the processes and draw."""
        counts = {branch: global_sum(self._counts[branch]).cpu() for branch in BRANCHES if branch in self._counts}
        if counts:
            publish(trainer, "val/code_usage", lambda: draw_usage(counts))
        if self._images is not None:
            publish(trainer, "val/code_maps", lambda: draw_maps(self._images, counts["understanding"]))


def draw_usage(counts: dict[Branch, Tensor]) -> Image:
    """How often each code occurs (K,), by branch -> the picture: shares of all tokens, the largest first."""
    figure, axes = panels(1, len(counts), "Codebook usage over the validation set")
    for axis, (branch, count) in zip(axes.flat, counts.items(), strict=True):
        _draw_usage(axis, branch, count.double() / count.sum())
    return rendered(figure)


def _draw_usage(axis: Axes, branch: Branch, share: Tensor) -> None:
    used, bits = int((share > 0).sum()), float(torch.special.entr(share).sum() / np.log(2))
    sizes = share.sort(descending=True).values[:used]
    axis.step(range(1, used + 1), sizes, where="mid", color=BRANCH_COLOURS[branch], label="codes that occur")
    axis.axhline(1 / len(share), color=GREY, linestyle="--", linewidth=1, label=f"all {len(share):,} codes alike")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_title(f"{branch}: {used:,} codes ({100 * used / len(share):.1f} %), {bits:.1f} bits", fontsize=11)
    axis.set_xlabel("code, by how often it is used", fontsize=9)
    axis.set_ylabel("share of tokens", fontsize=9)
    axis.legend(fontsize=8, frameon=False)


def draw_maps(images: CodedImages, counts: Tensor) -> Image:
    """Each image and its map of codes: a colour per code, from common (dark) to rare (bright)."""
    rank = torch.empty_like(counts).scatter(0, counts.argsort(descending=True), torch.arange(len(counts)))
    used = int((counts > 0).sum())
    level = torch.log(rank[images.codes.cpu()] + 1.0) / np.log(max(used, 2))
    maps = (255 * matplotlib.colormaps["viridis"](level.numpy())[..., :3]).round().astype(np.uint8)
    tiles: list[np.ndarray] = []
    texts: list[str] = []
    for picture, colours, codes in zip(to_uint8(images.pixel_values), maps, images.codes, strict=True):
        tiles += [picture, colours]
        texts += ["", f"{len(codes.unique())} codes in {codes.numel()} tokens; dark: common"]
    return captioned_grid(tiles, texts)
