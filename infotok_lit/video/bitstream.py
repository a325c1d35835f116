"""The .itk file: a compressed video as the bits that are claimed for it.

All integers are little-endian.

    header   "\\x89ITK", version (1 byte), model (8 bytes), width, height (4 each), frames (8), frame rate as numerator
             and denominator (4 each), window, overlap, tile (2 each), CRC-32 of all that (4)
    window   bytes of the mask's code (4), kept tokens (4), the code, the indices of the kept tokens in raster order
             with ceil(log2(codes)) bits each, zeros up to a whole byte, CRC-32 of all that (4)
    ...      one record per window; nothing follows the last one

The number of windows follows from frames, window and overlap. The file is read with bounded memory, and a reader learns
from the checksums that a file is whole before it decodes any of it.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import BinaryIO, NamedTuple

import numpy as np

from infotok_lit.errors import DataError
from infotok_lit.video.windows import SPACE_STEP, TILE_OVERLAP, padded_shape

MAGIC = b"\x89ITK"
VERSION = 1
MODEL_BYTES = 8
_HEADER = struct.Struct(f"<4sB{MODEL_BYTES}sIIQIIHHH")
_RECORD = struct.Struct("<II")
_CHECKSUM = struct.Struct("<I")
MAX_SIDE = 1 << 16
MAX_WINDOW_PIXELS = 1 << 29
MAX_TILE_PIXELS = 1 << 26
"""The most pixels that the frames of a window, and those of a padded tile, may have: what bounds the memory that a file
can ask for. A tile passes the network at once, which holds hundreds of bytes for each of its pixels."""


@dataclass(frozen=True)
class Header:
    """What a stream says of its video, and of how it was cut."""

    model: bytes
    """The first bytes of the fingerprint of the tokenizer."""
    width: int
    height: int
    frames: int
    frame_rate: Fraction
    window: int
    overlap: int
    tile: int

    def __post_init__(self) -> None:
        sizes_fit = 0 < self.width <= MAX_SIDE and 0 < self.height <= MAX_SIDE and 0 < self.frames < 1 << 63
        cut_fits = 0 <= self.overlap < self.window < 1 << 16 and TILE_OVERLAP < self.tile < 1 << 16
        if not (sizes_fit and cut_fits and self.tile % SPACE_STEP == 0 and self.frame_rate > 0):
            raise DataError(
                f"a video of {self.frames} frames of {self.width} x {self.height} pixels at {self.frame_rate} frames a "
                f"second, in windows of {self.window} that overlap by {self.overlap} and tiles of {self.tile} pixels, "
                "is not one that can be compressed"
            )
        length = min(self.window, self.frames)
        if self.width * self.height * length > MAX_WINDOW_PIXELS:
            raise DataError(
                f"a window of {length} frames of {self.width} x {self.height} pixels has more than "
                f"{MAX_WINDOW_PIXELS} pixels: use smaller windows, or scale the video down"
            )
        if prod(padded_shape(length, min(self.height, self.tile), min(self.width, self.tile))) > MAX_TILE_PIXELS:
            raise DataError(
                f"a tile of {self.tile} pixels, {length} frames long, has more than {MAX_TILE_PIXELS} pixels: use "
                "smaller tiles, or smaller windows"
            )

    def to_bytes(self) -> bytes:
        """The header as it is written."""
        rate = self.frame_rate.limit_denominator((1 << 32) - 1)
        cut = (self.window, self.overlap, self.tile)
        sizes = (self.width, self.height, self.frames, rate.numerator, rate.denominator)
        return _with_checksum(_HEADER.pack(MAGIC, VERSION, self.model, *sizes, *cut))


class Record(NamedTuple):
    """One window of a stream, as bytes."""

    mask_code: bytes
    kept: int
    index_code: bytes

    def to_bytes(self) -> bytes:
        """The record as it is written."""
        return _with_checksum(_RECORD.pack(len(self.mask_code), self.kept) + self.mask_code + self.index_code)


def pack_indices(indices: np.ndarray, bits: int) -> bytes:
    """Indices (n,) below 2^bits, with `bits` bits each, the highest first."""
    places = np.arange(bits - 1, -1, -1)
    return np.packbits((indices[:, None].astype(np.int64) >> places & 1).astype(np.uint8)).tobytes()


def unpack_indices(code: bytes, count: int, bits: int) -> np.ndarray:
    """The inverse: (count,) int64."""
    flags = np.unpackbits(np.frombuffer(code, dtype=np.uint8), count=count * bits).reshape(count, bits)
    return flags.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1))


def index_bytes(count: int, bits: int) -> int:
    """How long `pack_indices` of `count` indices is."""
    return -(-count * bits // 8)


def read_header(file: BinaryIO, name: str) -> Header:
    """The header at the start of a file.

    Args:
        name: of the file, for errors.

    Raises:
        DataError: if it is no .itk file, of another version, cut off or damaged.
    """
    content = file.read(_HEADER.size + _CHECKSUM.size)
    if content[: len(MAGIC)] != MAGIC:
        raise DataError(f"{name} is not a video that `compress` wrote")
    if len(content) > len(MAGIC) and content[len(MAGIC)] != VERSION:
        raise DataError(
            f"{name} has version {content[len(MAGIC)]} of the format; this infotok_lit reads version {VERSION}"
        )
    body = _checked(content, _HEADER.size, f"{name}: the header")
    _, _, model, width, height, frames, numerator, denominator, window, overlap, tile = _HEADER.unpack(body)
    if not denominator:
        raise DataError(f"{name}: the header has no frame rate; the file is damaged")
    try:
        return Header(model, width, height, frames, Fraction(numerator, denominator), window, overlap, tile)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def read_records(file: BinaryIO, windows: int, tokens: Iterable[int], bits: int, name: str) -> Iterator[Record]:
    """The windows that follow a header, in order.

    Args:
        windows: how many there must be.
        tokens: how many tokens each has: no record may be longer than those ask for, nor hold so few of them that a
            small file would ask for much work.
        bits: per index.
        name: of the file, for errors.

    Raises:
        DataError: if the file is cut off or damaged, or goes on after its end.
    """
    for number, all_tokens in enumerate(tokens):
        what = f"{name}: window {number + 1} of {windows}"
        head = file.read(_RECORD.size)
        if len(head) < _RECORD.size:
            raise DataError(f"{what} is missing: the file is cut off; fetch it again")
        mask_length, kept = _RECORD.unpack(head)
        # The range coder spends at most 11 bits on a token, when one with the least probability comes.
        if mask_length > 2 * all_tokens + 16 or kept > all_tokens:
            raise DataError(f"{what} claims more tokens than a window has: the file is damaged")
        if kept < all_tokens // 32:
            raise DataError(f"{what} holds fewer tokens than any rate keeps, a sixteenth: the file is damaged")
        length = mask_length + index_bytes(kept, bits)
        body = _checked(head + file.read(length + _CHECKSUM.size), _RECORD.size + length, what)
        split = _RECORD.size + mask_length
        yield Record(body[_RECORD.size : split], kept, body[split:])
    if file.read(1):
        raise DataError(f"{name} goes on after its last window: the file is damaged")


def _with_checksum(content: bytes) -> bytes:
    return content + _CHECKSUM.pack(zlib.crc32(content))


def _checked(content: bytes, length: int, what: str) -> bytes:
    """The first `length` bytes, once the checksum after them has been checked."""
    if len(content) < length + _CHECKSUM.size:
        raise DataError(f"{what} is cut off; fetch the file again")
    body, checksum = content[:length], content[length : length + _CHECKSUM.size]
    if _CHECKSUM.pack(zlib.crc32(body)) != checksum:
        raise DataError(f"{what} is damaged: its checksum is wrong; fetch the file again")
    return body
