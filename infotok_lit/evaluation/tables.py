"""A Hugging Face dataset folder: Parquet, Arrow (as `save_to_disk` writes), or JSON lines with image files beside them.

Parquet and Arrow need pyarrow, which is not among this package's dependencies.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from infotok_lit.batch import BrokenSampleError
from infotok_lit.data.image_file import read_image
from infotok_lit.errors import DataError, MissingFileError
from infotok_lit.evaluation.records import Fields, Row, checked, read_json_lines

Content = TypeVar("Content")


class Table:
    """The rows of a folder in order: of the files called `SPLIT...` or in a folder SPLIT, or of all where none is.

    Images stay on disk: a row holds None in their columns, and `image` reads one.

    Args:
        image_columns: which columns hold images (or lists of them).
        fields: what every row must have.
        fetch: how to get the files, for who has none.

    Raises:
        MissingFileError: there are no such files, or pyarrow is not installed.
        DataError: naming the file that cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        image_columns: Sequence[str] = (),
        split: str = "",
        fields: Fields | None = None,
        fetch: str = "",
    ) -> None:
        self.folder, self.image_columns, self.fields, self.fetch = folder, image_columns, fields or {}, fetch
        files = [file for pattern in _PARTS for file in sorted(folder.rglob(pattern))]
        named = [file for file in files if file.name.startswith(split) or file.parent.name == split]
        self.files = named or files
        if not self.files:
            raise MissingFileError(f"there are no .parquet, .arrow or .jsonl files in {folder}. {fetch}")
        self._parts = [_opened(file) for file in self.files]

    @cached_property
    def rows(self) -> list[Row]:
        """Every row, without its images; DataError for the first that lacks a field."""
        return [
            row | dict.fromkeys(self.image_columns)
            for file, part in zip(self.files, self._parts, strict=True)
            for row in checked(self._read(file, lambda part=part: part.rows(self.image_columns)), file, self.fields)
        ]

    def has_image(self, number: int, column: str) -> bool:
        """Whether a row has an image in a column."""
        part, file, place = self._place(number)
        return bool(self._read(file, lambda: part.cell(place, column)))

    def image(self, number: int, column: str) -> Image.Image:
        """The image of a row, RGB; of a list of images the first."""
        source, name = self._source(number, column), f"{self.where(number)}, {column}"
        if isinstance(source, Path) and not source.is_file():
            raise MissingFileError(f"{name} is {source}, which is not there")
        try:
            return read_image(source, name, min_side=1, max_aspect=float("inf"))
        except BrokenSampleError as error:
            raise DataError(f"{error}: get that file anew. {self.fetch}".strip()) from error

    def image_file(self, number: int, column: str) -> Path | None:
        """Where the image of a row lies, there or not; None for Parquet and Arrow, which mostly hold it themselves, and
        would have to be read whole to tell."""
        source = self._source(number, column) if isinstance(self._place(number)[0], _Lines) else None
        return source if isinstance(source, Path) else None

    def _source(self, number: int, column: str) -> Path | bytes:
        """What holds the image of a row, there or not; DataError where nothing is said to."""
        part, file, place = self._place(number)
        cell = self._read(file, lambda: part.cell(place, column))
        if isinstance(cell, list):
            cell = cell[0] if cell else None
        if isinstance(cell, dict):
            cell = cell["bytes"] if cell.get("bytes") else cell.get("path")
        if cell is None:
            raise DataError(f"{self.where(number)}, {column} holds no image")
        return file.parent / cell if isinstance(cell, str) else cell

    def where(self, number: int) -> str:
        """What an error calls a row: its place in its file."""
        _, file, place = self._place(number)
        return f"row {place + 1} of {file}"

    @staticmethod
    def _read(file: Path, read: Callable[[], Content]) -> Content:
        """DataError, naming the file, where it is damaged further in."""
        try:
            return read()
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read: {error}") from error

    def _place(self, number: int) -> "tuple[_Lines | _Parquet | _Arrow, Path, int]":
        """The part that holds a row, its file, and the row's place in it."""
        for file, part in zip(self.files, self._parts, strict=True):
            if number < len(part):
                return part, file, number
            number -= len(part)
        raise IndexError(f"{self.folder} has no row {number}")


class TableImage(NamedTuple):
    """An image that a row of a table holds, or names."""

    table: Table
    row: int
    column: str = "image"

    def open(self) -> Image.Image:
        """It, as RGB; errors as for `Table.image`."""
        return self.table.image(self.row, self.column)

    @property
    def file(self) -> Path | None:
        """Where it lies; None for one that is in the table."""
        return self.table.image_file(self.row, self.column)


class _Lines:
    """JSON lines; images are paths relative to the file."""

    def __init__(self, file: Path) -> None:
        self._rows = checked(read_json_lines(file), file, {})

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, image_columns: Sequence[str]) -> list[Row]:
        return self._rows

    def cell(self, number: int, column: str) -> Any:
        return self._rows[number].get(column)


class _Parquet:
    """One Parquet file, of whose images one row group per column is in memory."""

    def __init__(self, file: Path) -> None:
        from pyarrow import parquet

        self._file = parquet.ParquetFile(file)
        self._cached: dict[str, tuple[int, list[Any]]] = {}

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def rows(self, image_columns: Sequence[str]) -> list[Row]:
        names = [name for name in self._file.schema_arrow.names if name not in image_columns]
        return self._file.read(columns=names).to_pylist()

    def cell(self, number: int, column: str) -> Any:
        if column not in self._file.schema_arrow.names:
            return None
        for group in range(self._file.num_row_groups):
            size = self._file.metadata.row_group(group).num_rows
            if number < size:
                break
            number -= size
        if column not in self._cached or self._cached[column][0] != group:
            self._cached[column] = group, self._file.read_row_group(group, columns=[column]).column(0).to_pylist()
        return self._cached[column][1][number]


class _Arrow:
    """One file of Arrow's stream format, of which only what is asked for is in memory."""

    def __init__(self, file: Path) -> None:
        import pyarrow

        self._table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()

    def __len__(self) -> int:
        return self._table.num_rows

    def rows(self, image_columns: Sequence[str]) -> list[Row]:
        return self._table.select([name for name in self._table.column_names if name not in image_columns]).to_pylist()

    def cell(self, number: int, column: str) -> Any:
        return self._table.column(column)[number].as_py() if column in self._table.column_names else None


_PARTS = {"*.parquet": _Parquet, "data*.arrow": _Arrow, "*.jsonl": _Lines}
"""Which files are read, and how: beside Arrow's data, `datasets` keeps caches of the same kind."""


def _opened(file: Path) -> _Lines | _Parquet | _Arrow:
    kind = next(kind for pattern, kind in _PARTS.items() if file.match(pattern))
    try:
        return kind(file)
    except ImportError as error:
        raise MissingFileError(f"{file} is {kind.__name__[1:]}, which needs pyarrow: `pip install pyarrow`") from error
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} cannot be read: {error}") from error
