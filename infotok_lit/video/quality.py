"""Rate and distortion of real streams: what videos look like after `compress` and `decompress`, against their bits."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from infotok_lit.checkpoints import CheckpointError, read_weights
from infotok_lit.video.codec import CodecConfig, compress, read_stream
from infotok_lit.video.fvd import CLIP_FRAMES
from infotok_lit.video.losses import SCALE, SHIFT, VGG16, Vgg16Features, psnr
from infotok_lit.video.tokenizer import VideoTokenizer
from infotok_lit.video.video_file import OpenVideo

SSIM_SIDE, LPIPS_SIDE = 11, 16
"""The fewest pixels on a side: of the Gaussian window of SSIM, and what VGG-16 can halve four times."""


@dataclass(frozen=True)
class Quality:
    """One video at one rate; means over its frames."""

    video: str
    rate: float
    frames: int
    kept: float
    """Share of the tokens."""
    bpp16: float
    """Bits of the file per 16 pixels."""
    paper_bpp16: float
    """As the paper counts them."""
    psnr: float
    """dB, of uint8 frames."""
    ssim: float | None
    """None for frames of fewer than 11 pixels on a side."""
    lpips: float | None
    """None without weights, and for frames of fewer than 16 pixels on a side."""
    fvd: float | None = None
    """The Frechet distance of the clips of all videos at this rate; None for a single one, and without weights."""


class Lpips(nn.Module):
    """LPIPS with VGG-16 (Zhang et al., 2018): weighted distances of unit-length features."""

    def __init__(self, features: Vgg16Features, weights: Sequence[Tensor]) -> None:
        """
        Args:
            weights: per feature map (C,), not negative.
        """
        super().__init__()
        self.features = features
        self.weights = nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in weights)

    def forward(self, wanted: Tensor, found: Tensor) -> Tensor:
        """Distances (N,) of frames (N, 3, H, W) in [-1, 1]."""
        shift, scale = (wanted.new_tensor(values)[:, None, None] for values in (SHIFT, SCALE))
        pairs = zip(self.features((wanted - shift) / scale), self.features((found - shift) / scale), strict=True)
        total = wanted.new_zeros(len(wanted))
        for weight, (a, b) in zip(self.weights, pairs, strict=True):
            a, b = (part / (part.square().sum(1, keepdim=True).sqrt() + 1e-10) for part in (a, b))
            total = total + ((a - b).square() * weight[:, None, None]).sum(1).mean((1, 2))
        return total

    @classmethod
    def from_files(cls, vgg_weights: Path, lpips_weights: Path) -> "Lpips":
        """torchvision's VGG-16 and the lpips package's `weights/v0.1/vgg.pth`; CheckpointError if they are not."""
        state = read_weights(lpips_weights)
        wanted = {f"lin{i}.model.1.weight": group[-1] for i, group in enumerate(VGG16)}
        if {name: weight.numel() for name, weight in state.items()} != wanted:
            sizes = ", ".join(f"{name} ({size})" for name, size in wanted.items())
            raise CheckpointError(f"{lpips_weights} is not LPIPS's vgg.pth, which holds {sizes}")
        return cls(Vgg16Features.from_file(vgg_weights), [state[name].flatten() for name in wanted])


@torch.no_grad()
def measure_quality(
    tokenizer: VideoTokenizer,
    name: str,
    open_video: Callable[[], OpenVideo],
    config: CodecConfig,
    lpips: Lpips | None = None,
    distance: FrechetInceptionDistance | None = None,
) -> Quality:
    """Compress a video, decode the stream, and compare; memory holds a window at a time.

    Args:
        open_video: opens the video; called twice.
        lpips: on the tokenizer's device, where all but PSNR is measured; `distance` likewise.
        distance: takes the video's clips of `CLIP_FRAMES`, as they were and as decoded; a shorter rest is left out.
    """
    with tempfile.TemporaryFile() as file:
        opened = open_video()
        report = compress(tokenizer, opened.frames, opened.frame_rate, file, config)
        file.seek(0)
        decoded = read_stream(tokenizer, file, name).frames()
        decibels, ssim, perceptual = [], [], []
        for wanted, found in zip(_batches(open_video().frames), _batches(decoded), strict=True):
            decibels += psnr(wanted, found).tolist()
            wanted, found = wanted.to(tokenizer.device), found.to(tokenizer.device)
            if min(wanted.shape[2:]) >= SSIM_SIDE:
                similar = structural_similarity_index_measure(found, wanted, data_range=255.0, reduction="none")
                ssim += similar.flatten().tolist()
            if lpips is not None and min(wanted.shape[2:]) >= LPIPS_SIDE:
                perceptual += lpips(wanted / 127.5 - 1, found / 127.5 - 1).tolist()
            if distance is not None and len(wanted) == CLIP_FRAMES:
                distance.update(wanted[None], real=True)
                distance.update(found[None], real=False)
    return Quality(
        video=name,
        rate=config.rate,
        frames=report.frames,
        kept=report.kept / report.tokens,
        bpp16=report.bpp16,
        paper_bpp16=report.paper_bpp16,
        psnr=fmean(decibels),
        ssim=fmean(ssim) if ssim else None,
        lpips=fmean(perceptual) if perceptual else None,
    )


def _batches(frames: Iterable[np.ndarray]) -> Iterator[Tensor]:
    """uint8 (H, W, 3) -> float (N, 3, H, W) in [0, 255]."""
    remaining = iter(frames)
    while batch := list(islice(remaining, CLIP_FRAMES)):
        yield torch.from_numpy(np.stack(batch)).movedim(-1, 1).float()


def means_by_rate(
    rows: Sequence[Quality], distances: Mapping[float, FrechetInceptionDistance] | None = None
) -> list[Quality]:
    """The mean over videos at each rate, and the distance of their clips, which needs two clips."""
    means = []
    for rate in sorted({row.rate for row in rows}):
        same = [row for row in rows if row.rate == rate]

        def mean(field: str, same: list[Quality] = same) -> float | None:
            values = [getattr(row, field) for row in same if getattr(row, field) is not None]
            return fmean(values) if values else None

        counted = ("kept", "bpp16", "paper_bpp16", "psnr", "ssim", "lpips")
        frames = sum(row.frames for row in same)
        distance = (distances or {}).get(rate)
        fvd = None if distance is None or distance.real_features_num_samples < 2 else distance.compute().item()
        means.append(
            Quality(f"mean of {len(same)}", rate, frames, **{field: mean(field) for field in counted}, fvd=fvd)
        )
    return means


def plot_quality(means: Sequence[Quality], file: BinaryIO) -> None:
    """Quality against bits per 16 pixels, those of the file and those that the paper counts, as a PNG."""
    from matplotlib.figure import Figure

    measures = [("psnr", "PSNR (dB)"), ("ssim", "SSIM"), ("lpips", "LPIPS"), ("fvd", "FVD")]
    shown = [(name, label) for name, label in measures if all(getattr(row, name) is not None for row in means)]
    figure = Figure(figsize=(4.2 * len(shown), 3.6), layout="constrained")
    for axes, (name, label) in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        for field, words in (("bpp16", "the file's bits"), ("paper_bpp16", "as the paper counts")):
            axes.plot([getattr(row, field) for row in means], [getattr(row, name) for row in means], "o-", label=words)
        axes.set(xlabel="bits per 16 pixels", ylabel=label)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120, format="png")
