"""Images with text in WebDataset tar shards: local ones as one whole, remote ones as a stream.

Where the samples of a shard lie is `shard_index.py`'s; what brings a shard here is `fetch.py`'s.
"""

import copy
import hashlib
import json
import logging
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from infotok_lit.batch import Branch, BrokenSampleError, Sample, Source
from infotok_lit.data.fetch import default_cache, expand_braces, is_here, is_remote, local_copy, reason_of
from infotok_lit.data.image_text import ImageTextSource, SampleOptions
from infotok_lit.data.rows import PackedRows, RowText
from infotok_lit.data.shard_index import NoTarError, read_member, read_text, shard_index
from infotok_lit.errors import DataError, SettingsError

log = logging.getLogger(__name__)

_OPEN = 64
"""So many indices of streamed shards a process keeps in memory."""
_ATTEMPTS_IN_SHARD = 20
"""So often a broken sample is replaced by one of its shard; then by any, as all of a shard may be broken."""


class LocalShards(ImageTextSource):
    """The samples of tar files that are here."""

    def __init__(self, label: str, paths: Sequence[Path], names: Sequence[str], cache: Path, options: SampleOptions):
        """
        Args:
            label: What messages call them all.
            paths: The files.
            names: What messages call each.
            cache: The folder for indices.
            options: How rows become samples.
        """
        self._paths = paths
        self._names = names
        rows = [
            {**entry, "shard": number}
            for number, path in enumerate(paths)
            for entry in shard_index(path, cache, options)
        ]
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
            image, json_member, txt_member = (read_member(file, entry.get(kind)) for kind in ("image", "json", "txt"))
        try:
            return name, image, read_text(json_member, txt_member, self._options)
        except ValueError as error:
            raise BrokenSampleError(f"{name}: {error}") from error

    def _image_name(self, row: int) -> str:
        entry = self._rows[row]
        return f"{self._names[entry['shard']]}: {entry['key']}"


@dataclass(eq=False)
class ImageTextShards(SampleOptions, Source):
    """Samples in tar files: local, behind a URL, or written by a command.

    If all are local, they are indexed before the start, and a pass takes their samples in any order. If not, they are
    streamed: a shard is fetched when its turn comes, the next one meanwhile, and of its samples are mixed those of some
    shards around it. What a stream draws depends on its place alone, never on what is in the cache.

    Args:
        shards: One or more paths, URLs (http, https, s3 and what else fsspec knows) or `pipe:COMMAND`; each may
            hold brace patterns such as `shard-{000000..000009}.tar`. A command is run by the shell, and is taken
            from here alone: whoever writes this argument can run anything.
        cache: The folder for fetched shards and indices; default: infotok_lit/shards in the user's cache folder.
        cache_gb: Of a stream: the most that fetched shards take in the cache; those not used for longest go.
        mixed_shards: Of a stream: over so many neighbouring shards its samples are shuffled.
        lanes: Of a stream: into so many the shards are dealt; with as many as there are processes, each process
            reads shards of its own.
        sizes: Of a stream: a JSON file, {"name.tar": samples, ...}, at a path or URL, with each shard's file name;
            default: all shards are taken to be as large as the first.
    """

    shards: str | list[str]
    cache: str | None = None
    cache_gb: float = 100.0
    mixed_shards: int = 4
    lanes: int = 1
    sizes: str | None = None

    def __post_init__(self) -> None:
        if self.cache_gb <= 0 or self.mixed_shards < 1 or self.lanes < 1:
            raise SettingsError("cache_gb must be above 0, and mixed_shards and lanes at least 1")
        self._options = self.sample_options()
        self._cache = default_cache() if self.cache is None else Path(self.cache)
        self._cache.mkdir(parents=True, exist_ok=True)
        self._limit = round(self.cache_gb * 1e9)
        patterns = [self.shards] if isinstance(self.shards, str) else self.shards
        self._label = ", ".join(patterns)
        self._addresses = [address for pattern in patterns for address in expand_braces(pattern)]
        self._opened: dict[int, LocalShards] = {}
        self._fetching: threading.Thread | None = None
        self._asked: str | None = None
        self._sizes: dict[Branch, np.ndarray] = {}
        self._whole: LocalShards | None = None
        if any(is_remote(address) for address in self._addresses):
            self._assume_sizes(None if self.sizes is None else _read_sizes(self.sizes))
        else:
            paths = [local_copy(address, self._cache) for address in self._addresses]
            self._whole = LocalShards(self._label, paths, self._addresses, self._cache, self._options)
            self._whole.report()

    def _assume_sizes(self, known: dict[str, int] | None) -> None:
        first = self._part(0)
        for branch in ("understanding", "generation"):
            count = first.count(branch)
            if known is None:
                sizes = [count] * len(self._addresses)
            else:
                each = [_size_of(address, known) for address in self._addresses]
                sizes = [max(1, round(size * count / len(first))) if count else 0 for size in each]
            self._sizes[branch] = np.array(sizes, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._whole) if self._whole is not None else int(max(sizes.sum() for sizes in self._sizes.values()))

    def branch_length(self, branch: Branch) -> int:
        """How many samples serve a branch, or of a stream, are taken to do so; DataError if none does."""
        if self._whole is not None:
            return self._whole.branch_length(branch)
        count = int(self._sizes[branch].sum())
        # Only to say what is missing: asked for each sample, the shard would never leave the cache.
        return count or self._part(0).branch_length(branch)

    def sample(self, branch: Branch, index: int, rng: np.random.Generator) -> Sample:
        """The index-th sample of a branch; `rng` chooses the text and the crop. Its shard is fetched if need be."""
        if self._whole is not None:
            return self._whole.sample(branch, index, rng)
        number, place = self._locate(branch, index)
        before = rng.bit_generator.state
        while True:
            try:
                return self._sample_of(number, branch, place, rng)
            except FileNotFoundError:  # another process made room in the cache just now
                rng.bit_generator.state = before

    def _sample_of(self, number: int, branch: Branch, place: int, rng: np.random.Generator) -> Sample:
        part = self._part(number)
        assumed, there = int(self._sizes[branch][number]), part.count(branch)
        if not there:
            raise BrokenSampleError(f"{self._addresses[number]}: none of its samples serves {branch}")
        # Where there are more samples than were assumed, each pass takes others of them; where fewer, some again.
        row = (place + assumed * int(rng.integers(-(-there // assumed)))) % there
        return part.sample(branch, row, rng)

    def order(self, branch: Branch, rng: np.random.Generator, block: int) -> np.ndarray:
        """The order (length,) of one pass: any, or of a stream, shard after shard with their neighbours mixed."""
        if self._whole is not None:
            return super().order(branch, rng, block)
        return streamed_order(self._sizes[branch], rng, self.mixed_shards, self.lanes, block)

    def lookahead(self, branch: Branch, block: int) -> int:
        """Of a stream: a shard's length, after which the next one is needed."""
        if self._whole is not None:
            return 0
        return -(-int(self._sizes[branch].max()) // block) * block * self.lanes

    def prefetch(self, branch: Branch, index: int) -> None:
        """Begin to fetch the shard of a sample, unless one is being fetched. An error is left to whoever reads it."""
        address = self._addresses[self._locate(branch, index)[0]]
        busy = self._fetching is not None and self._fetching.is_alive()
        if not busy and address != self._asked and not is_here(address, self._cache):
            self._asked = address
            self._fetching = threading.Thread(target=self._fetch, args=(address,), daemon=True)
            self._fetching.start()

    def replacement(self, branch: Branch, index: int, attempt: int, rng: np.random.Generator) -> int:
        """Any sample; of a stream, one of the same shard, as another shard would have to be fetched for it."""
        if self._whole is not None or attempt > _ATTEMPTS_IN_SHARD:
            return super().replacement(branch, index, attempt, rng)
        number, place = self._locate(branch, index)
        return index - place + int(rng.integers(self._sizes[branch][number]))

    def split(self, share: float) -> tuple[Source, Source]:
        """All but a share of the images, and that share; of a stream, whole shards, chosen by their addresses."""
        if self._whole is not None:
            return self._whole.split(share)
        order = sorted(self._addresses, key=lambda address: hashlib.sha256(address.encode()).digest())
        if len(order) < 2:
            raise SettingsError(f"{self._label}: a stream of one shard cannot be split; two are needed at least")
        kept = set(order[: min(max(1, round(share * len(order))), len(order) - 1)])
        return self._only([a not in kept for a in self._addresses]), self._only([a in kept for a in self._addresses])

    def _only(self, chosen: list[bool]) -> "ImageTextShards":
        part = copy.copy(self)
        part._addresses = [address for address, is_in in zip(self._addresses, chosen, strict=True) if is_in]
        part._sizes = {branch: sizes[chosen] for branch, sizes in self._sizes.items()}
        part._opened, part._asked = {}, None
        return part

    def _locate(self, branch: Branch, index: int) -> tuple[int, int]:
        ends = np.cumsum(self._sizes[branch])
        if not 0 <= index < ends[-1]:
            raise IndexError(f"sample {index} of {ends[-1]}")
        number = int(np.searchsorted(ends, index, side="right"))
        return number, index - int(ends[number] - self._sizes[branch][number])

    def _part(self, number: int) -> LocalShards:
        """A shard that is here, fetched if it is not."""
        address = self._addresses[number]
        path = local_copy(address, self._cache, self._limit)
        if number not in self._opened:
            try:
                part = LocalShards(address, [path], [address], self._cache, self._options)
            except NoTarError as error:
                if not is_remote(address):
                    raise
                path.unlink(missing_ok=True)
                raise DataError(f"what {address} gave is no uncompressed tar; it is not kept") from error
            while len(self._opened) >= _OPEN:
                self._opened.pop(next(iter(self._opened)))
            self._opened[number] = part
            self._compare(number, part)
        return self._opened[number]

    def _compare(self, number: int, part: LocalShards) -> None:
        for branch, sizes in self._sizes.items():
            if part.count(branch) != sizes[number]:
                log.warning(
                    "%s: %d samples serve %s where %d were assumed, so in a pass %s; `sizes` tells the true numbers",
                    self._addresses[number],
                    part.count(branch),
                    branch,
                    sizes[number],
                    "some are drawn again" if part.count(branch) < sizes[number] else "some are not drawn",
                )

    def _fetch(self, address: str) -> None:
        try:
            shard_index(local_copy(address, self._cache, self._limit), self._cache, self._options)
        except (DataError, OSError) as error:
            log.info("while fetching ahead: %s", error)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fetching": None}


def streamed_order(sizes: np.ndarray, rng: np.random.Generator, mixed: int, lanes: int, block: int) -> np.ndarray:
    """A permutation (length,) of the samples of shards that reads few shards at a time.

    The shards, in a random order, are dealt out to lanes. A lane's sample at shard number q comes at the time q + u, u
    uniform in [0, mixed): at any time it draws from `mixed` neighbouring shards. Lanes alternate in blocks.

    Args:
        sizes: (shards,): how many samples each holds; sample i is the i-th over all shards, in their own order.
        block: samples that a lane gives at a time.
    """
    starts = np.cumsum(sizes) - sizes
    shards = rng.permutation(len(sizes))
    found, turns = [], []
    for lane in range(lanes):
        own = shards[lane::lanes]
        indices = np.concatenate([np.zeros(0, np.int64), *(np.arange(sizes[s]) + starts[s] for s in own)])
        times = np.repeat(np.arange(len(own)), sizes[own]) + mixed * rng.random(len(indices))
        found.append(indices[np.argsort(times, kind="stable")])
        turns.append(np.arange(len(indices)) // block)
    return np.concatenate(found)[np.argsort(np.concatenate(turns), kind="stable")]


def _read_sizes(address: str) -> dict[str, int]:
    """{"name.tar": samples}; DataError for what is not."""
    try:
        with fsspec.open(address, "rb") as file:
            found = json.load(file)
    except Exception as error:  # every protocol of fsspec has its own errors
        raise DataError(f"sizes: {address} cannot be read: {reason_of(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(size, int) and size > 0 for size in found.values()):
        raise DataError(f'sizes: {address} must be a JSON object such as {{"name.tar": 1000}}')
    return found


def _size_of(address: str, known: dict[str, int]) -> int:
    """That of a file, or of the only file whose name is a word of a command or a part of a URL."""
    names = {name for name in re.split(r"[\s/?&=\"'|;]+", address) if name in known}
    if len(names) != 1:
        raise DataError(f"sizes: no name in it is that of the shard {address}")
    return known[names.pop()]
