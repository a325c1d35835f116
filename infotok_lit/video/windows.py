"""Clips of any length and size as windows that a tokenizer can take, and back.

Time is cut into windows that overlap by some frames and are blended there. Space is cut into tiles where a frame is
larger than a tile. What does not divide evenly is padded. Frames are uint8 (..., T, H, W, 3).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from infotok_lit.video.tokenizer import VideoTokenizerConfig

TIME_STEP = 8
SPACE_STEP = 16
"""Windows are padded to a multiple of 8 and 1 frames, and to sides of multiples of 16; larger tokens need more."""
Steps = tuple[int, int]
STEPS: Steps = (TIME_STEP, SPACE_STEP)
TILE_OVERLAP = 16
"""Pixels over which neighbouring tiles are mixed, at least."""


def window_count(frames: int, size: int, overlap: int) -> int:
    """How many windows cover `frames` frames; the last one may be short."""
    return -(-max(0, frames - size) // (size - overlap)) + 1


def in_windows(frames: Iterable[np.ndarray], size: int, overlap: int) -> Iterator[Tensor]:
    """Windows (T, H, W, 3) of uint8 frames (H, W, 3), without knowing how many come; the last one may be short."""
    held: list[Tensor] = []
    emitted = False
    for frame in frames:
        held.append(torch.from_numpy(np.array(frame)))
        if len(held) == size:
            window = torch.stack(held)
            held, emitted = held[size - overlap :], True  # before it is used, so that memory holds it once
            yield window
    if len(held) > (overlap if emitted else 0):
        yield torch.stack(held)


def steps_for(tokenizer: VideoTokenizerConfig) -> Steps:
    """What the windows of a tokenizer are padded to multiples of; all of these are powers of two."""
    return max(TIME_STEP, tokenizer.temporal_compression), max(SPACE_STEP, tokenizer.spatial_compression)


def padded_shape(frames: int, height: int, width: int, steps: Steps = STEPS) -> tuple[int, int, int]:
    """What `frames` frames of so many pixels are padded to."""
    time, side = steps
    return frames + (1 - frames) % time, height + -height % side, width + -width % side


@dataclass(frozen=True)
class Padding:
    """How many frames, rows and columns were added before and after a clip."""

    time: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]

    @classmethod
    def of(cls, frames: int, height: int, width: int, steps: Steps = STEPS) -> "Padding":
        """Split evenly; what is left over goes to the end, the bottom and the right."""
        given = (frames, height, width)
        missing = (padded - size for padded, size in zip(padded_shape(*given, steps), given, strict=True))
        return cls(*((count // 2, count - count // 2) for count in missing))

    def pad(self, clip: Tensor) -> Tensor:
        """(..., T, H, W, 3) uint8 -> padded: black in space, repeated frames in time."""
        clip = F.pad(clip, (0, 0, *self.columns, *self.rows))
        before, after = self.time
        first, last = clip[..., :1, :, :, :], clip[..., -1:, :, :, :]
        return torch.cat([first] * before + [clip] + [last] * after, dim=-4)

    def crop(self, clip: Tensor) -> Tensor:
        """Undo `pad`."""
        frames, height, width = clip.shape[-4:-1]
        return clip[
            ...,
            self.time[0] : frames - self.time[1],
            self.rows[0] : height - self.rows[1],
            self.columns[0] : width - self.columns[1],
            :,
        ]


def to_pixels(clip: Tensor) -> Tensor:
    """uint8 (B, T, H, W, 3) -> float (B, 3, T, H, W) in [-1, 1]."""
    return (clip.float() / 127.5 - 1).movedim(-1, 1)


def to_frames(pixels: Tensor) -> Tensor:
    """float (B, 3, T, H, W) -> uint8 (B, T, H, W, 3), clamped and rounded."""
    unit = (pixels.float().clamp(-1, 1) + 1) / 2
    return (unit * 255 + 0.5).to(torch.uint8).movedim(1, -1)


def blend(earlier: Tensor, later: Tensor) -> Tensor:
    """Fade from one window to the next over the o frames (o, H, W, 3) that they share, both uint8 or float."""
    overlap = len(earlier)
    weight = torch.arange(overlap, 0, -1, device=earlier.device) / (overlap + 1)
    weight = weight[:, None, None, None]
    mixed = earlier.float() * weight + later.float() * (1 - weight)
    return (mixed + 0.5).clamp(0, 255).to(torch.uint8)


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles of `tile` pixels begin along a side: evenly spaced, overlapping by at least `overlap`."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def tile_weights(tile: int, overlap: int) -> Tensor:
    """(tile,) weights of a tile's pixels where tiles are mixed: a ramp over `overlap` pixels at either end."""
    from_start = torch.arange(1, tile + 1).float() / (overlap + 1)
    return torch.minimum(from_start, from_start.flip(0)).clamp(max=1)


class FrameCutter:
    """Cuts frames of one size into tiles of one size that a tokenizer takes, and joins them again."""

    def __init__(self, height: int, width: int, tile: int, steps: Steps = STEPS) -> None:
        self._size, self._steps = (height, width), steps
        self._tile = (min(height, tile), min(width, tile))
        rows, columns = (
            tile_starts(length, tile, TILE_OVERLAP) for length, tile in zip(self._size, self._tile, strict=True)
        )
        self._places = [(row, column) for row in rows for column in columns]

    def padded_shape(self, frames: int) -> tuple[int, int, int, int]:
        """(tiles, T', h, w): the tiles of a window of `frames` frames, once they are padded."""
        return (len(self._places), *padded_shape(frames, *self._tile, self._steps))

    def cut(self, clip: Tensor) -> Iterator[Tensor]:
        """uint8 (T, H, W, 3) -> padded tiles (1, T', h, w, 3)."""
        height, width = self._tile
        padding = Padding.of(len(clip), height, width, self._steps)
        for row, column in self._places:
            yield padding.pad(clip[None, :, row : row + height, column : column + width])

    def join(self, tiles: Iterable[Tensor], frames: int) -> Tensor:
        """The inverse of `cut`; where tiles overlap, they are mixed."""
        height, width = self._tile
        padding = Padding.of(frames, height, width, self._steps)
        if len(self._places) == 1:
            return padding.crop(next(iter(tiles)))[0]
        weight = torch.outer(tile_weights(height, TILE_OVERLAP), tile_weights(width, TILE_OVERLAP))[..., None]
        total = torch.zeros(frames, *self._size, 3)
        weights = torch.zeros(*self._size, 1)
        for (row, column), tile in zip(self._places, tiles, strict=True):
            place = (slice(row, row + height), slice(column, column + width))
            total[:, *place] += padding.crop(tile)[0].cpu() * weight
            weights[place] += weight
        # In place: a window of large frames is hundreds of megabytes, four times as many in float32.
        return total.div_(weights).add_(0.5).clamp_(0, 255).to(torch.uint8)
