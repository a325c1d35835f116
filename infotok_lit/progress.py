"""A progress bar that stays out of what a command writes. Rich is imported when a bar is drawn."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


class ProgressBar:
    """A bar on stderr, and ways to write lines that leave it whole; threads may share it."""

    def __init__(self, progress: "Progress", total: float) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)

    def show(self, done: float, what: str) -> None:
        """Move the bar to `done`, in the unit of its total, and say what is being done."""
        from rich.markup import escape

        # Names of files may hold brackets, which are markup to rich.
        self._progress.update(self._task, completed=done, description=escape(what))

    def write(self, line: str) -> None:
        """Write a line to stdout: above the bar, if they share the terminal."""
        if sys.stdout.isatty() and not self._progress.disable:
            self.say(line)
        else:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    def say(self, line: str) -> None:
        """Write a line to stderr, above the bar."""
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(total: float, shown: bool = True) -> Iterator[ProgressBar]:
    """A bar that is drawn if stderr is a terminal and `shown`."""
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    hidden = not (shown and console.is_terminal)
    # rich would send what is written to stdout to its own console, which must not happen to a redirected stdout.
    with Progress(*columns, console=console, disable=hidden, redirect_stdout=False) as progress:
        yield ProgressBar(progress, total)
