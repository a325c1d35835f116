"""Several sources as one: new data beside old, so that what a model knew is not forgotten."""

import math
from collections.abc import Sequence

import numpy as np

from infotok_lit.batch import Branch, Sample, Source
from infotok_lit.errors import SettingsError


class Mixture(Source):
    """Of sum(parts) samples, parts[i] come from the i-th source; a source that is through begins again.

    Samples come in any order; where a source is a stream, each source's come in its own, and each round in any.

    Args:
        sources: what is mixed.
        parts: how many samples of each source belong to one round; default: one of each.

    Raises:
        SettingsError: there is no source, or not one positive part for each.
    """

    def __init__(self, sources: list[Source], parts: list[int] | None = None) -> None:
        parts = [1] * len(sources) if parts is None else list(parts)
        if not sources or len(parts) != len(sources) or min(parts) < 1:
            raise SettingsError(
                f"a mixture needs one positive number in `parts` for each source, got {parts} for {len(sources)}"
            )
        self.sources = tuple(sources)
        self.parts = tuple(parts)
        self._ends = np.cumsum(self.parts)

    def __len__(self) -> int:
        return self._length([len(source) for source in self.sources])

    def branch_length(self, branch: Branch) -> int:
        """As many rounds as it takes for every source to be seen whole."""
        return self._length([source.branch_length(branch) for source in self.sources])

    def sample(self, branch: Branch, index: int, rng: np.random.Generator) -> Sample:
        """The sample of whichever source the index belongs to."""
        number, inner = self._locate(branch, index)
        return self.sources[number].sample(branch, inner, rng)

    def hard_negatives(self, branch: Branch, index: int) -> Sequence[str] | Sequence[tuple[str, str]]:
        """Those that the sample's own source knows."""
        number, inner = self._locate(branch, index)
        return self.sources[number].hard_negatives(branch, inner)

    def order(self, branch: Branch, rng: np.random.Generator, block: int) -> np.ndarray:
        """The order (length,) of one pass."""
        if not self.lookahead(branch, block):
            return super().order(branch, rng, block)
        rounds, size = self.branch_length(branch) // sum(self.parts), sum(self.parts)
        one_round = np.repeat(np.arange(len(self.parts)), self.parts)
        numbers = rng.permuted(np.tile(one_round, (rounds, 1)), axis=1).ravel()
        order = np.empty(rounds * size, dtype=np.int64)
        for number, part in enumerate(self.parts):
            inner = _again_and_again(self.sources[number], branch, rng, block, rounds * part)
            order[numbers == number] = self._index_of(number, inner)
        return order

    def lookahead(self, branch: Branch, block: int) -> int:
        """The farthest of its sources', of whose samples it draws more in between."""
        size = sum(self.parts)
        each = zip(self.sources, self.parts, strict=True)
        return max(-(-source.lookahead(branch, block) * size // part) for source, part in each)

    def prefetch(self, branch: Branch, index: int) -> None:
        """Have the sample's own source get ready."""
        number, inner = self._locate(branch, index)
        self.sources[number].prefetch(branch, inner)

    def replacement(self, branch: Branch, index: int, attempt: int, rng: np.random.Generator) -> int:
        """Any sample; where a source is a stream, what the sample's own source gives."""
        if not self.lookahead(branch, block=1):
            return super().replacement(branch, index, attempt, rng)
        number, inner = self._locate(branch, index)
        other = self.sources[number].replacement(branch, inner, attempt, rng)
        return int(self._index_of(number, np.array(other)))

    def split(self, share: float) -> tuple["Mixture", "Mixture"]:
        """Each source split alike."""
        kept, held_back = zip(*(source.split(share) for source in self.sources), strict=True)
        return Mixture(list(kept), list(self.parts)), Mixture(list(held_back), list(self.parts))

    def _length(self, lengths: list[int]) -> int:
        rounds = max(math.ceil(length / part) for length, part in zip(lengths, self.parts, strict=True))
        return rounds * sum(self.parts)

    def _locate(self, branch: Branch, index: int) -> tuple[int, int]:
        """Which source a sample is of, and which of its samples it is."""
        round_, place = divmod(index, sum(self.parts))
        number = int(np.searchsorted(self._ends, place, side="right"))
        part = self.parts[number]
        inner = round_ * part + place - (self._ends[number] - part)
        return number, inner % self.sources[number].branch_length(branch)

    def _index_of(self, number: int, inner: np.ndarray) -> np.ndarray:
        """The indices of samples of a source; of those of its second pass, where they count on, and so forth."""
        part = self.parts[number]
        return inner // part * sum(self.parts) + self._ends[number] - part + inner % part


def _again_and_again(source: Source, branch: Branch, rng: np.random.Generator, block: int, count: int) -> np.ndarray:
    """(count,): the order of one pass over a source after another, where sample i of pass k is i + k length."""
    length = source.branch_length(branch)
    passes = []
    for first in range(0, count, length):
        own = source.order(branch, rng, block)
        passes.append(first + own[own < count - first])
    return np.concatenate(passes)
