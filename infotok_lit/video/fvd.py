"""The Frechet video distance (Unterthiner et al., arXiv 1812.01717): how far decoded clips as a set are from true ones.

Its features are the 400 logits of an I3D (Carreira and Zisserman, arXiv 1705.07750) trained on Kinetics-400. The
weights are a file of the user, `i3d_pretrained_400.pt` or `rgb_imagenet.pt`: plain tensors, named as in pytorch-i3d.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from infotok_lit.checkpoints import CheckpointError, read_weights

CLIP_FRAMES = 16
"""What a clip has, as is usual; the network needs 9 or more."""
SIDE, NUM_CLASSES = 224, 400

# The widths of a block: 1x1; 1x1 and 3x3; 1x1 and 3x3; 1x1 after pooling.
BLOCKS = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "MaxPool3d_4a_3x3": (),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "MaxPool3d_5a_2x2": (),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}


def pad_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """(B, C, T, H, W) with the zeros that TensorFlow's SAME adds: ceil(n / stride) windows, the odd zero at the end."""
    pads: list[int] = []
    for size, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1], strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class Unit(nn.Module):
    """Convolution, batch norm, ReLU; the last one, of the logits, is a convolution with a bias alone."""

    def __init__(self, width: int, out: int, kernel: int, stride: int = 1, last: bool = False) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(width, out, kernel, stride, bias=last)
        self.bn = None if last else nn.BatchNorm3d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', ceil(T / stride), ...)."""
        x = self.conv3d(pad_same(x, self.conv3d.kernel_size, self.conv3d.stride))
        return x if self.bn is None else self.bn(x).relu()


class Pool(nn.Module):
    """Maximum over windows; zeros at the edges do not matter, as what is pooled is not negative."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C, ceil(T / stride), ...)."""
        return F.max_pool3d(pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class Inception(nn.Module):
    """Four views of the same place, side by side."""

    def __init__(self, width: int, direct: int, half: int, middle: int, narrow: int, small: int, pooled: int) -> None:
        super().__init__()
        self.b0 = Unit(width, direct, 1)
        self.b1a, self.b1b = Unit(width, half, 1), Unit(half, middle, 3)
        self.b2a, self.b2b = Unit(width, narrow, 1), Unit(narrow, small, 3)
        self.b3a, self.b3b = Pool((3, 3, 3), (1, 1, 1)), Unit(width, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H, W)."""
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], 1)


class I3d(nn.Module):
    """Clips -> the logits of Kinetics-400, means over time: what the distance compares."""

    num_features = NUM_CLASSES

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, stride=2)
        self.MaxPool3d_2a_3x3 = Pool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        self.MaxPool3d_3a_3x3 = Pool((1, 3, 3), (1, 2, 2))
        for name, widths in BLOCKS.items():
            side = 3 if name.endswith("3x3") else 2
            self.add_module(name, Inception(*widths) if widths else Pool((side,) * 3, (2, 2, 2)))
        self.logits = Unit(1024, NUM_CLASSES, 1, last=True)

    def forward(self, clips: Tensor) -> Tensor:
        """(B, T, 3, H, W) in [0, 255], T >= 9 -> (B, 400)."""
        frames = F.interpolate(clips.flatten(0, 1).float(), (SIDE, SIDE), mode="bilinear", align_corners=False)
        x = (frames / 127.5 - 1).unflatten(0, clips.shape[:2]).transpose(1, 2)
        *body, logits = self.children()
        for part in body:
            x = part(x)
        return logits(F.avg_pool3d(x, (2, 7, 7), stride=1)).flatten(2).mean(2)

    @classmethod
    def from_file(cls, path: Path) -> "I3d":
        """The network with the weights of a file; CheckpointError if they are of another network."""
        network = cls()
        state = {name: value for name, value in read_weights(path).items() if "num_batches_tracked" not in name}
        wanted = {name: value for name, value in network.state_dict().items() if "num_batches_tracked" not in name}
        if {name: part.shape for name, part in state.items()} != {name: part.shape for name, part in wanted.items()}:
            raise CheckpointError(
                f"{path} is not an I3D of Kinetics-400 under pytorch-i3d's names; FVD reads i3d_pretrained_400.pt or "
                "rgb_imagenet.pt"
            )
        # Older files do not count batches, which nothing needs.
        network.load_state_dict(state, strict=False)
        return network.eval().requires_grad_(False)


def video_distance(network: nn.Module) -> FrechetInceptionDistance:
    """The distance over a network's features of clips (B, T, 3, H, W); `update(clips, real=...)`, then `compute()`."""
    return FrechetInceptionDistance(feature=network)
