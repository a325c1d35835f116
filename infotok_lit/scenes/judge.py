"""The judge of garments: a small CNN that finds what lies in each cell of an image.

The weights ship with the package. `python -m infotok_lit.scenes.judge OUT.safetensors` trains them again, on the
garments of the split "train" alone: some minutes on one core.
"""

import argparse
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from infotok_lit.assets import GARMENT_JUDGE
from infotok_lit.scenes.generator import Scene, Slot, draw_scene
from infotok_lit.scenes.render import render
from infotok_lit.scenes.spec import COLOURS, GARMENTS, SPECS, SceneSpec

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
        pooled = [layer for i, conv in enumerate(convolutions) for layer in _stage(conv, pool=i % 2 == 1)]
        self.features = nn.Sequential(*pooled, nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * WIDTH, 64), nn.ReLU())
        self.kind = nn.Linear(64, len(GARMENTS.kinds) + 1)
        self.colour = nn.Linear(64, len(COLOURS))

    def forward(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Both logits."""
        features = self.features(cells)
        return self.kind(features), self.colour(features)


def _stage(convolution: nn.Module, pool: bool) -> list[nn.Module]:
    return [convolution, nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])]


@lru_cache(maxsize=1)
def shipped_judge() -> GarmentJudge:
    """The judge that ships with the package, on the CPU."""
    judge = GarmentJudge()
    judge.load_state_dict(load_file(GARMENT_JUDGE))
    return judge.eval()


@torch.no_grad()
def judge_cells(images: Tensor, spec: SceneSpec, judge: GarmentJudge | None = None) -> Verdicts:
    """What lies in each cell of images (B, 3, height, width) in [-1, 1]: B times cells^2 verdicts, in reading order."""
    judge = shipped_judge() if judge is None else judge
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


# Training


def train_judge(steps: int = 4000, scenes: int = 24, seed: int = 0) -> GarmentJudge:
    """A judge from random weights, trained on scenes of garments of the split "train".

    Half of the images lose high frequencies, as an autoencoder takes them, or are noisy.
    """
    spec = SPECS["garments32"]
    rng, empty = np.random.default_rng(seed), len(GARMENTS.kinds)
    torch.manual_seed(seed)
    judge = GarmentJudge().train()
    optimiser = torch.optim.AdamW(judge.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=steps)
    for _ in range(steps):
        images, kinds, colours = _drawn_cells(rng, spec, scenes, empty=0.2)
        cells = cells_of(_degraded(images, rng), spec)
        cells = cells.flip(-1) if rng.integers(2) else cells
        kind, colour = judge(cells)
        shown = kinds != empty
        loss = F.cross_entropy(kind, kinds, label_smoothing=0.05) + F.cross_entropy(colour[shown], colours[shown])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return judge.eval()


def _drawn_cells(rng: np.random.Generator, spec: SceneSpec, scenes: int, empty: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes of uniform garments of the split "train", held-out combinations among them.

    Args:
        empty: the share of cells without a garment.

    Returns:
        Images (scenes, 3, height, width) in [-1, 1]; the kind and colour (scenes x cells^2,) of each cell, in reading
        order; the number of kinds, and 0, where it is empty.
    """
    images, kinds, colours = [], [], []
    for _ in range(scenes):
        scene = draw_scene(rng, spec, "train", [Slot()] * spec.cells**2)
        scene = Scene(tuple(item for item in scene.objects if rng.random() >= empty), scene.texture_seed)
        images.append(render(scene, spec))
        shown = {item.cell: item for item in scene.objects}
        for cell in (divmod(number, spec.cells) for number in range(spec.cells**2)):
            item = shown.get(cell)
            kinds.append(len(GARMENTS.kinds) if item is None else GARMENTS.kinds.index(item.kind))
            colours.append(0 if item is None else COLOURS.index(item.colour))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels, torch.tensor(kinds), torch.tensor(colours)


def _degraded(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Images as a model may draw them: whole, without the finest frequencies of blocks of 4 or 8 pixels, or noisy."""
    choice = rng.integers(4)
    if choice < 2:
        images = _without_high_frequencies(images, block=(4, 8)[choice])
    elif choice == 2:
        images = images + 0.1 * torch.from_numpy(rng.standard_normal(images.shape)).float()
    return images.clamp(-1, 1)


def _without_high_frequencies(images: Tensor, block: int) -> Tensor:
    """Images (B, 3, height, width) with the lower half of the frequencies of each axis of their blocks' DCT."""
    frequency, pixel = torch.arange(block // 2).unsqueeze(1), torch.arange(block)
    basis = torch.cos(torch.pi * (2 * pixel + 1) * frequency / (2 * block)) * (2 / block) ** 0.5
    basis[0] = block**-0.5
    kept = basis.T @ basis
    height, width = (side // block for side in images.shape[2:])
    blocks = images.unflatten(3, (width, block)).unflatten(2, (height, block))
    return torch.einsum("ij,bchjwk,kl->bchiwl", kept, blocks, kept).flatten(4).flatten(2, 3)


def main() -> None:
    """Command line: the file to write to is its one argument."""
    parser = argparse.ArgumentParser(prog="python -m infotok_lit.scenes.judge", description=main.__doc__)
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    out = parser.parse_args().out
    judge = train_judge()
    save_file({name: value.contiguous() for name, value in judge.state_dict().items()}, out)


if __name__ == "__main__":
    main()
