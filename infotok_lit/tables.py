"""Tables for people, in Markdown and on a terminal. Rich is imported when a table is drawn."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

WIDE = 10_000
"""Columns of what is no terminal, such as a file: any table goes into it."""


@dataclass(frozen=True)
class Table:
    """Cells by line and column; the first column says what a line is about, and stands to the left.

    Args:
        lines: Strings for people, or numbers in full for a file.
        caption: What is said below it on a terminal.
        wraps: Whether long cells are broken where a terminal is narrow; else they are cut off.
    """

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[object]]
    caption: str | None = None
    wraps: bool = False

    def markdown(self) -> str:
        """In Markdown, without the title."""
        rule = ["---", *("---:" for _ in self.header[1:])]
        return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [self.header, rule, *self.lines])

    def show(self) -> None:
        """Print it, in the width of the terminal; whole where there is none, unless `COLUMNS` says otherwise."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table as TerminalTable

        table = TerminalTable(box=SIMPLE_HEAD, title=self.title, caption=self.caption)
        for column, name in enumerate(self.header):
            table.add_column(name, justify="right" if column else "left", no_wrap=not self.wraps)
        for line in self.lines:
            table.add_row(*map(str, line))
        console = Console(markup=False)
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = WIDE
        console.print(table)
