"""Entropy coding of masks: an adaptive binary range coder whose contexts are the neighbours that are known already.

A mask costs one bit per token if it is sent as it is, up to a fifth of a stream at low rates. Kept tokens lie together
and stay from frame to frame, so the neighbours to the left, above and one latent frame earlier say much of the next.
The probabilities are learned while coding, and go on from one mask of a stream to the next.
"""

from collections.abc import Callable

import numpy as np

_TOP = 1 << 24
_PRECISION = 16
_LIMIT = 1024
"""The counts of a context are halved here, so that it follows a video that changes."""


class MaskEncoder:
    """Codes masks one after another."""

    def __init__(self) -> None:
        self._contexts = _Contexts()

    def encode(self, mask: np.ndarray) -> bytes:
        """The code of a bool mask (n, t, h, w)."""
        coder = _RangeEncoder()

        def step(context: int, place: tuple[int, int]) -> bool:
            bit = bool(flat[place[0], place[1]])
            coder.encode(bit, self._contexts.probability(context))
            return bit

        for tile in mask:
            flat = tile.reshape(-1, tile.shape[-1])
            _scan(tile.shape, self._contexts, step)
        return coder.finish()


class MaskDecoder:
    """Decodes what a MaskEncoder coded, in the same order."""

    def __init__(self) -> None:
        self._contexts = _Contexts()

    def decode(self, code: bytes, shape: tuple[int, int, int, int]) -> np.ndarray:
        """The mask (n, t, h, w). Any bytes decode to some mask: whoever reads them checks that it is the right one."""
        coder = _RangeDecoder(code)
        mask = np.zeros(shape, dtype=bool)

        def step(context: int, place: tuple[int, int]) -> bool:
            bit = coder.decode(self._contexts.probability(context))
            flat[place[0], place[1]] = bit
            return bit

        for tile in mask:
            flat = tile.reshape(-1, shape[-1])
            _scan(shape[1:], self._contexts, step)
        return mask


class _Contexts:
    """How often a token was kept and dropped, by what its three neighbours were."""

    def __init__(self) -> None:
        self.counts = [[1, 1] for _ in range(8)]

    def probability(self, context: int) -> int:
        """Of "kept", in units of 2^-16, never 0 or 1."""
        dropped, kept = self.counts[context]
        return (kept << _PRECISION) // (dropped + kept)

    def learn(self, context: int, bit: bool) -> None:
        counts = self.counts[context]
        counts[bit] += 1
        if counts[bit] >= _LIMIT:
            self.counts[context] = [(count + 1) // 2 for count in counts]


def _scan(shape: tuple[int, ...], contexts: _Contexts, step: Callable[[int, tuple[int, int]], bool]) -> None:
    """Visit a tile's tokens (t, h, w) in raster order; `step` codes one and says what it was."""
    frames, height, width = shape
    earlier = [[False] * width for _ in range(height)]
    for frame in range(frames):
        above = [False] * width
        for row in range(height):
            left, this, before = False, [], earlier[row]
            line = frame * height + row
            for column in range(width):
                context = left + 2 * above[column] + 4 * before[column]
                left = step(context, (line, column))
                contexts.learn(context, left)
                this.append(left)
            above = earlier[row] = this


class _RangeEncoder:
    """A range coder with carry propagation, as in LZMA."""

    def __init__(self) -> None:
        self._low, self._range = 0, 0xFFFFFFFF
        self._held, self._pending = 0, 0
        self._out = bytearray()
        self._started = False

    def encode(self, bit: bool, probability: int) -> None:
        bound = (self._range >> _PRECISION) * probability
        if bit:
            self._range = bound
        else:
            self._low += bound
            self._range -= bound
        while self._range < _TOP:
            self._range <<= 8
            self._shift()

    def finish(self) -> bytes:
        for _ in range(5):
            self._shift()
        # The decoder reads zeros after the end, so trailing ones need not be sent.
        return bytes(self._out).rstrip(b"\0")

    def _shift(self) -> None:
        carry, top = self._low >> 32, (self._low >> 24) & 0xFF
        if carry or top != 0xFF:
            if self._started:
                self._out.append((self._held + carry) & 0xFF)
            self._out.extend([(0xFF + carry) & 0xFF] * self._pending)
            self._held, self._pending, self._started = top, 0, True
        else:
            self._pending += 1
        self._low = (self._low << 8) & 0xFFFFFFFF


class _RangeDecoder:
    """The inverse; zeros follow the end of the code."""

    def __init__(self, code: bytes) -> None:
        self._code, self._position = code, 4
        self._range = 0xFFFFFFFF
        self._value = int.from_bytes(code[:4].ljust(4, b"\0"), "big")

    def decode(self, probability: int) -> bool:
        bound = (self._range >> _PRECISION) * probability
        bit = self._value < bound
        if bit:
            self._range = bound
        else:
            self._value -= bound
            self._range -= bound
        while self._range < _TOP:
            self._range <<= 8
            following = self._code[self._position] if self._position < len(self._code) else 0
            self._value = ((self._value << 8) | following) & 0xFFFFFFFF
            self._position += 1
        return bit
