"""Latents that a frozen autoencoder made once: `cache` writes them, and training reads them in its place.

A folder holds `latents.json`, which says what made them, and shards `latents-*.safetensors` with the tensors "key"
(n, 16) uint8 and "encoded" (n, c, h, w) float32. An image is known by a digest of the very pixels that the autoencoder
is given: size, crop and resampling are part of it, an edited file is another image, and one that several rows share is
kept once.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from infotok_lit.batch import Branch, BrokenSampleError, Encoding, Source
from infotok_lit.errors import DataError, SettingsError
from infotok_lit.files import write_json, write_whole

KEY_BYTES = 16
_ABOUT = "latents.json"
_SHARD_SECONDS = 60
"""After so long a shard is written, full or not: more is not lost if the machine stops."""
_EPOCHS = ((7, 1862), (7, 307))
"""Seeds of two draws of a sample. Their first random numbers are near 0 and near 1: among a few they choose others."""
_MEANINGS = {
    "family": "the family is {}",
    "image_size": "the images have {} pixels a side",
    "autoencoder": "the autoencoder is {}",
    "digest": "the autoencoder's settings and weights have the digest {:.12}",
    "branches": "the branches are {}",
}


def pixel_key(pixels: Tensor) -> bytes:
    """16 bytes that name an image (3, height, width) by its numbers."""
    content = pixels.numpy()
    return hashlib.blake2b(
        f"{content.dtype} {content.shape}".encode() + content.tobytes(), digest_size=KEY_BYTES
    ).digest()


class Latents:
    """The latents in a folder, for any worker process to look up.

    Raises:
        SettingsError: there are none, or another autoencoder or geometry than `encoding` made them.
        DataError: a file is damaged; the message names it.
    """

    def __init__(self, folder: Path, encoding: Encoding) -> None:
        self.folder = folder
        self.encoding = encoding
        self._check(encoding)
        self._shards = sorted(folder.glob("latents-*.safetensors"))
        keys = [_read(shard, "key").numpy() for shard in self._shards]
        counts = [len(found) for found in keys]
        numbers, rows = np.repeat(np.arange(len(keys)), counts), [np.arange(count) for count in counts]
        halves = np.concatenate([np.zeros((0, KEY_BYTES), np.uint8), *keys]).view(np.uint64)
        # Sorted arrays, not a dict: these stay shared between forked workers.
        order = np.argsort(halves[:, 0], kind="stable")
        self._halves = halves[order]
        self._places = np.stack([numbers, np.concatenate([np.zeros(0, np.int64), *rows])], axis=1)[order]

    def __len__(self) -> int:
        return len(self._halves)

    def __contains__(self, key: bytes) -> bool:
        return self._place(key) is not None

    def look_up(self, pixels: Tensor, names: Sequence[str]) -> Tensor:
        """(B, 3, height, width) -> (B, c, h, w).

        Args:
            names: of the images, for the message.

        Raises:
            DataError: one of them is not there.
        """
        found = []
        for image, name in zip(pixels, names, strict=True):
            place = self._place(pixel_key(image))
            if place is None:
                raise DataError(
                    f"{name}: the latents in {self.folder} have none of this image as it is now; run `cache` again, "
                    "which adds what is missing (an image that is cropped at random has no latent: set random_crop: "
                    "false)"
                )
            number, row = place
            found.append(_read(self._shards[number], "encoded", row))
        return torch.stack(found)

    def _place(self, key: bytes) -> tuple[int, int] | None:
        first, second = np.frombuffer(key, np.uint64)
        low, high = (int(np.searchsorted(self._halves[:, 0], first, side)) for side in ("left", "right"))
        for place in range(low, high):
            if self._halves[place, 1] == second:
                return int(self._places[place, 0]), int(self._places[place, 1])
        return None

    def _check(self, encoding: Encoding) -> None:
        about = self.folder / _ABOUT
        if not about.is_file():
            raise SettingsError(f"there are no latents in {self.folder}: make them with `cache --out {self.folder}`")
        wanted = _primitives(encoding)
        try:
            found = json.loads(about.read_bytes())
            differing = [name for name in wanted if found[name] != wanted[name]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{about} does not say what made the latents: make them anew in another folder") from error
        if differing:
            was, now = (
                "; ".join(_MEANINGS[name].format(values[name]) for name in differing) for values in (found, wanted)
            )
            raise SettingsError(
                f"the latents in {self.folder} are stale: when they were made, {was}; now {now}. Make new ones in "
                "another folder with `cache`, or leave out data.latents"
            )


class LatentWriter:
    """Adds latents to a folder, which goes on from what is there; a shard appears whole or not at all.

    Several processes may write into one folder.
    """

    def __init__(self, folder: Path, encoding: Encoding, shard_size: int) -> None:
        """
        Args:
            folder: Made if it is not there.
            encoding: What makes the latents.
            shard_size: Images per file, at most.

        Raises:
            SettingsError: the folder has the latents of another encoding, or holds something else.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _ABOUT).exists():
            # What is hidden, a process that was stopped left half written; another one may be writing this file now.
            if any(not path.name.startswith(".") and path.name != _ABOUT for path in folder.iterdir()):
                raise SettingsError(f"{folder} holds something else than latents: name an empty folder, or a new one")
            write_json(folder / _ABOUT, _primitives(encoding))
        self._present = Latents(folder, encoding)
        self._folder = folder
        self._shard_size = shard_size
        self._added: set[bytes] = set()
        self._waiting: list[tuple[bytes, Tensor]] = []
        self._since = time.monotonic()

    def __contains__(self, key: bytes) -> bool:
        return key in self._added or key in self._present

    def __enter__(self) -> "LatentWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Write what is waiting, whatever happened: it is good."""
        self._write()

    def add(self, keys: Sequence[bytes], encoded: Tensor) -> None:
        """Latents (n, c, h, w) of images with these keys."""
        self._waiting += zip(keys, encoded.float().cpu(), strict=True)
        self._added.update(keys)
        if len(self._waiting) >= self._shard_size or time.monotonic() - self._since > _SHARD_SECONDS:
            self._write()

    def _write(self) -> None:
        if self._waiting:
            keys = torch.from_numpy(np.frombuffer(b"".join(key for key, _ in self._waiting), np.uint8).copy())
            content = {
                "key": keys.view(-1, KEY_BYTES),
                "encoded": torch.stack([latent for _, latent in self._waiting]),
            }
            name = hashlib.sha256(keys.numpy().tobytes()).hexdigest()[:24]
            write_whole(self._folder / f"latents-{name}.safetensors", save(content))
        self._waiting, self._since = [], time.monotonic()


class ImageToEncode(NamedTuple):
    """An image as an autoencoder is given it, or why there is none."""

    key: bytes
    pixels: Tensor | None
    """(3, height, width)."""
    broken: str | None = None


class ImagesToEncode(Dataset):
    """The images of one branch of a source, once each, as a model's processor prepares them.

    Raises, where an item is taken:
        SettingsError: its pixels are not the same in each epoch.
    """

    def __init__(
        self, source: Source, branch: Branch, indices: Sequence[int], build: Callable[[Sequence[Any]], Any]
    ) -> None:
        """
        Args:
            build: The method of the processor for the branch.
        """
        self._source = source
        self._branch = branch
        self._indices = indices
        self._build = build

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, item: int) -> ImageToEncode:
        index = self._indices[item]
        try:
            samples = [self._source.sample(self._branch, index, np.random.default_rng(seed)) for seed in _EPOCHS]
            if samples[0].name != samples[1].name:
                raise SettingsError(
                    f"{samples[0].name}: its shard holds more samples than are assumed, and each epoch draws others of "
                    "them: give the data's settings the true numbers, `sizes`"
                )
            pixels, again = (self._build([sample]).pixel_values[0] for sample in _farthest_crops(samples))
        except (BrokenSampleError, OSError) as error:
            return ImageToEncode(b"", None, str(error))
        if not torch.equal(pixels, again):
            raise SettingsError(
                f"{samples[0].name} is cropped at random in each epoch, and a cache would keep one crop: set "
                "random_crop: false in the data's settings"
            )
        return ImageToEncode(pixel_key(pixels), pixels)


def _farthest_crops(samples: Sequence[Any]) -> Sequence[Any]:
    """Two draws of a sample, cropped at its ends if they are cropped at random: near ones may have the same pixels."""
    if getattr(samples[0], "crop_offset", None) == getattr(samples[1], "crop_offset", None):
        return samples
    return [replace(sample, crop_offset=offset) for sample, offset in zip(samples, (0.0, 0.999), strict=True)]


def _primitives(encoding: Encoding) -> dict[str, Any]:
    return asdict(encoding) | {"branches": list(encoding.branches)}


def _read(shard: Path, name: str, row: int | None = None) -> Tensor:
    """A tensor of a shard, or a row of it. The file is mapped anew each time, which takes a tenth of a millisecond."""
    try:
        with safe_open(shard, framework="pt") as file:
            return file.get_tensor(name) if row is None else file.get_slice(name)[row]
    except (SafetensorError, OSError) as error:
        raise DataError(f"the latents in {shard} cannot be read ({error}): delete it and run `cache` again") from error
