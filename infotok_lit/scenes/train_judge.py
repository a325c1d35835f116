"""Trains the judge of garments: `python -m infotok_lit.scenes.train_judge OUT.safetensors`, 13 CPU minutes.

It sees garments of the split "train" alone.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from infotok_lit.scenes.generator import Scene, Slot, draw_scene
from infotok_lit.scenes.judge import CELL, GarmentJudge, cells_of
from infotok_lit.scenes.render import render
from infotok_lit.scenes.spec import COLOURS, GARMENTS, PALETTE, SPECS, SceneSpec


def train_judge(steps: int = 8000, scenes: int = 24, seed: int = 0) -> GarmentJudge:
    """A judge from random weights, trained on scenes of garments of the split "train".

    Three quarters of the images lose high frequencies, as an autoencoder takes them, or are noisy. Beside them
    stand images that hold nothing.
    """
    spec = SPECS["garments32"]
    rng, empty = np.random.default_rng(seed), len(GARMENTS.kinds)
    torch.manual_seed(seed)
    judge = GarmentJudge().train()
    optimiser = torch.optim.AdamW(judge.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=steps)
    for _ in range(steps):
        images, kinds, colours = _drawn_cells(rng, spec, scenes, empty=0.2)
        cells = cells_of(torch.cat([_degraded(images, rng), _formless(images[: scenes // 4], rng)]), spec)
        nothing = torch.full((len(cells) - len(kinds),), empty)
        kinds, colours = torch.cat([kinds, nothing]), torch.cat([colours, torch.zeros_like(nothing)])
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


def _formless(images: Tensor, rng: np.random.Generator) -> Tensor:
    """As many images without outlines: flat or flowing colours, noise, or blurred to 2 pixels a cell.

    A model that has learnt colours and places alone draws such images; a judge that has not seen them calls them bags.
    """
    size, choice = images.shape[2:], rng.integers(3)
    if choice == 2:
        coarse = F.interpolate(images, scale_factor=2 / CELL, mode="area")
    else:
        side = int(rng.integers(1, 4))
        tints = torch.tensor(list(PALETTE.values())).float() / 127.5 - 1
        colours = tints[torch.from_numpy(rng.integers(len(tints), size=(len(images), side, side)))]
        mixed = torch.from_numpy(rng.uniform(-1, 1, colours.shape)).float()
        coarse = (colours if rng.integers(2) else mixed).permute(0, 3, 1, 2)
    smooth = F.interpolate(coarse, size, mode="bilinear")
    noise = rng.uniform(0, 1) * torch.from_numpy(rng.standard_normal(images.shape)).float()
    return (smooth + noise if choice == 0 else smooth).clamp(-1, 1)


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
    parser = argparse.ArgumentParser(prog="python -m infotok_lit.scenes.train_judge", description=main.__doc__)
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    out = parser.parse_args().out
    judge = train_judge()
    save_file({name: value.contiguous() for name, value in judge.state_dict().items()}, out)


if __name__ == "__main__":
    main()
