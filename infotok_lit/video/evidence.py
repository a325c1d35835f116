"""Is it worth it? What a trained tokenizer gains by choosing, measured on Moving Scenes, whose difficulty is known.

All comparisons spend the same mean number of tokens. One tokenizer is measured under every rule; rules that it was not
trained for (`first`, `jump`) are at a disadvantage here, so `configs/video_tokenizer/masks.yaml` trains each with its
own.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from infotok_lit.budgets import MIN_RATE, rates_with_mean
from infotok_lit.errors import SettingsError
from infotok_lit.video.losses import psnr
from infotok_lit.video.moving_scenes import MovingScenes
from infotok_lit.video.tokenizer import MaskKind, VideoTokenizer, keep_clipwide
from infotok_lit.video.windows import to_frames, to_pixels

GRID = 16
"""Rates of the exhaustive search are multiples of 1 / 16."""
RIDGE = 1e-2

Show = Callable[[float, str], None]


@dataclass(frozen=True)
class EvidenceOptions:
    """What is measured.

    Args:
        clips: Clips that are measured, 2 or more; as many others teach the router that reads only the latent.
        frames: Frames per clip.
        side: Height and width in pixels.
        rates: Mean rates, in [1/16, 1].
        seed: Of the uniform rates and the random mask.
    """

    clips: int = 64
    frames: int = 9
    side: int = 32
    rates: tuple[float, ...] = (0.5, 0.25)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.clips < 2:
            raise SettingsError(f"clips is {self.clips}: ranks need 2 or more")
        if not all(MIN_RATE <= rate <= 1 for rate in self.rates):
            raise SettingsError(f"rates must be between 1/16 and 1, got {list(self.rates)}")


@dataclass(frozen=True)
class _Measured:
    """Clips with what the tokenizer makes of them, all on the CPU."""

    clips: Tensor
    """uint8 (B, T, H, W, 3)."""
    codes: Tensor
    latent: Tensor
    token_map: Tensor

    @property
    def errors(self) -> Tensor:
        """(B,)."""
        return self.token_map.flatten(1).mean(1)


@torch.no_grad()
def measure(
    tokenizer: VideoTokenizer, options: EvidenceOptions, show: Show = lambda done, what: None
) -> dict[str, Any]:
    """Everything, as plain data.

    Returns:
        "policies": {rate: {name: PSNR in dB}}, "complexity": rank correlations of the clip's error with what is true of
        it, "search": {rate: dB that an exhaustive search over rates gains}, "latent_router", and "seconds" per clip.
    """
    scenes = MovingScenes("val", num_clips=2 * options.clips, side=options.side)
    show(0.0, "encoding")
    truths = [scenes.draw(index, options.frames)[0] for index in range(options.clips)]
    measured = _encode(tokenizer, scenes, range(options.clips), options.frames)
    others = _encode(tokenizer, scenes, range(options.clips, 2 * options.clips), options.frames)
    errors = measured.errors.numpy()
    known = {
        "objects": [len(truth.shapes) for truth in truths],
        "motion": [truth.motion for truth in truths],
        "moving objects and background": [truth.motion + float(np.abs(truth.drift).sum()) for truth in truths],
    }
    show(0.2, "comparing masks and budgets")
    torch.manual_seed(options.seed)
    predicted = _predict_map(others, measured)
    quality = _quality_by_rate(tokenizer, measured, lambda rates: show(0.3 + 0.5 * rates, "searching"))
    return {
        "policies": {f"{rate:g}": _policies(tokenizer, measured, rate) for rate in options.rates},
        "complexity": {name: float(stats.spearmanr(errors, values).statistic) for name, values in known.items()},
        "search": {f"{rate:g}": _search_gain(measured.errors, quality, rate) for rate in options.rates},
        "latent_router": {
            "rank_correlation": float(stats.spearmanr(errors, predicted.flatten(1).mean(1)).statistic),
            "lost_db": {f"{rate:g}": _lost(tokenizer, measured, predicted, rate) for rate in options.rates},
        },
        "seconds": _latency(tokenizer, measured.clips[:1]),
    }


def _encode(tokenizer: VideoTokenizer, scenes: MovingScenes, indices: range, frames: int) -> _Measured:
    device = tokenizer.device
    parts = []
    for index in indices:
        clip = torch.from_numpy(scenes.draw(index, frames)[1])[None]
        pixels = to_pixels(clip.to(device))
        encoded = tokenizer.encode(pixels)
        found = (encoded.codes, encoded.compressed, tokenizer.token_map(pixels, encoded.codes))
        parts.append((clip, *(tensor.cpu() for tensor in found)))
    return _Measured(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _psnr(tokenizer: VideoTokenizer, measured: _Measured, mask: Tensor) -> Tensor:
    """(B,) in dB, of uint8 frames."""
    device = tokenizer.device
    found = []
    for clip, codes, kept in zip(measured.clips, measured.codes, mask, strict=True):
        frames = to_frames(tokenizer.decode((codes * kept)[None].to(device))).cpu()
        found.append(psnr(clip[None], frames))
    return torch.cat(found)


def _policies(tokenizer: VideoTokenizer, measured: _Measured, rate: float) -> dict[str, float]:
    """PSNR of each way to spend a mean rate."""
    errors = measured.errors
    adaptive, same = rates_with_mean(errors, rate), torch.full_like(errors, rate)
    uniform = rates_with_mean(torch.rand_like(errors) + MIN_RATE, rate)

    def quality(rates: Tensor, kind: MaskKind = "map", token_map: Tensor = measured.token_map) -> float:
        return float(_psnr(tokenizer, measured, keep_clipwide(token_map, rates, kind)).mean())

    return {
        "adaptive": quality(adaptive),
        "static": quality(same),
        "uniform": quality(uniform),
        "random mask": quality(same, "random"),
        "R2L": quality(same, "first"),
        "Jump": quality(same, "jump"),
        "map reversed": quality(same, "map", -measured.token_map),
    }


def _quality_by_rate(tokenizer: VideoTokenizer, measured: _Measured, show: Callable[[float], None]) -> np.ndarray:
    """(B, GRID): the PSNR of each clip at the rates 1/16, 2/16, ... 1."""
    columns = []
    for step in range(1, GRID + 1):
        rates = torch.full_like(measured.errors, step / GRID)
        columns.append(_psnr(tokenizer, measured, keep_clipwide(measured.token_map, rates)))
        show(step / GRID)
    return torch.stack(columns, dim=1).numpy()


def _search_gain(errors: Tensor, quality: np.ndarray, rate: float) -> float:
    """What the best rates of all would gain on the router's, in dB, on the same grid and at no more tokens."""
    steps = (rates_with_mean(errors, rate) * GRID).round().clamp(1, GRID).long().numpy()
    routed = quality[np.arange(len(steps)), steps - 1].mean()
    return float(best_allocation(quality, int(steps.sum())) - routed)


def best_allocation(quality: np.ndarray, budget: int) -> float:
    """The highest mean of quality (B, G) when clip i takes 1 to G units and all together at most `budget`."""
    clips, grid = quality.shape
    best = np.full(budget + 1, -np.inf)
    best[0] = 0.0
    for row in quality:
        longer = np.full(budget + 1, -np.inf)
        for units in range(1, min(grid, budget) + 1):
            longer[units:] = np.maximum(longer[units:], best[:-units] + row[units - 1])
        best = longer
    return float(best.max() / clips)


def _predict_map(teachers: _Measured, measured: _Measured) -> Tensor:
    """The token map (B, t, h, w) that a ridge regression reads off the latent alone, without a decoder pass."""

    def inputs(latent: Tensor) -> Tensor:
        flat = latent.double().movedim(1, -1).flatten(0, 3)
        return torch.cat((flat, flat.square(), torch.ones(len(flat), 1, dtype=torch.float64)), dim=1)

    known, wanted = inputs(teachers.latent), teachers.token_map.double().flatten().clamp(min=1e-6).log()
    gram = known.T @ known / len(known) + RIDGE * torch.eye(known.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, known.T @ wanted / len(known))
    return (inputs(measured.latent) @ weights).exp().float().view_as(measured.token_map)


def _lost(tokenizer: VideoTokenizer, measured: _Measured, predicted: Tensor, rate: float) -> float:
    """dB that rates and masks from predicted maps lose against those from decoded ones."""

    def quality(token_map: Tensor) -> float:
        rates = rates_with_mean(token_map.flatten(1).mean(1), rate)
        return float(_psnr(tokenizer, measured, keep_clipwide(token_map, rates)).mean())

    return quality(measured.token_map) - quality(predicted)


def _latency(tokenizer: VideoTokenizer, clip: Tensor, repeats: int = 3) -> dict[str, float]:
    """Seconds per clip of the two halves, and of what the router adds; the best of some tries."""
    pixels = to_pixels(clip.to(tokenizer.device))
    codes = tokenizer.encode(pixels).codes
    calls: Mapping[str, Callable[[], Any]] = {
        "encode": lambda: tokenizer.encode(pixels),
        "router": lambda: tokenizer.token_map(pixels, codes),
        "decode": lambda: tokenizer.decode(codes),
    }
    return {name: min(_seconds(call) for _ in range(repeats)) for name, call in calls.items()}


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin
