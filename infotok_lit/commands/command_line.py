"""What several commands do in the same way. Only the standard library is imported before it is needed."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

ShowProgress = Callable[[float, str], None]
"""(how much is done, what is being done) -> None: `ProgressBar.show`."""


def at_least(minimum: float, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    """An argparse type: a number that is not below `minimum`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not value >= minimum:
            raise argparse.ArgumentTypeError(f"{text} is not {minimum} or more")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


class ProgressBar:
    """A bar on stderr, and a way to write to stdout that leaves it whole."""

    def __init__(self, progress: "Progress", total: float) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)

    def show(self, done: float, what: str) -> None:
        """Move the bar to `done`, in the unit of its total, and say what is being done."""
        self._progress.update(self._task, completed=done, description=what)

    def write(self, line: str) -> None:
        """Write a line to stdout: above the bar, if they share the terminal."""
        if sys.stdout.isatty() and not self._progress.disable:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()


@contextmanager
def progress_bar(total: float, shown: bool = True) -> Iterator[ProgressBar]:
    """A bar that is drawn if stderr is a terminal and `shown`."""
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
    hidden = not (shown and console.is_terminal)
    # rich would send what is written to stdout to its own console, which must not happen to a redirected stdout.
    with Progress(*columns, console=console, disable=hidden, redirect_stdout=False) as progress:
        yield ProgressBar(progress, total)
