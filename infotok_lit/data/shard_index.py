"""Where each sample of a WebDataset tar shard lies, found in one scan and kept in a cache file.

A sample is the members of a tar that share a name up to its first dot: an image (.jpg or as in _IMAGES), with
.json (any layout of `rows.py`) and/or .txt (a caption). Where no member of such a name has one of these suffixes, the
names go on up to their last dot, so that `IMG_1.2.jpg` and `IMG_1.2.json` are a sample too.
"""

import codecs
import contextlib
import hashlib
import json
import logging
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from infotok_lit.batch import BRANCHES
from infotok_lit.data.fetch import locked
from infotok_lit.data.image_text import SampleOptions
from infotok_lit.data.rows import RowText, read_json
from infotok_lit.errors import DataError
from infotok_lit.files import write_whole

log = logging.getLogger(__name__)

Entry = dict[str, Any]
"""One sample of a shard: "key"; "image", "json" and "txt": [offset, size] of its members; "serves": the branches it
serves; "broken": why it cannot be read, if so."""

_VERSION = 4
_BLOCK = 512
_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "avif")
"""Suffixes of the formats that `image_file.py` reads."""
_KINDS = dict.fromkeys(_IMAGES, "image") | {"json": "json", "txt": "txt"}


class NoTarError(DataError):
    """A file that is no tar at all."""


def shard_index(path: Path, cache: Path, options: SampleOptions) -> list[Entry]:
    """The samples of a shard, in order; scanned if the cache has no index of this path, size and time of change.

    A shard that is cut off or damaged is indexed up to there, with a warning; a sample that was cut through is
    listed as broken.

    Raises:
        NoTarError: The file is no uncompressed tar.
    """
    status = path.stat()
    state = [status.st_size, status.st_mtime_ns]
    # One index for a path, whatever has stood there: a stream fetches a shard again and again.
    identity = [_VERSION, str(path.resolve()), options.caption_key, options.first_turn_only]
    target = cache / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}.index.json"
    index = _cached(target, state)
    if index is None:
        with locked(target):
            index = _cached(target, state)
            if index is None:
                index = {"state": state, **_scan(path, options)}
                content = json.dumps(index).encode()
                write_whole(target, _digest(content) + b"\n" + content)
    if index["damage"]:
        log.warning("%s: %s; its %d samples before that are used", path, index["damage"], len(index["entries"]))
    if index["ignored"]:
        log.warning(
            "%s: %d members are part of no sample, because their names have several dots (the first: %s)",
            path,
            len(index["ignored"]),
            index["ignored"][0],
        )
    return index["entries"]


def _cached(target: Path, state: list[int]) -> dict[str, Any] | None:
    """The index in a cache file; None if there is none, not as it was written, or of a shard in another state."""
    if not target.exists():
        return None
    digest, _, content = target.read_bytes().partition(b"\n")
    if digest != _digest(content):
        log.warning("the index %s is damaged; its shard is scanned again", target)
        return None
    index = json.loads(content)
    return index if index["state"] == state else None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _scan(path: Path, options: SampleOptions) -> dict[str, Any]:
    log.info("indexing %s", path)
    size = path.stat().st_size
    with path.open("rb") as file:
        members, damage = _members(file, size)
        if not members and (damage or not size):
            raise NoTarError(f"{path} is not an uncompressed tar file; unpack or fetch it again")
        ignored: list[str] = []
        entries = [_entry(file, size, key, found, options) for key, found in _samples(members, ignored)]
    if damage and entries and not entries[-1]["serves"]:
        # Its other members may have been lost.
        entries[-1] |= {"serves": BRANCHES, "broken": "the shard is cut off inside this sample"}
    return {"damage": damage, "ignored": ignored, "entries": entries}


def _members(file: BinaryIO, size: int) -> tuple[list[tarfile.TarInfo], str | None]:
    """The members of a tar, or of several one after another, up to the first damage, and what the damage is."""
    members: list[tarfile.TarInfo] = []
    end = 0
    while end < size and (start := _after_zeros(file, end)) is not None:
        known = len(members)
        # tarfile takes garbage after the first member for the end; a whole archive says so with blocks of zeros.
        if not members or start > end:
            file.seek(start)
            # On forged headers it raises almost anything, RecursionError and OverflowError among it.
            with contextlib.suppress(Exception), tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:  # not list(tar): what came before the damage is kept
                    if member.size < 0:
                        break  # a forged header, which would lead tarfile round and round
                    members.append(member)
                    end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
        if len(members) == known:
            return members, f"it is cut off or damaged near byte {start}"
    return members, None if end < size else f"it is cut off or damaged near byte {end}"


def _after_zeros(file: BinaryIO, start: int) -> int | None:
    """Where the first block begins that is not all zeros, from `start` on; None if there is none."""
    file.seek(start)
    while block := file.read(_BLOCK):
        if block.strip(b"\0"):
            return start
        start += _BLOCK
    return None


def _samples(
    members: Sequence[tarfile.TarInfo], ignored: list[str]
) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Neighbouring members of one sample: (key, {kind: member}); names that fit no sample are added to `ignored`."""
    files = [member for member in members if member.isfile() and not member.name.rpartition("/")[2].startswith(".")]
    for _, group in groupby(files, key=lambda member: _split(member.name, first=True)[0]):
        neighbours = list(group)
        is_plain = any(_split(member.name, first=True)[1] in _KINDS for member in neighbours)
        current: str | None = None
        found: dict[str, tarfile.TarInfo] = {}
        for member in neighbours:
            key, suffix = _split(member.name, first=is_plain)
            if suffix not in _KINDS:
                if _split(member.name, first=False)[1] in _KINDS:
                    ignored.append(member.name)
                continue
            kind = _KINDS[suffix]
            if current is not None and (key != current or kind in found):
                yield current, found
                found = {}
            current = key
            found[kind] = member
        if current is not None:
            yield current, found


def _split(name: str, first: bool) -> tuple[str, str]:
    """A member's name -> what comes before the first (or last) dot of its last part, and the suffix in lower case."""
    folder, slash, file_name = name.rpartition("/")
    stem, _, suffix = file_name.partition(".") if first else file_name.rpartition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _entry(file: BinaryIO, size: int, key: str, members: dict[str, tarfile.TarInfo], options: SampleOptions) -> Entry:
    places = {kind: [member.offset_data, member.size] for kind, member in members.items()}
    entry: Entry = {"key": key, **places, "serves": []}
    if any(sum(place) > size for place in places.values()):
        return entry | {"serves": BRANCHES, "broken": "the shard is cut off inside this sample"}
    if any(member.issparse() for member in members.values()):
        return entry | {"serves": BRANCHES, "broken": "it is stored as a sparse file, which is not read"}
    if "image" in places:
        try:
            text = read_text(read_member(file, places.get("json")), read_member(file, places.get("txt")), options)
            entry["serves"] = [branch for branch in BRANCHES if text.serves(branch)]
        except ValueError as error:
            entry |= {"serves": BRANCHES, "broken": str(error)}
    return entry


def read_text(json_member: bytes | None, txt_member: bytes | None, options: SampleOptions) -> RowText:
    """The text of a sample from its .json and .txt members; ValueError if one of them is malformed."""
    row = {} if json_member is None else read_json(json_member)
    if not isinstance(row, dict):
        raise ValueError("its .json member must be a JSON object")
    annotated = options.read_text(row)
    plain = options.read_text({options.caption_key: _decoded(txt_member or b"")})
    return RowText(tuple(dict.fromkeys(annotated.captions + plain.captions)), annotated.questions)


def _decoded(txt_member: bytes) -> str:
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        return txt_member.decode("utf-16" if txt_member.startswith(marks) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"its .txt member is no text in UTF-8 ({error.reason}): save it as UTF-8") from error


def read_member(file: BinaryIO, place: Sequence[int] | None) -> bytes | None:
    """The bytes at [offset, size] of an open shard; None where there is no such member."""
    if place is None:
        return None
    file.seek(place[0])
    return file.read(place[1])
