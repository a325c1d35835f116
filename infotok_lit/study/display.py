"""What a study shows while it runs: what is done, what runs, what is left."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from infotok_lit.study.cells import Cell
from infotok_lit.study.record import LOG_FILE, Record, log_tail


class Display:
    """A bar over all cells, a line for each that runs here, and a sentence for each that ended."""

    def __init__(self, progress: Progress, total: int | None, finished: int) -> None:
        self._progress = progress
        self._all = progress.add_task("cells", total=total, completed=finished)
        self._running: dict[str, TaskID] = {}
        self._finished, self._total, self._failed = finished, total, 0
        self._lock = Lock()
        self._elsewhere: list[str] = []

    def started(self, cell: Cell) -> None:
        """A cell starts here."""
        with self._lock:
            self._running[cell.key] = self._progress.add_task(f"  {cell.label}", total=None)
            self._describe()
        if not self._progress.console.is_terminal:
            self.say(f"started  {cell.label}")

    def ended(self, cell: Cell, record: Record) -> None:
        """A cell ended here."""
        with self._lock:
            self._progress.remove_task(self._running.pop(cell.key))
            self._finished += record.state == "finished"
            self._failed += record.state == "failed"
            self._describe()
            left = "" if self._total is None else f", {self._total - self._finished - self._failed} left"
        seconds = f"{record.attempts[-1].seconds:.0f} s{left}"
        self.say(f"{record.state:<8} {cell.label} ({seconds})")
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

    def _describe(self) -> None:
        failed = f", {self._failed} failed" if self._failed else ""
        self._progress.update(self._all, completed=self._finished, description=f"cells{failed}")


@contextmanager
def display(total: int | None, finished: int) -> Iterator[Display]:
    """A display on stderr; without a terminal it only writes lines."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, redirect_stdout=False, transient=True) as progress:
        yield Display(progress, total, finished)
