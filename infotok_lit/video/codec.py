"""Videos of any length and size <-> .itk streams, with memory for one window at a time.

Each window is encoded once. What the router needs from the whole video, the mean error, is known only at the end; so
the tokens and scores of the windows wait in a temporary file, 8 bytes a token, and are then masked and written.
"""

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from infotok_lit.budgets import budget_rate, keep_top, kept_count
from infotok_lit.errors import DataError, SettingsError
from infotok_lit.video.bitstream import (
    MODEL_BYTES,
    Header,
    Record,
    pack_indices,
    read_header,
    read_records,
    unpack_indices,
)
from infotok_lit.video.mask_coder import MaskDecoder, MaskEncoder
from infotok_lit.video.tokenizer import VideoTokenizer
from infotok_lit.video.windows import (
    SPACE_STEP,
    TILE_OVERLAP,
    FrameCutter,
    blend,
    in_windows,
    steps_for,
    to_frames,
    to_pixels,
    window_count,
)

Rule = Literal["global", "training", "window"]
Progress = Callable[[int], None]
"""Told how many frames are done."""


@dataclass(frozen=True)
class CodecConfig:
    """How a video is cut, and how its budget is shared out.

    Args:
        rate: the mean share of tokens to keep, in [1/16, 1].
        rule: `global` gives a window more the harder it is, compared with the mean of the video (the paper's rule at
            inference); `training` compares it with the clips that the tokenizer was trained on, so that an easy video
            costs less as a whole; `window` gives each the same.
        rate_steps: round the windows' rates to multiples of 1 / rate_steps.
        window: frames per window; None for 33, or what the tokenizer takes if that is less.
        overlap: frames over which windows are blended.
        tile: frames with a longer side are cut into tiles of this many pixels, a multiple of 16.
    """

    rate: float = 0.5
    rule: Rule = "global"
    rate_steps: int | None = None
    window: int | None = None
    overlap: int = 1
    tile: int = 256

    def __post_init__(self) -> None:
        if not 1 / 16 <= self.rate <= 1:
            raise SettingsError(f"the rate must be between 1/16 and 1, got {self.rate}")
        if self.tile % SPACE_STEP or not TILE_OVERLAP < self.tile < 1 << 16:
            raise SettingsError(
                f"tiles must be a multiple of {SPACE_STEP}, above {TILE_OVERLAP} and below 65536, got {self.tile}"
            )
        if self.overlap < 0:
            raise SettingsError(f"the overlap is a number of frames, 0 or more, got {self.overlap}")

    def window_for(self, tokenizer: VideoTokenizer) -> int:
        """Frames per window; SettingsError if the tokenizer takes fewer."""
        step, _ = steps_for(tokenizer.config)  # a window is padded to step k + 1 frames
        longest = (tokenizer.config.max_frames - 1) // step * step + 1
        window = min(33, longest) if self.window is None else self.window
        if not self.overlap < window <= longest:
            raise SettingsError(
                f"windows of {window} frames: this tokenizer takes at most {longest}, and they must be "
                f"longer than the overlap of {self.overlap}"
            )
        return window


@dataclass(frozen=True)
class CompressionReport:
    """What a stream costs."""

    frames: int
    pixels: int
    """Of all frames."""
    file_bits: int
    mask_bits: int
    kept: int
    tokens: int
    tokens_per_pixel: float
    """As the paper counts: without the first frame's own latent frame, padding or overlap."""
    code_bits: int
    rates: list[float]
    """Of each window, as the router asked."""

    @property
    def bpp16(self) -> float:
        """Bits of the file per 16 pixels of the video."""
        return 16 * self.file_bits / self.pixels

    @property
    def paper_bpp16(self) -> float:
        """Bits per 16 pixels as the paper counts them: kept indices, and one bit per token for the mask."""
        return 16 * self.tokens_per_pixel * (self.code_bits * self.kept / self.tokens + 1)


class EncodedWindow(NamedTuple):
    """A window before its budget is known."""

    indices: Tensor
    """(tiles, t, h, w) int32."""
    token_map: Tensor
    """(tiles, t, h, w) float32."""


@torch.no_grad()
def encode_window(tokenizer: VideoTokenizer, clip: Tensor, cutter: FrameCutter) -> EncodedWindow:
    """All tokens of uint8 frames (T, H, W, 3), and the router's scores."""
    device = tokenizer.device
    found = []
    for tile in cutter.cut(clip):
        pixels = to_pixels(tile.to(device))
        encoded = tokenizer.encode(pixels)
        found.append((encoded.indices.cpu(), tokenizer.token_map(pixels, encoded.codes).cpu()))
    return EncodedWindow(*(torch.cat(parts) for parts in zip(*found, strict=True)))


@torch.no_grad()
def decode_window(tokenizer: VideoTokenizer, indices: Tensor, mask: Tensor, frames: int, cutter: FrameCutter) -> Tensor:
    """uint8 frames (T, H, W, 3) from the kept tokens; indices and mask are (tiles, t, h, w)."""
    device = tokenizer.device

    def decoded() -> Iterator[Tensor]:
        for tile, kept in zip(indices.to(device), mask.to(device), strict=True):
            yield to_frames(tokenizer.decode(tokenizer.codes_of(tile[None]) * kept[None, None])).cpu()

    return cutter.join(decoded(), frames)


def keep_by_score(token_map: Tensor, rate: Tensor) -> Tensor:
    """The mask of a window whose tokens compete with each other, over all its tiles; `rate` is a scalar."""
    scores = token_map.reshape(1, -1)
    return keep_top(scores, kept_count(rate[None], scores.shape[1])).view_as(token_map)


def window_rates(errors: Tensor, config: CodecConfig, tokenizer: VideoTokenizer) -> Tensor:
    """The rate of each window, from the mean errors (n,) of all of them; SettingsError where the rule has no mean."""
    if config.rule == "window":
        return torch.full_like(errors, config.rate)
    average = errors.mean() if config.rule == "global" else tokenizer.complexity.mean.cpu()[0]
    if config.rule == "training" and not average:
        raise SettingsError("this tokenizer does not know the mean error of its training clips: use the rule `global`")
    return budget_rate(errors, average.clamp(min=1e-12), config.rate, config.rate_steps)


def code_bits(tokenizer: VideoTokenizer) -> int:
    """Bits per token: those of the highest index."""
    return (tokenizer.config.num_codes - 1).bit_length()


def fingerprint(tokenizer: VideoTokenizer) -> bytes:
    """The first bytes of a SHA-256 of the weights that decoding needs: another tokenizer would decode noise."""
    digest = hashlib.sha256(repr(tokenizer.config).encode())
    for name, tensor in tokenizer.state_dict().items():
        if not name.startswith(("encoder.", "quant_conv.", "compressor.", "complexity.")):
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.digest()[:MODEL_BYTES]


class WindowSpool:
    """Encoded windows that wait in a temporary file until the budget of each is known."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._grids: list[tuple[int, ...]] = []
        self._errors: list[Tensor] = []

    def add(self, window: EncodedWindow) -> None:
        """Append a window."""
        self._grids.append(tuple(window.indices.shape))
        self._errors.append(window.token_map.mean())
        self._file.write(window.indices.numpy().astype("<i4").tobytes())
        self._file.write(window.token_map.numpy().astype("<f4").tobytes())

    @property
    def errors(self) -> Tensor:
        """The mean error (n,) of each window."""
        return torch.stack(self._errors)

    def __iter__(self) -> Iterator[EncodedWindow]:
        self._file.seek(0)
        for grid in self._grids:
            size = 4 * math.prod(grid)
            parts = (
                np.frombuffer(bytearray(self._file.read(size)), dtype=kind).reshape(grid) for kind in ("<i4", "<f4")
            )
            yield EncodedWindow(*map(torch.from_numpy, parts))


def compress(
    tokenizer: VideoTokenizer,
    frames: Iterable[np.ndarray],
    frame_rate: Fraction,
    out: BinaryIO,
    config: CodecConfig = CodecConfig(),
    progress: Progress = lambda done: None,
) -> CompressionReport:
    """Write a video as an .itk stream.

    Args:
        frames: uint8 (H, W, 3) RGB, read once; all of one size.
        frame_rate: frames per second.
        out: a binary file to write to.

    Raises:
        DataError: for a video without frames, or one that is too large, which is seen before a window of it is held.
    """
    cut, model = (config.window_for(tokenizer), config.overlap, config.tile), fingerprint(tokenizer)
    header: Header | None = None

    def counted() -> Iterator[np.ndarray]:
        nonlocal header
        for number, frame in enumerate(frames, start=1):
            height, width = frame.shape[:2]
            header = Header(model, width, height, number, frame_rate, *cut)
            yield frame

    with tempfile.TemporaryFile() as file:
        spool, cutter = WindowSpool(file), None
        for clip in in_windows(counted(), *cut[:2]):
            cutter = cutter or FrameCutter(header.height, header.width, config.tile, steps_for(tokenizer.config))
            spool.add(encode_window(tokenizer, clip, cutter))
            progress(header.frames)
        if header is None:
            raise DataError("the video has no frames")
        rates = window_rates(spool.errors, config, tokenizer)
        return _write_stream(out, header, spool, rates, tokenizer)


def _write_stream(
    out: BinaryIO, header: Header, spool: WindowSpool, rates: Tensor, tokenizer: VideoTokenizer
) -> CompressionReport:
    """Choose the tokens of each window, and write them."""
    shape = tokenizer.config
    bits = code_bits(tokenizer)
    encoder = MaskEncoder()
    file_bytes = out.write(header.to_bytes())
    mask_bytes = kept_tokens = tokens = 0
    for window, rate in zip(spool, rates, strict=True):
        mask = keep_by_score(window.token_map, rate)
        kept = window.indices[mask].numpy()
        record = Record(encoder.encode(mask.numpy()), len(kept), pack_indices(kept, bits))
        file_bytes += out.write(record.to_bytes())
        mask_bytes += len(record.mask_code)
        kept_tokens += len(kept)
        tokens += mask.numel()
    return CompressionReport(
        frames=header.frames,
        pixels=header.frames * header.height * header.width,
        file_bits=8 * file_bytes,
        mask_bits=8 * mask_bytes,
        kept=kept_tokens,
        tokens=tokens,
        tokens_per_pixel=1 / (shape.temporal_compression * shape.spatial_compression**2),
        code_bits=bits,
        rates=rates.tolist(),
    )


def read_stream(tokenizer: VideoTokenizer, file: BinaryIO, name: str) -> "CompressedVideo":
    """A stream, ready to be decoded once every checksum has been checked.

    Raises:
        DataError: if it is no stream, was written with another tokenizer, or is cut off or damaged.
    """
    header = read_header(file, name)
    if header.model != fingerprint(tokenizer):
        raise DataError(f"{name} was compressed with another tokenizer than this: name that one with --model")
    video = CompressedVideo(tokenizer, file, name, header)
    video.check()
    return video


class CompressedVideo:
    """A stream whose frames can be decoded one after another."""

    def __init__(self, tokenizer: VideoTokenizer, file: BinaryIO, name: str, header: Header) -> None:
        self.header = header
        self._tokenizer, self._file, self._name = tokenizer, file, name
        self._start = file.tell()
        self._cutter = FrameCutter(header.height, header.width, header.tile, steps_for(tokenizer.config))
        self._bits = code_bits(tokenizer)
        self._windows = window_count(header.frames, header.window, header.overlap)

    def check(self) -> None:
        """Read all of it; DataError if it is cut off or damaged."""
        for _ in self._records():
            pass

    def _lengths(self) -> Iterator[int]:
        """How many frames each window has."""
        step = self.header.window - self.header.overlap
        return (min(self.header.window, self.header.frames - number * step) for number in range(self._windows))

    def _records(self) -> Iterator[Record]:
        self._file.seek(self._start)
        tokens = (math.prod(self._grid(length)) for length in self._lengths())
        return read_records(self._file, self._windows, tokens, self._bits, self._name)

    def frames(self) -> Iterator[np.ndarray]:
        """The frames, uint8 (H, W, 3), blended where windows overlap."""
        overlap, step = self.header.overlap, self.header.window - self.header.overlap
        decoder, tail = MaskDecoder(), None
        for number, (record, length) in enumerate(zip(self._records(), self._lengths(), strict=True)):
            clip = self._decode(record, decoder, length)
            if tail is not None and overlap:
                clip[:overlap] = blend(tail, clip[:overlap])
            last = number == self._windows - 1
            tail = None if last else clip[step:]
            yield from (clip if last else clip[:step]).numpy()

    def _decode(self, record: Record, decoder: MaskDecoder, length: int) -> Tensor:
        grid = self._grid(length)
        mask = decoder.decode(record.mask_code, grid)
        kept = unpack_indices(record.index_code, record.kept, self._bits)
        if mask.sum() != record.kept or (kept >= self._tokenizer.config.num_codes).any():
            raise DataError(f"{self._name} holds tokens that no tokenizer made: the file is damaged")
        indices = torch.zeros(grid, dtype=torch.int32)
        indices[torch.from_numpy(mask)] = torch.from_numpy(kept.astype(np.int32))
        return decode_window(self._tokenizer, indices, torch.from_numpy(mask), length, self._cutter)

    def _grid(self, length: int) -> tuple[int, int, int, int]:
        """The tokens (tiles, t, h, w) of a window of `length` frames."""
        tiles, *padded = self._cutter.padded_shape(length)
        return (tiles, *self._tokenizer.config.token_grid(*padded))
