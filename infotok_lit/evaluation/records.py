"""Reading benchmark files as they are published, and logs that survive being killed."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from infotok_lit.errors import DataError, MissingFileError
from infotok_lit.files import write_whole

Row = dict[str, Any]
"""One line of a result: JSON."""

_GZIP = b"\x1f\x8b"


def read_text(path: Path) -> str:
    """The text of a file, gzipped or not.

    Raises:
        MissingFileError: there is no such file.
        DataError: it is damaged.
    """
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if content.startswith(_GZIP) else content).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise MissingFileError(f"there is no file {path}") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file, gzipped or not; errors as for `read_text`."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def read_json_lines(path: Path) -> list[Any]:
    """The objects of a file of JSON lines, or of one JSON list, gzipped or not.

    Raises:
        DataError: naming the first line that is not JSON.
    """
    text = read_text(path)
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return list(_lines(text, path))
    return whole if isinstance(whole, list) else [whole]


def _lines(text: str, path: Path) -> Iterator[Any]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"line {number} of {path} is not JSON: {error}") from error


def digest(paths: Sequence[Path]) -> str:
    """sha256 of the files' bytes, in order."""
    total = hashlib.sha256()
    for path in paths:
        total.update(path.read_bytes())
    return total.hexdigest()


class Log:
    """A file of rows, each with an `id`, added one batch at a time. What a kill left of a last line is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                write_whole(path, whole)

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows, in one write."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_lines(rows))


def to_lines(rows: Iterable[Row]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_log(path: Path) -> dict[str, Row]:
    """The rows of a log by their `id`, of several with one id the last; without a last line that a kill cut short."""
    if not path.exists():
        return {}
    rows = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            rows[row["id"]] = row
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"line {number} of {path} is damaged: delete that line, and it is made again") from error
    return rows
