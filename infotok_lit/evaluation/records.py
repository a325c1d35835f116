"""Reading benchmark files as they are published, and logs that survive being killed."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

from infotok_lit.errors import DataError, MissingFileError
from infotok_lit.files import write_whole

Row = dict[str, Any]
"""One line of a result: JSON."""

Fields = Mapping[str, type | UnionType | tuple[str, ...]]
"""Field -> its type, or the texts that it may be."""
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
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file, gzipped or not; errors as for `read_text`."""
    return _parsed(read_text(path), str(path))


def read_list(path: Path) -> list[Any]:
    """The content of a JSON file that is one list; DataError for anything else."""
    content = read_json(path)
    if not isinstance(content, list):
        raise DataError(f"{path} holds no list")
    return content


def read_json_lines(path: Path) -> list[Any]:
    """The objects of a file of JSON lines, or of one JSON list, gzipped or not.

    Raises:
        DataError: naming the first line that is not JSON.
    """
    text = read_text(path)
    try:
        whole = _parsed(text, str(path))
    except DataError:
        # Some texts hold other line breaks, such as U+2028, which JSON need not escape.
        lines = enumerate(text.split("\n"), 1)
        return [_parsed(line, f"line {number} of {path}") for number, line in lines if line.strip()]
    return whole if isinstance(whole, list) else [whole]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error


def checked(content: Any, source: Path | str, fields: Fields, kind: type[list] | type[dict] = list) -> Any:
    """The content of a benchmark file, in which every row has these fields.

    Args:
        kind: a list of rows, or a dict of rows by their names.

    Raises:
        DataError: naming the file, the first row that is otherwise, and what is wrong with it.
    """
    if not content or not isinstance(content, list | dict):
        raise DataError(f"{source} holds no rows")
    if not isinstance(content, kind):
        wanted = "a list of rows" if kind is list else "rows by their names"
        raise DataError(f"{source} holds a {type(content).__name__}, not {wanted}")
    pairs = content.items() if isinstance(content, dict) else enumerate(content, 1)
    for name, row in pairs:
        if not isinstance(row, dict):
            raise DataError(f"row {name} of {source} is {row!r:.60}, not an object with fields")
        for field, wanted in fields.items():
            if field not in row:
                raise DataError(f"row {name} of {source} has no {field}")
            if row[field] not in wanted if isinstance(wanted, tuple) else not isinstance(row[field], wanted):
                meant = f", not {' or '.join(wanted)}" if isinstance(wanted, tuple) else ""
                raise DataError(f"row {name} of {source}: {field} cannot be {row[field]!r:.60}{meant}")
    return content


def by_name(rows: Sequence[Row], field: str, source: Path | str) -> dict[str, Row]:
    """The rows by the value of a field; DataError where two share one."""
    found: dict[str, Row] = {}
    for row in rows:
        if str(row[field]) in found:
            raise DataError(f"two rows of {source} have the {field} {row[field]}")
        found[str(row[field])] = row
    return found


def digest(paths: Sequence[Path]) -> str:
    """sha256 of the files' bytes, in order."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: total)
    return total.hexdigest()


class Log:
    """A file of rows, each with an `id`, added one at a time. What a kill left of a last line is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                write_whole(path, whole)

    def append(self, row: Row) -> None:
        """Add a row, in one write."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_lines([row]))


def to_lines(rows: Iterable[Row]) -> str:
    """Rows as JSON lines."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # Half a surrogate pair, which a judge may send, is no UTF-8; escaped, it is JSON.
    return text.encode(errors="backslashreplace").decode()


def read_log(path: Path) -> dict[str, Row]:
    """The rows of a log by their `id`, of several with one id the last; without a last line that a kill cut short."""
    if not path.exists():
        return {}
    rows = {}
    # A kill may have cut a character, too.
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            rows[row["id"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"line {number} of {path} is damaged: delete that line, and it is made again") from error
    return rows
