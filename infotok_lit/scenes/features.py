"""Small networks that know what Scenes and Garments show; their features are those of the embedded Frechet distances.

`python -m infotok_lit.scenes.features` trains that of Scenes again and writes the weights that ship (a few minutes on a
CPU); that of Garments is their judge.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from infotok_lit.assets import SCENES_FEATURES
from infotok_lit.scenes.generator import Scene
from infotok_lit.scenes.judge import cells_of, shipped_judge
from infotok_lit.scenes.source import Scenes
from infotok_lit.scenes.spec import COLOURS, SHAPES, SPECS

KINDS = len(SHAPES.kinds) * len(COLOURS)
CELLS = 4


class SceneFeatures(nn.Module):
    """Images (B, 3, H, W) uint8, brought to 32 pixels -> features (B, 64) float32.

    Args:
        weights: default: those that ship; None for random ones.
    """

    num_features = 64

    def __init__(self, weights: Path | None = SCENES_FEATURES) -> None:
        super().__init__()
        widths = (3, 16, 32, self.num_features)
        layers = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        # In training each quarter of the image says which object lies there.
        self.head = nn.Linear(self.num_features * 4, KINDS + 1)
        if weights is not None:
            self.load_state_dict(load_file(weights))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "SceneFeatures":
        """It is not trained any more, whatever a metric or module around it asks for."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """The mean over places of the last layer."""
        return self._maps(images).mean((2, 3))

    def recognise(self, images: Tensor) -> Tensor:
        """(B, 4, shapes x colours + 1): logits of what lies in each quarter; the last one of nothing."""
        maps = self._maps(images)
        quarters = maps.unfold(2, 2, 2).unfold(3, 2, 2)
        return self.head(quarters.permute(0, 2, 3, 1, 4, 5).flatten(3)).flatten(1, 2)

    def _maps(self, images: Tensor) -> Tensor:
        pixels = images.float() / 127.5 - 1
        if pixels.shape[2:] != (32, 32):
            pixels = F.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)
        return self.body(pixels)


class GarmentFeatures(nn.Module):
    """Images (B, 3, H, W) uint8 -> features (B, 64) float32: the judge of garments, its last layer, mean over cells."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.body = copy.deepcopy(shipped_judge().features).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "GarmentFeatures":
        """It is not trained any more, whatever a metric or module around it asks for."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """The judge looks at each place for itself."""
        cells = cells_of(images.float() / 127.5 - 1, SPECS["garments32"])
        return self.body(cells).unflatten(0, (len(images), -1)).mean(1)


def contents(scene: Scene) -> Tensor:
    """(4,) int64: the kind in each quarter of a scene with 2 x 2 places, KINDS for none."""
    found = torch.full((CELLS,), KINDS)
    for item in scene.objects:
        kind = SHAPES.kinds.index(item.kind) * len(COLOURS) + COLOURS.index(item.colour)
        found[2 * item.cell[0] + item.cell[1]] = kind
    return found


def batch_of(scenes: Scenes, numbers: range) -> tuple[Tensor, Tensor]:
    """Images (B, 3, 32, 32) uint8 and their contents (B, 4)."""
    drawn = [scenes.draw("understanding", number)[0] for number in numbers]
    images = np.stack([np.asarray(scenes.sample("understanding", number).image) for number in numbers])
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.stack([contents(scene) for scene in drawn])


def train(steps: int = 6000, batch_size: int = 64, lr: float = 2e-3) -> SceneFeatures:
    """A network that recognises training scenes, from random weights."""
    torch.manual_seed(0)
    network = SceneFeatures(weights=None).requires_grad_(True)
    scenes = Scenes(split="train", num_samples=steps * batch_size)
    optimiser = torch.optim.AdamW(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        images, kinds = batch_of(scenes, range(step * batch_size, (step + 1) * batch_size))
        loss = F.cross_entropy(network.recognise(images).flatten(0, 1), kinds.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network.requires_grad_(False)


if __name__ == "__main__":
    save_file(train().state_dict(), SCENES_FEATURES)
