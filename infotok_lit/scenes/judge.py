"""The judge of garments: a small CNN that finds what lies in each cell of an image.

The weights ship with the package; `train_judge.py` made them.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from infotok_lit.assets import GARMENT_JUDGE
from infotok_lit.scenes.spec import COLOURS, GARMENTS, SceneSpec

CELL = 16
"""Pixels per side of what the network sees: one cell."""
WIDTH = 24


class Verdicts(NamedTuple):
    """What lies in cells; each (n,)."""

    kind: Tensor
    """Index into the kinds of garments; their number where the cell is empty."""
    colour: Tensor
    """Index into COLOURS; of no meaning where the cell is empty."""
    confidence: Tensor
    """The probability of the kind."""


class GarmentJudge(nn.Module):
    """Cells (n, 3, CELL, CELL) in [-1, 1] -> logits of kinds (n, K + 1), "empty" last, and of colours (n, 6)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, WIDTH, WIDTH, 2 * WIDTH, 2 * WIDTH)
        convolutions = [nn.Conv2d(*pair, 3, padding=1) for pair in zip(widths[:-1], widths[1:], strict=True)]
        layers: list[nn.Module] = []
        for i, convolution in enumerate(convolutions):
            layers += [convolution, nn.ReLU(), *([nn.MaxPool2d(2)] if i % 2 else [])]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * WIDTH, 64), nn.ReLU())
        self.kind = nn.Linear(64, len(GARMENTS.kinds) + 1)
        self.colour = nn.Linear(64, len(COLOURS))

    def forward(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Both logits."""
        features = self.features(cells)
        return self.kind(features), self.colour(features)


@lru_cache(maxsize=1)
def shipped_judge() -> GarmentJudge:
    """The judge that ships with the package, on the CPU."""
    judge = GarmentJudge()
    judge.load_state_dict(load_file(GARMENT_JUDGE))
    return judge.eval()


@torch.no_grad()
def judge_cells(images: Tensor, spec: SceneSpec) -> Verdicts:
    """What lies in each cell of images (B, 3, height, width) in [-1, 1]: B times cells^2 verdicts, in reading order."""
    judge = shipped_judge()
    # Both views of a cell: garments have no left and right.
    cells = cells_of(images.float().cpu(), spec)
    kind, colour = (sum(logits) for logits in zip(judge(cells), judge(cells.flip(-1)), strict=True))
    confidence, found = (kind / 2).softmax(1).max(1)
    return Verdicts(found, colour.argmax(1), confidence)


def cells_of(images: Tensor, spec: SceneSpec) -> Tensor:
    """(B, 3, height, width) -> (B cells^2, 3, CELL, CELL)."""
    side = images.shape[-1] // spec.cells
    cells = images.unflatten(3, (spec.cells, side)).unflatten(2, (spec.cells, side))
    cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    return cells if side == CELL else F.interpolate(cells, (CELL, CELL), mode="bilinear", antialias=True)
