"""A Hugging Face dataset folder: Parquet files, or JSON lines with image files beside them.

Parquet needs pyarrow, which is not among this package's dependencies.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from infotok_lit.data.image_file import read_image
from infotok_lit.errors import DataError, MissingFileError
from infotok_lit.evaluation.records import Row, read_json_lines


class Table:
    """The rows of a folder in order, of the files whose names start with `split`, or of all where none does.

    Images stay on disk: a row holds None in their columns, and `image` reads one.

    Args:
        image_columns: which columns hold images (or lists of them).

    Raises:
        MissingFileError: there are no such files, or pyarrow is not installed.
    """

    def __init__(self, folder: Path, image_columns: Sequence[str], split: str = "") -> None:
        self.folder, self.image_columns = folder, image_columns
        files = [file for kind in ("*.parquet", "*.jsonl") for file in sorted(folder.rglob(kind))]
        self.files = [file for file in files if file.name.startswith(split)] or files
        if not self.files:
            raise MissingFileError(f"there are no .parquet or .jsonl files in {folder}")
        self._parts = [_ParquetPart(file) if file.suffix == ".parquet" else _LinesPart(file) for file in self.files]
        self._group: tuple[object, list[Row]] = (None, [])

    @cached_property
    def rows(self) -> list[Row]:
        """Every row, without its images."""
        return [
            row | {column: None for column in self.image_columns if column in row}
            for part in self._parts
            for row in part.rows(self.image_columns)
        ]

    def has_image(self, number: int, column: str) -> bool:
        """Whether a row has an image in a column."""
        return bool(self._cell(number, column))

    def image(self, number: int, column: str, index: int = 0) -> Image.Image:
        """The image of a row, RGB; of a list of images that at `index`."""
        cell = self._cell(number, column)
        cell = cell[index] if isinstance(cell, list) else cell
        source, name = cell, f"row {number} of {self.folder}, {column}"
        if isinstance(cell, dict):
            source = cell["bytes"] if cell.get("bytes") else cell.get("path")
        if isinstance(source, str):
            source = self._file_of(number).parent / source
            if not source.is_file():
                raise MissingFileError(f"{name} is {source}, which is not there")
        if source is None:
            raise DataError(f"{name} holds no image")
        return read_image(source, name, min_side=1, max_aspect=float("inf"))

    def _cell(self, number: int, column: str) -> Any:
        for part in self._parts:
            if number < len(part):
                return part.cell(number, column)
            number -= len(part)
        raise IndexError(f"{self.folder} has no row {number}")

    def _file_of(self, number: int) -> Path:
        for file, part in zip(self.files, self._parts, strict=True):
            if number < len(part):
                return file
            number -= len(part)
        raise IndexError(f"{self.folder} has no row {number}")


class _LinesPart:
    """JSON lines; images are paths relative to the file."""

    def __init__(self, file: Path) -> None:
        self._rows = read_json_lines(file)

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, image_columns: Sequence[str]) -> list[Row]:
        return self._rows

    def cell(self, number: int, column: str) -> Any:
        return self._rows[number].get(column)


class _ParquetPart:
    """One Parquet file, of whose images one row group at a time is in memory."""

    def __init__(self, file: Path) -> None:
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise MissingFileError(f"{file} is Parquet, which needs pyarrow: `pip install pyarrow`") from error
        self._file = parquet.ParquetFile(file)
        self._cached: tuple[int, str] | None = None
        self._column: list[Any] = []

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def rows(self, image_columns: Sequence[str]) -> list[Row]:
        names = self._file.schema_arrow.names
        rows = self._file.read(columns=[name for name in names if name not in image_columns]).to_pylist()
        present = {name: None for name in names if name in image_columns}
        return [row | present for row in rows]

    def cell(self, number: int, column: str) -> Any:
        if column not in self._file.schema_arrow.names:
            return None
        for group in range(self._file.num_row_groups):
            size = self._file.metadata.row_group(group).num_rows
            if number < size:
                break
            number -= size
        if self._cached != (group, column):
            self._column = self._file.read_row_group(group, columns=[column]).column(0).to_pylist()
            self._cached = (group, column)
        return self._column[number]
