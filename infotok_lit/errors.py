"""Errors whose message is all that a user needs: the command line shows it, without a traceback."""


class ExplainedError(Exception):
    """Something is wrong with the user's files, data or settings; the message names it and says what to do."""


class SettingsError(ExplainedError, ValueError):
    """Settings that no model, or no run, can have."""


class DataError(ExplainedError, ValueError):
    """Data that cannot be read as a whole; a single broken sample is skipped instead."""


class MissingFileError(ExplainedError, FileNotFoundError):
    """A file or folder that was asked for is not there."""
