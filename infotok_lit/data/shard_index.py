"""Where each sample lies in a tar shard: found by one scan, and kept in a cache file."""

import contextlib
import hashlib
import json
import logging
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from infotok_lit.data.fetch import locked, replacing
from infotok_lit.data.image_text import BRANCHES, SampleOptions
from infotok_lit.data.row_text import RowText
from infotok_lit.errors import DataError

log = logging.getLogger(__name__)

Entry = dict[str, Any]
"""One sample of a shard: "key"; "image", "json" and "txt": [offset, size] of its members; "serves": the branches it
serves; "broken": why it cannot be read, if so."""

_VERSION = 1
_BLOCK = 512
_KINDS = {"jpg": "image", "jpeg": "image", "png": "image", "webp": "image", "json": "json", "txt": "txt"}


def shard_index(path: Path, cache: Path, options: SampleOptions) -> list[Entry]:
    """The samples of a shard, in order; scanned if the cache has no index of this path, size and time of change.

    A shard that is cut off or damaged is indexed up to there, with a warning; a sample that was cut through is
    listed as broken.

    Raises:
        DataError: The file is no uncompressed tar.
    """
    status = path.stat()
    identity = [_VERSION, str(path.resolve()), status.st_size, status.st_mtime_ns]
    identity += [options.caption_key, options.first_turn_only]
    target = cache / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}.index.json"
    if not target.exists():
        with locked(cache / "index"):
            if not target.exists():
                scanned = _scan(path, options)
                with replacing(target) as file:
                    file.write(json.dumps(scanned).encode())
    index = json.loads(target.read_bytes())
    if index["damage"]:
        log.warning("%s: %s; its %d samples before that are used", path, index["damage"], len(index["entries"]))
    return index["entries"]


def read_member_text(json_member: bytes | None, txt_member: bytes | None, options: SampleOptions) -> RowText:
    """The text of a sample from its .json and .txt members; ValueError if the .json is malformed."""
    row = {} if json_member is None else json.loads(json_member)
    if not isinstance(row, dict):
        raise ValueError("its .json member must be a JSON object")
    annotated = options.read_text(row)
    plain = options.read_text({options.caption_key: (txt_member or b"").decode(errors="replace")})
    return RowText(tuple(dict.fromkeys(annotated.captions + plain.captions)), annotated.questions)


def read_member(file: BinaryIO, place: Sequence[int] | None) -> bytes | None:
    """The bytes at [offset, size] of an open shard; None where there is no such member."""
    if place is None:
        return None
    file.seek(place[0])
    return file.read(place[1])


def _scan(path: Path, options: SampleOptions) -> dict[str, Any]:
    log.info("indexing %s", path)
    with path.open("rb") as file:
        members, damage = _members(path, file)
        entries = [_entry(file, key, places, options) for key, places in _groups(members)]
    size = path.stat().st_size
    for entry in entries[-1:] if damage else []:
        is_cut = any(sum(entry[kind]) > size for kind in ("image", "json", "txt") if kind in entry)
        if is_cut or not entry["serves"]:
            entry |= {"serves": BRANCHES, "broken": "the shard is cut off inside this sample"}
    return {"damage": damage, "entries": entries}


def _members(path: Path, file: BinaryIO) -> tuple[list[tarfile.TarInfo], str | None]:
    """The members of a tar up to its end or its first damage, and what the damage is."""
    members: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar, contextlib.suppress(tarfile.ReadError):
            for member in tar:  # not list(tar): what came before the damage is kept
                members.append(member)
    except tarfile.ReadError as error:
        raise DataError(f"{path} is not an uncompressed tar file ({error}); unpack or fetch it again") from error
    # tarfile takes garbage after the first member for the end; a whole archive says so with a block of zeros.
    end = 0
    if members:
        end = members[-1].offset_data + -(-members[-1].size // _BLOCK) * _BLOCK
    file.seek(end)
    whole = file.read(_BLOCK) == bytes(_BLOCK)
    return members, None if whole else f"it is cut off or damaged near byte {end}"


def _groups(members: Sequence[tarfile.TarInfo]) -> Iterator[tuple[str, dict[str, list[int]]]]:
    """Neighbouring members with one key: (key, {kind: [offset, size]})."""
    current, places = None, {}
    for member in members:
        folder, _, file_name = member.name.rpartition("/")
        stem, _, suffix = file_name.partition(".")
        kind = _KINDS.get(suffix.lower())
        if not member.isfile() or not stem or kind is None:
            continue
        key = f"{folder}/{stem}" if folder else stem
        if key != current or kind in places:
            if current is not None:
                yield current, places
            current, places = key, {}
        places[kind] = [member.offset_data, member.size]
    if current is not None:
        yield current, places


def _entry(file: BinaryIO, key: str, places: dict[str, list[int]], options: SampleOptions) -> Entry:
    entry: Entry = {"key": key, **places, "serves": []}
    if "image" in places:
        try:
            text = read_member_text(
                read_member(file, places.get("json")), read_member(file, places.get("txt")), options
            )
            entry["serves"] = [branch for branch in BRANCHES if text.serves(branch)]
        except ValueError as error:
            entry |= {"serves": BRANCHES, "broken": str(error)}
    return entry
