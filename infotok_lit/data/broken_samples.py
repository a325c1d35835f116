"""Counts what could not be read, names it once, and stops the run when it is too much."""

import logging
from collections.abc import Sequence
from typing import Any

from infotok_lit.batch import TooManyBrokenSamplesError

log = logging.getLogger(__name__)

_NAMED = 5
_ENOUGH = 50


class BrokenSampleTally:
    """How many training draws were broken, in the process that trains."""

    def __init__(self, max_share: float, source_size: int) -> None:
        """
        Args:
            max_share: The share of broken draws above which training stops.
            source_size: The number of samples there are; the share is judged after 50 draws, or this many if fewer.
        """
        self.good = 0
        self.broken = 0
        self._max_share = max_share
        self._enough = min(_ENOUGH, source_size)
        self._first: list[str] = []
        self._reported: set[str] = set()

    def report(self, messages: Sequence[str]) -> None:
        """Log each message that was not logged before."""
        for message in messages:
            if message not in self._reported:
                self._reported.add(message)
                log.warning("skipped a broken sample: %s", message)

    def count(self, good: int, messages: Sequence[str]) -> None:
        """Count the draws of one batch; TooManyBrokenSamplesError if too many so far were broken."""
        self.report(messages)
        self.good += good
        self.broken += len(messages)
        self._first = list(dict.fromkeys([*self._first, *messages]))[:_NAMED]
        total = self.good + self.broken
        if total >= self._enough and self.broken > self._max_share * total:
            raise TooManyBrokenSamplesError(
                f"{self.broken} of {total} samples drawn so far are broken ({self.broken / total:.1%}, the limit is "
                f"{self._max_share:.1%}): {'; '.join(self._first)}. Mend or remove them, or raise max_broken_share."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"good": self.good, "broken": self.broken, "first": list(self._first)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.good, self.broken, self._first = state["good"], state["broken"], list(state["first"])
