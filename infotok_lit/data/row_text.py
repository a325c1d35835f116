"""The text of one annotation row, whichever of the known layouts it has.

Layouts, told apart by the keys of each row (a row may mix them):
- `{"caption": "..."}` or `{"captions": ["...", ...]}`; the name `caption` can be changed;
- `{"qa": [{"question": "...", "answer": "..."}, ...]}`;
- `{"question": "...", "answer": "..."}`;
- LLaVA: `{"conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}, ...]}`.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from infotok_lit.batch import Branch

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
