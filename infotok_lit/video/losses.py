"""What reconstruction costs: error of pixels, and of the features of a VGG-16 (perceptual and Gram)."""

import bisect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infotok_lit.checkpoints import CheckpointError, read_weights
from infotok_lit.errors import SettingsError

Features = Callable[[Tensor], Sequence[Tensor]]
"""Frames (N, 3, H, W) -> five feature maps (N, C_k, H_k, W_k)."""

FEATURE_WEIGHTS = (1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""LPIPS's normalisation of pixels in [-1, 1]."""
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of the convolutions between poolings; the features are what the last of each group gives."""


@dataclass(frozen=True)
class Schedule:
    """A weight that changes in steps: value i holds while step < boundary i, the last one from then on.

    Args:
        values: the weights.
        boundaries: the steps at which the next one begins; one fewer than the values.
    """

    values: tuple[float, ...] = (0.0,)
    boundaries: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        object.__setattr__(self, "boundaries", tuple(self.boundaries))
        if len(self.values) != len(self.boundaries) + 1 or list(self.boundaries) != sorted(self.boundaries):
            raise SettingsError(
                f"a schedule of {len(self.values)} values needs {len(self.values) - 1} rising boundaries, "
                f"got {list(self.boundaries)}"
            )

    def at(self, step: int) -> float:
        """The weight at an optimiser step."""
        return self.values[bisect.bisect_right(self.boundaries, step)]

    @property
    def is_on(self) -> bool:
        """Whether the weight is ever above 0."""
        return any(self.values)


@dataclass(frozen=True)
class LossConfig:
    """Which losses are on. The released configuration has colour 1 and perceptual 0.1.

    Args:
        colour: weight of the mean absolute error of pixels.
        perceptual: weight of the error of VGG features; needs `vgg_weights`.
        gram: weight of the error of their Gram matrices over the clip; needs `vgg_weights`.
        vgg_weights: a file with torchvision's VGG-16 (`vgg16-397923af.pth`, or a .safetensors with its names).
    """

    colour: float = 1.0
    perceptual: Schedule = Schedule()
    gram: Schedule = Schedule()
    vgg_weights: str | None = None

    def __post_init__(self) -> None:
        if self.needs_features and self.vgg_weights is None:
            raise SettingsError(
                "losses.perceptual and losses.gram compare features of a VGG-16: set losses.vgg_weights to "
                "torchvision's file (vgg16-397923af.pth), or both weights to 0"
            )

    @property
    def needs_features(self) -> bool:
        """Whether any loss compares features."""
        return self.perceptual.is_on or self.gram.is_on


def reconstruction_losses(
    pixels: Tensor, reconstructed: Tensor, step: int, config: LossConfig, features: Features | None = None
) -> dict[str, Tensor]:
    """The weighted losses (scalars) by name; their sum is the total.

    Args:
        pixels: (B, 3, T, H, W) in [-1, 1].
        reconstructed: of the same shape.
        step: the optimiser step, which decides weights that change.
        features: what `config.needs_features` asks for.
    """
    losses = {"colour": config.colour * (pixels - reconstructed).abs().mean()}
    if features is None:
        return losses
    perceptual, gram = config.perceptual.at(step), config.gram.at(step)
    if not perceptual and not gram:
        return losses
    with torch.no_grad():
        wanted = features(_frames(pixels))
    found = features(_frames(reconstructed))
    batch = pixels.shape[0]
    if perceptual:
        losses["perceptual"] = perceptual * _weighted((a - b).abs().mean() for a, b in zip(wanted, found, strict=True))
    if gram:
        pairs = ((_gram(a, batch), _gram(b, batch)) for a, b in zip(wanted, found, strict=True))
        losses["gram"] = gram * _weighted((a - b).square().mean() for a, b in pairs)
    return losses


def _frames(pixels: Tensor) -> Tensor:
    """(B, 3, T, H, W) -> (B T, 3, H, W), normalised."""
    shift, scale = (pixels.new_tensor(values)[:, None, None] for values in (SHIFT, SCALE))
    return (pixels.transpose(1, 2).flatten(0, 1) - shift) / scale


def _weighted(terms: Sequence[Tensor]) -> Tensor:
    return sum(weight * term for weight, term in zip(FEATURE_WEIGHTS, terms, strict=True))


def _gram(features: Tensor, batch: int) -> Tensor:
    """(B T, C, H, W) -> (B, C, C): products of channels, averaged over the clip."""
    flat = features.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)
    return flat @ flat.transpose(1, 2) / flat.shape[-1]


def psnr(wanted: Tensor, found: Tensor) -> Tensor:
    """The peak signal-to-noise ratio (N,) in dB of frames or clips (N, ...) in [0, 255]; 100 where they are equal."""
    error = (wanted.float() - found.float()).square().flatten(1).mean(1)
    return (10 * torch.log10(255**2 / error)).clamp(max=100)


class Vgg16Features(nn.Module):
    """The convolutional part of VGG-16, frozen: (N, 3, H, W) -> features after relu1_2, 2_2, 3_3, 4_3 and 5_3."""

    def __init__(self, groups: Sequence[Sequence[int]] = VGG16) -> None:
        """
        Args:
            groups: widths of the convolutions between poolings.
        """
        super().__init__()
        self.groups = nn.ModuleList()
        channels = 3
        for widths in groups:
            group = nn.ModuleList()
            for width in widths:
                group.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
                channels = width
            self.groups.append(group)
        self.requires_grad_(False)

    def forward(self, frames: Tensor) -> list[Tensor]:
        found = []
        for i, group in enumerate(self.groups):
            frames = F.max_pool2d(frames, 2) if i else frames
            for convolution in group:
                frames = F.relu(convolution(frames))
            found.append(frames)
        return found

    @classmethod
    def from_file(cls, path: Path) -> "Vgg16Features":
        """Read torchvision's file; CheckpointError if it is not a VGG-16's."""
        state = read_weights(path)
        network = cls()
        convolutions = [convolution for group in network.groups for convolution in group]
        names = sorted({int(place) for name in state for place in re.findall(r"^features\.(\d+)\.", name)})
        if len(names) != len(convolutions):
            raise CheckpointError(f"{path} is not torchvision's VGG-16 (without batch norm): fetch vgg16-397923af.pth")
        try:
            for name, convolution in zip(names, convolutions, strict=True):
                convolution.load_state_dict({part: state[f"features.{name}.{part}"] for part in ("weight", "bias")})
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path} is not torchvision's VGG-16: {str(error).splitlines()[0]}") from error
        return network
