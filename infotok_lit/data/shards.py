"""Images with text in WebDataset tar shards, with random access to every sample.

A sample is the members of a tar that share a name up to its first dot: an image (.jpg, .jpeg, .png, .webp), with
.json (any layout of `rows.py`) and/or .txt (a caption). Where no member of such a name has one of these suffixes, the
names go on up to their last dot, so that `IMG_1.2.jpg` and `IMG_1.2.json` are a sample too.

Each shard is scanned once. Where its samples lie is kept in a cache file.
"""

import contextlib
import hashlib
import json
import logging
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from infotok_lit.batch import BRANCHES, BrokenSampleError
from infotok_lit.data.fetch import default_cache, expand_braces, local_copy, locked, replacing
from infotok_lit.data.image_file import MAX_PIXELS
from infotok_lit.data.image_text import DESCRIBE_QUESTIONS, ImageTextSource, SampleOptions
from infotok_lit.data.rows import PackedRows, RowText, read_json
from infotok_lit.errors import DataError

log = logging.getLogger(__name__)

Entry = dict[str, Any]
"""One sample of a shard: "key"; "image", "json" and "txt": [offset, size] of its members; "serves": the branches it
serves; "broken": why it cannot be read, if so."""

_VERSION = 2
_BLOCK = 512
_KINDS = {"jpg": "image", "jpeg": "image", "png": "image", "webp": "image", "json": "json", "txt": "txt"}


class ImageTextShards(ImageTextSource):
    """Samples in tar files: local, behind a URL, or written by a command."""

    def __init__(
        self,
        shards: str | list[str],
        cache: str | None = None,
        caption_key: str = "caption",
        first_turn_only: bool = False,
        describe_questions: list[str] | None = None,
        min_side: int = 9,
        max_aspect: float = 10.0,
        max_pixels: int = MAX_PIXELS,
        random_crop: bool = True,
        jpeg_draft: int | None = None,
    ) -> None:
        """Fetch and index the shards, or find their index in the cache.

        Args:
            shards: One or more paths, URLs (http, https, s3 and what else fsspec knows) or `pipe:COMMAND`; each may
                hold brace patterns such as `shard-{000000..000009}.tar`. A command is run by the shell, and is taken
                from here alone: whoever writes this argument can run anything. What is not a local file is copied into
                the cache whole, and kept there.
            cache: The folder for fetched shards and indices; default: infotok_lit/shards in the user's cache folder.
            caption_key: The key that holds a caption in .json members.
            first_turn_only: Use only the first exchange of a LLaVA conversation; default: any of them, at random.
            describe_questions: What is asked where the answer is a caption; default: a few paraphrases.
            min_side: Images with a smaller side, in pixels, are broken samples.
            max_aspect: Images whose long side is this many short sides or more are broken samples.
            max_pixels: Images with more pixels are broken samples; they are not decoded.
            random_crop: A square to generate is cut at another place in each epoch, if the base model leaves it open;
                false takes the middle.
            jpeg_draft: JPEGs are decoded to a half, a quarter or an eighth of their sides if these keep so many pixels:
                faster for large photographs, and the pixels differ slightly. Null decodes them whole.
        """
        options = SampleOptions(
            caption_key=caption_key,
            first_turn_only=first_turn_only,
            describe_questions=DESCRIBE_QUESTIONS if describe_questions is None else tuple(describe_questions),
            min_side=min_side,
            max_aspect=max_aspect,
            max_pixels=max_pixels,
            random_crop=random_crop,
            jpeg_draft=jpeg_draft,
        )
        folder = default_cache() if cache is None else Path(cache)
        folder.mkdir(parents=True, exist_ok=True)
        patterns = [shards] if isinstance(shards, str) else shards
        self._addresses = [address for pattern in patterns for address in expand_braces(pattern)]
        self._paths = [local_copy(address, folder) for address in self._addresses]
        rows = [
            {**entry, "shard": number}
            for number, path in enumerate(self._paths)
            for entry in shard_index(path, folder, options)
        ]
        label = ", ".join(patterns)
        if not rows:
            raise DataError(f"the shards hold no samples: {label or 'none were given'}")
        super().__init__(label, PackedRows(rows), [row["serves"] for row in rows], options)

    def _open(self, row: int) -> tuple[str, Path | bytes, RowText]:
        entry = self._rows[row]
        name = self._image_name(row)
        if "broken" in entry:
            raise BrokenSampleError(f"{name}: {entry['broken']}")
        # One handle per sample: forked workers must not share a file position, and opening takes microseconds.
        with self._paths[entry["shard"]].open("rb") as file:
            image, json_member, txt_member = (_read_member(file, entry.get(kind)) for kind in ("image", "json", "txt"))
        try:
            return name, image, _read_text(json_member, txt_member, self._options)
        except ValueError as error:
            raise BrokenSampleError(f"{name}: {error}") from error

    def _image_name(self, row: int) -> str:
        entry = self._rows[row]
        return f"{self._addresses[entry['shard']]}: {entry['key']}"


# Where each sample lies


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
    index = _cached(target)
    if index is None:
        with locked(cache / "index"):
            index = _cached(target)
            if index is None:
                index = _scan(path, options)
                content = json.dumps(index).encode()
                with replacing(target) as file:
                    file.write(_digest(content) + b"\n" + content)
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


def _cached(target: Path) -> dict[str, Any] | None:
    """The index in a cache file; None if there is none, or not as it was written."""
    if not target.exists():
        return None
    digest, _, content = target.read_bytes().partition(b"\n")
    if digest != _digest(content):
        log.warning("the index %s is damaged; its shard is scanned again", target)
        return None
    return json.loads(content)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _scan(path: Path, options: SampleOptions) -> dict[str, Any]:
    log.info("indexing %s", path)
    size = path.stat().st_size
    with path.open("rb") as file:
        members, damage = _members(file, size)
        if not members and (damage or not size):
            raise DataError(f"{path} is not an uncompressed tar file; unpack or fetch it again")
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
            text = _read_text(_read_member(file, places.get("json")), _read_member(file, places.get("txt")), options)
            entry["serves"] = [branch for branch in BRANCHES if text.serves(branch)]
        except ValueError as error:
            entry |= {"serves": BRANCHES, "broken": str(error)}
    return entry


def _read_text(json_member: bytes | None, txt_member: bytes | None, options: SampleOptions) -> RowText:
    """The text of a sample from its .json and .txt members; ValueError if the .json is malformed."""
    row = {} if json_member is None else read_json(json_member)
    if not isinstance(row, dict):
        raise ValueError("its .json member must be a JSON object")
    annotated = options.read_text(row)
    plain = options.read_text({options.caption_key: (txt_member or b"").decode(errors="replace")})
    return RowText(tuple(dict.fromkeys(annotated.captions + plain.captions)), annotated.questions)


def _read_member(file: BinaryIO, place: Sequence[int] | None) -> bytes | None:
    """The bytes at [offset, size] of an open shard; None where there is no such member."""
    if place is None:
        return None
    file.seek(place[0])
    return file.read(place[1])
