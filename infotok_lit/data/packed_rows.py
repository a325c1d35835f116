"""A read-only list of small JSON objects in one block of memory.

Millions of Python dicts cost about a kilobyte each, and reference counting copies them into every forked worker.
Bytes in a NumPy array cost what they weigh and stay shared.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


class PackedRows:
    """An immutable sequence of JSON objects; `rows[i]` decodes one."""

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
