"""Several sources as one: new data beside old, so that what a model knew is not forgotten."""

import math
from collections.abc import Sequence

import numpy as np

from infotok_lit.batch import Branch, Sample, Source
from infotok_lit.errors import SettingsError


class Mixture(Source):
    """Of every sum(parts) samples, parts[i] come from the i-th source; a source that is through begins again.

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
        source, inner = self._locate(branch, index)
        return source.sample(branch, inner, rng)

    def hard_negatives(self, branch: Branch, index: int) -> Sequence[str] | Sequence[tuple[str, str]]:
        """Those that the sample's own source knows."""
        source, inner = self._locate(branch, index)
        return source.hard_negatives(branch, inner)

    def split(self, share: float) -> tuple["Mixture", "Mixture"]:
        """Each source split alike."""
        kept, held_back = zip(*(source.split(share) for source in self.sources), strict=True)
        return Mixture(list(kept), list(self.parts)), Mixture(list(held_back), list(self.parts))

    def _length(self, lengths: list[int]) -> int:
        rounds = max(math.ceil(length / part) for length, part in zip(lengths, self.parts, strict=True))
        return rounds * sum(self.parts)

    def _locate(self, branch: Branch, index: int) -> tuple[Source, int]:
        round_, place = divmod(index, sum(self.parts))
        number = int(np.searchsorted(self._ends, place, side="right"))
        part = self.parts[number]
        source = self.sources[number]
        return source, (round_ * part + place - (self._ends[number] - part)) % source.branch_length(branch)
