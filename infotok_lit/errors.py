"""Errors whose message is all that a user needs: the command line shows it, without a traceback.

Whatever refuses a user's files, data or settings raises one of these, constructors of configuration classes included:
the command line then says the sentence, the key and the file that it stands in, and nothing else. The message names
what is wrong, by the field's own name, and the mend: `temperature is -1.0; set it above 0`.
"""

import difflib
from collections.abc import Iterable

INTERRUPTED = 130
"""The exit status of a program that the user stopped: 128 + the number of SIGINT."""
TERMINATED = 143
"""That of one that SIGTERM ended: 128 + 15."""


class ExplainedError(Exception):
    """Something is wrong with the user's files, data or settings; the message names it and says what to do."""

    def __str__(self) -> str:
        """The message alone, also where torch hands on the whole traceback of a worker process in its place."""
        text = super().__str__()
        mark = f"{type(self).__module__}.{type(self).__qualname__}: "
        return text.rpartition(mark)[2].strip() if text.startswith("Caught ") and mark in text else text


class SettingsError(ExplainedError, ValueError):
    """Settings that no model, or no run, can have."""


class DataError(ExplainedError, ValueError):
    """Data that cannot be read as a whole; a single broken sample is skipped instead."""


class MissingFileError(ExplainedError, FileNotFoundError):
    """A file or folder that was asked for is not there."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known word that is close to this one, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
