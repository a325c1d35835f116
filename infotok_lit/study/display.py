"""What a study shows while it runs: what is done, what runs, what is left."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from infotok_lit.study.cells import Cell
from infotok_lit.study.record import LOG_FILE, Record, log_tail


class Display:
    """A bar over all cells, a line for each that runs here, and a sentence for each that ended.

    Args:
        progress: The bars.
        total: How many cells there are.
        count: How many have finished by now, whoever ran them.
    """

    def __init__(self, progress: Progress, total: int, count: Callable[[], int]) -> None:
        self._progress = progress
        self._total = total
        self._count = count
        self._all = progress.add_task("cells", total=total, completed=count())
        self._running: dict[str, TaskID] = {}
        self._failed = 0
        self._lock = Lock()
        self._elsewhere: list[str] = []

    def started(self, cell: Cell) -> None:
        """A cell starts here."""
        with self._lock:
            self._running[cell.key] = self._progress.add_task(f"  {cell.label}", total=None)
        if not self._progress.console.is_terminal:
            self.say(f"started  {cell.label}")

    def ended(self, cell: Cell, record: Record) -> None:
        """A cell ended here."""
        with self._lock:
            self._progress.remove_task(self._running.pop(cell.key))
            self._failed += record.state == "failed"
            finished = self._count()
            failed = f", {self._failed} failed" if self._failed else ""
            self._progress.update(self._all, completed=finished, description=f"cells{failed}")
        seconds = f"{record.attempts[-1].seconds:.0f} s"
        self.say(f"{record.state:<8} {cell.label} ({seconds}; {finished} of {self._total} finished{failed})")
        if record.state == "failed":
            self.say(f"  {record.reason}; the end of {cell.folder / LOG_FILE}:")
            for line in log_tail(cell.folder):
                self.say(f"    {line}")

    def elsewhere(self, keys: Sequence[str]) -> None:
        """Cells that others run, for which we wait."""
        others = sorted(set(keys) - set(self._running))
        with self._lock:
            if others != self._elsewhere and others:
                self._progress.console.print(f"waiting for others to finish {', '.join(others)}", highlight=False)
            self._elsewhere = others

    def say(self, line: str) -> None:
        """A line above the bars."""
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def display(total: int, count: Callable[[], int]) -> Iterator[Display]:
    """A display on stderr; without a terminal it only writes lines."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    hidden = not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, redirect_stdout=False, transient=True) as progress:
        yield Display(progress, total, count)
