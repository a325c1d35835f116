"""What several commands do in the same way. Only the standard library is imported before it is needed."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SetProgress = Callable[[float, str], None]
"""(how much is done, what is being done) -> None."""


def at_least(minimum: float, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    """An argparse type: a number that is not below `minimum`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not value >= minimum:
            raise argparse.ArgumentTypeError(f"{text} is not {minimum} or more")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all, whatever was at `path` before."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        staging.write_bytes(content)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def progress_bar(total: float, shown: bool) -> Iterator[SetProgress]:
    """A bar on stderr, if that is a terminal and `shown`; yields what moves it.

    Args:
        total: how much there is to do, in the unit that the caller counts in.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # rich would print what is written to stdout on its own console, which must not happen to a redirected stdout.
    with Progress(
        *columns,
        console=console,
        disable=not (shown and console.is_terminal),
        redirect_stdout=sys.stdout.isatty(),
    ) as progress:
        task = progress.add_task("", total=total)
        yield lambda done, what: progress.update(task, completed=done, description=what)
