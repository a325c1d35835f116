"""Annotation rows: read from JSON files, kept in one block of memory, and the text that each holds.

Layouts of a row, told apart by its keys (a row may mix them):
- `{"caption": "..."}` or `{"captions": ["...", ...]}`; the name `caption` can be changed;
- `{"qa": [{"question": "...", "answer": "..."}, ...]}`;
- `{"question": "...", "answer": "..."}`;
- LLaVA: `{"conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}, ...]}`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from infotok_lit.batch import Branch
from infotok_lit.errors import DataError

MAX_DEPTH = 32
"""Lists and objects inside one another that a row may hold: far more than any layout, and far from Python's own end."""
_ASKING, _ANSWERING = ("human", "user"), ("gpt", "assistant")


class RowText(NamedTuple):
    """What a row says about its image; nothing in it is empty."""

    captions: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]
    """(question, answer)."""

    def serves(self, branch: Branch) -> bool:
        """Drawing needs a caption; reading can also use a question with its answer."""
        return bool(self.captions) or (branch == "understanding" and bool(self.questions))


def read_row_text(row: Mapping[str, Any], caption_key: str = "caption", first_turn_only: bool = False) -> RowText:
    """Collect captions and question/answer pairs; empty ones and null are left out.

    Args:
        row: One annotation.
        caption_key: The key that holds the caption.
        first_turn_only: Take only the first exchange of a LLaVA conversation.

    Raises:
        ValueError: A known key holds something of another shape; the message names the key.
    """
    captions = [*_texts(row.get(caption_key), caption_key), *_texts(row.get("captions"), "captions")]
    asked = [*([row] if "question" in row else []), *_objects(row, "qa")]
    pairs = [(_text(item, "question"), _text(item, "answer")) for item in asked]
    turns = _conversation(_objects(row, "conversations"))
    pairs += turns[:1] if first_turn_only else turns
    complete = [(question, answer) for question, answer in pairs if question and answer]
    return RowText(tuple(dict.fromkeys(captions)), tuple(complete))


def _conversation(turns: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(question, answer) for each human turn that a model turn follows, the image placeholder taken out."""
    pairs = []
    for asked, answered in pairwise(turns):
        if asked.get("from") in _ASKING and answered.get("from") in _ANSWERING:
            question = _text(asked, "value").replace("<image>", "").strip()
            pairs.append((question, _text(answered, "value")))
    return pairs


def _objects(row: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    items = row.get(key) or []
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise ValueError(f'"{key}" must be a list of objects, not {_shown(items)}')
    return items


def _texts(value: Any, key: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not all(text is None or isinstance(text, str) for text in values):
        raise ValueError(f'"{key}" must be text or a list of texts, not {_shown(value)}')
    return [cleaned for text in values if text and (cleaned := _clean(text))]


def _text(row: Mapping[str, Any], key: str) -> str:
    """The text under a key; empty where it is missing."""
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f'"{key}" must be text, not {_shown(value)}')
    return _clean(value or "")


def _clean(text: str) -> str:
    """Strip, and replace half emoji (lone surrogates, legal in JSON) that no tokenizer can encode."""
    return text.encode("utf-8", errors="replace").decode("utf-8").strip()


def _shown(value: Any) -> str:
    return f"{str(value)[:40]!r} ({type(value).__name__})"


# Files of rows


class UnreadableRow(NamedTuple):
    """A row of which only this is known."""

    reason: str


class TooDeepError(ValueError):
    """JSON that is nested deeper than MAX_DEPTH."""

    def __init__(self) -> None:
        super().__init__(f"its JSON is nested more than {MAX_DEPTH} levels deep")


def read_json(content: bytes) -> Any:
    """JSON; TooDeepError, or ValueError for what is no JSON."""
    try:
        value = json.loads(content)
    except RecursionError:
        raise TooDeepError from None
    # One level more, for a file that is a list of rows.
    if _is_deeper(value, MAX_DEPTH + 1):
        raise TooDeepError
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    return levels == 0 or any(
        _is_deeper(part, levels - 1) for part in (value.values() if isinstance(value, dict) else value)
    )


def read_rows(path: Path) -> Iterator[Mapping[str, Any] | UnreadableRow]:
    """The rows of an annotation file (a JSON list, or JSONL), or of all such files in a folder in the order of names.

    Raises:
        DataError: There is no such file, it is not JSON, or it holds no row that can be read; the message names it.
    """
    if not path.exists():
        raise DataError(f"there is no annotation file or folder {path}")
    files = [path]
    if path.is_dir():
        seen = (file for file in path.iterdir() if not file.name.startswith(".") and file.is_file())
        files = sorted(file for file in seen if file.suffix in (".json", ".jsonl"))
    if not files:
        raise DataError(f"the folder {path} holds no .json or .jsonl file with annotations")
    are_rows, first_fault = False, None
    for file in files:
        for where, row in _rows_of_jsonl(file) if file.suffix == ".jsonl" else _rows_of_json(file):
            if isinstance(row, dict | UnreadableRow):
                are_rows = True
                yield row
            else:
                fault = UnreadableRow(f"{where}: a row must be a JSON object, not {str(row)[:40]!r}")
                first_fault = first_fault or fault
                yield fault
    if not are_rows:
        raise DataError(f"{path} holds no rows" if first_fault is None else first_fault.reason)


def read_object(file: Path) -> dict[str, Any]:
    """The one row in a JSON file; ValueError if there is no such file, or no such row in it."""
    if not file.is_file():
        raise DataError(f"there is no annotation file {file}")
    try:
        content = read_json(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} must hold a JSON object with the caption")
    return content


def _rows_of_jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) for each."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{file}, line {number}", _row(line, f"{file}, line {number}")


def _rows_of_json(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) for each."""
    content = file.read_bytes()
    try:
        rows = read_json(content)
    except TooDeepError:
        for number, row in enumerate(_elements(content)):
            yield f"{file}, row {number}", _row(row, f"{file}, row {number}")
        return
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error})") from error
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        yield f"{file}, row {number}", row


def _row(content: bytes, where: str) -> Any:
    try:
        return read_json(content)
    except TooDeepError as error:
        return UnreadableRow(f"{where}: {error}")
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from error


def _elements(content: bytes) -> Iterator[bytes]:
    """The elements of a JSON list as they stand, found by its brackets: for what the parser cannot take as a whole."""
    depth, start = 0, 0
    for match in re.finditer(rb'"(?:[^"\\]|\\.)*"|[\[\]{},]', content):
        sign = match[0]
        if sign in b"[{":
            depth += 1
            start = match.end() if depth == 1 else start
        elif sign in b"]}":
            depth -= 1
        if (depth == 1 and sign == b",") or depth == 0:
            if element := content[start : match.start()].strip():
                yield element
            start = match.end()


class PackedRows:
    """A read-only sequence of small JSON objects in one block of memory; `rows[i]` decodes one.

    Millions of Python dicts cost about a kilobyte each, and reference counting copies them into every forked worker.
    Bytes in a NumPy array cost what they weigh and stay shared.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        encoded = [json.dumps(row).encode() for row in rows]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return json.loads(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())
