"""Clips to train on: folders and tar shards of video files or of frames, cropped and turned at random."""

import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from infotok_lit.batch import BrokenSampleError
from infotok_lit.data.fetch import default_cache, expand_braces, local_copy
from infotok_lit.data.image_file import read_image
from infotok_lit.errors import DataError, MissingFileError, SettingsError
from infotok_lit.video.video_file import (
    FRAME_LIMITS,
    FRAME_SUFFIXES,
    VIDEO_SUFFIXES,
    frame_files,
    frame_order,
    read_part,
)


@dataclass(frozen=True)
class Clip:
    """Some frames of a video."""

    frames: np.ndarray
    """uint8 (T, H, W, 3) RGB."""
    name: str
    """Where it comes from, for logs and errors."""


class ClipSource(ABC):
    """Videos. A clip is a pure function of its arguments: no hidden state, any worker, any order."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def clip(self, index: int, frames: int, rng: np.random.Generator) -> Clip:
        """`frames` frames of the index-th video, from a place that `rng` draws; BrokenSampleError if it has none."""


@dataclass(frozen=True)
class _Piece:
    """A file, or a part of one."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        # One handle per read: forked workers must not share a file position.
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(-1 if self.size is None else self.size)


@dataclass(frozen=True)
class _Video:
    """A video file (one piece), or its frames in order."""

    name: str
    pieces: tuple[_Piece, ...]
    is_file: bool


class _VideoList(ClipSource):
    """What folders and shards have in common."""

    def __init__(self, videos: Sequence[_Video]) -> None:
        self._videos = list(videos)

    def __len__(self) -> int:
        return len(self._videos)

    def clip(self, index: int, frames: int, rng: np.random.Generator) -> Clip:
        """Consecutive frames of the index-th video; BrokenSampleError if it has too few, or is damaged."""
        video, start = self._videos[index], float(rng.random())
        if video.is_file:
            (piece,) = video.pieces
            source = piece.path if piece.size is None else piece.read()
            return Clip(read_part(source, start, frames, video.name), video.name)
        room = len(video.pieces) - frames
        if room < 0:
            raise BrokenSampleError(f"{video.name}: it has {len(video.pieces)} frames, {frames} are needed")
        first = int(start * (room + 1))
        chosen = video.pieces[first : first + frames]
        images = [np.asarray(read_image(piece.read(), video.name, **FRAME_LIMITS)) for piece in chosen]
        if len({image.shape for image in images}) > 1:
            raise BrokenSampleError(f"{video.name}: its frames differ in size")
        return Clip(np.stack(images), video.name)


class VideoFolder(_VideoList):
    """A folder with video files (read through PyAV) and folders of frames, at any depth."""

    def __init__(self, folder: str) -> None:
        """
        Args:
            folder: each video file in it is a video, and each folder that holds image files.
        """
        root = Path(folder)
        if not root.is_dir():
            raise MissingFileError(f"there is no folder {folder}")
        inside = sorted(path for path in root.rglob("*") if "/." not in f"/{path.relative_to(root).as_posix()}")
        folders = [root, *filter(Path.is_dir, inside)]
        files = (path for path in inside if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
        videos = [_Video(str(path), (_Piece(path),), True) for path in files]
        for place in folders:
            if found := frame_files(place):
                videos.append(_Video(str(place), tuple(map(_Piece, found)), False))
        if not videos:
            raise DataError(f"{folder} holds neither video files ({', '.join(VIDEO_SUFFIXES)}) nor folders of frames")
        super().__init__(videos)


class VideoShards(_VideoList):
    """Tar shards with video files, and with folders of frames; local, behind a URL, or written by a command."""

    def __init__(self, shards: str | list[str], cache: str | None = None) -> None:
        """
        Args:
            shards: One or more paths, URLs or `pipe:COMMAND`, with brace patterns such as `shard-{000..009}.tar`; what
                is not local is fetched into the cache whole. A command is run by the shell.
            cache: The folder for fetched shards; default: infotok_lit/shards in the user's cache folder.
        """
        place = default_cache() if cache is None else Path(cache)
        place.mkdir(parents=True, exist_ok=True)
        patterns = [shards] if isinstance(shards, str) else shards
        addresses = [address for pattern in patterns for address in expand_braces(pattern)]
        videos = [video for address in addresses for video in _videos_in_tar(local_copy(address, place), address)]
        if not videos:
            raise DataError(f"the shards hold no videos: {', '.join(patterns) or 'none were given'}")
        super().__init__(videos)


def _videos_in_tar(path: Path, address: str) -> list[_Video]:
    videos: list[_Video] = []
    frames: dict[Path, list[tuple[Path, _Piece]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                place, piece = Path(member.name), _Piece(path, member.offset_data, member.size)
                if not member.isfile() or any(re.match(r"\.[^.]", part) for part in place.parts):
                    continue  # hidden: macOS writes `._x.mp4` beside `x.mp4`
                if place.suffix.lower() in VIDEO_SUFFIXES:
                    videos.append(_Video(f"{address}: {member.name}", (piece,), True))
                elif place.suffix.lower() in FRAME_SUFFIXES:
                    frames.setdefault(place.parent, []).append((place, piece))
    except (tarfile.ReadError, OSError) as error:
        raise DataError(f"{address} is not an uncompressed tar file ({error}); unpack or fetch it again") from error
    for folder, members in sorted(frames.items()):
        pieces = tuple(piece for _, piece in sorted(members, key=lambda member: frame_order(member[0])))
        videos.append(_Video(f"{address}: {folder}", pieces, False))
    return videos


@dataclass(frozen=True)
class Augmentation:
    """What a training clip goes through, as in the official code.

    Args:
        crop_only: the chance that a clip is cropped as it is, rather than scaled first so that its shorter side fits.
        flip: the chance that it is mirrored.
        reverse: the chance that it runs backwards.
    """

    crop_only: float = 0.1
    flip: float = 0.5
    reverse: float = 0.5

    def __post_init__(self) -> None:
        if not all(0 <= chance <= 1 for chance in (self.crop_only, self.flip, self.reverse)):
            raise SettingsError("augmentation: crop_only, flip and reverse are chances: give them between 0 and 1")

    def apply(self, frames: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
        """uint8 (T, H, W, 3) -> (T, side, side, 3)."""
        crop_only, flip, reverse, *place = rng.random(5)
        if crop_only >= self.crop_only or min(frames.shape[1:3]) < side:
            frames = _scaled(frames, side)
        top, left = (int(at * (room - side + 1)) for at, room in zip(place, frames.shape[1:3], strict=True))
        frames = frames[:, top : top + side, left : left + side]
        frames = frames[:, :, ::-1] if flip < self.flip else frames
        return np.ascontiguousarray(frames[::-1] if reverse < self.reverse else frames)


def central(frames: np.ndarray, side: int) -> np.ndarray:
    """uint8 (T, H, W, 3) -> (T, side, side, 3): scaled to the shorter side, and cropped in the middle."""
    frames = _scaled(frames, side)
    top, left = ((room - side) // 2 for room in frames.shape[1:3])
    return np.ascontiguousarray(frames[:, top : top + side, left : left + side])


def _scaled(frames: np.ndarray, side: int) -> np.ndarray:
    """Scaled so that the shorter side is `side`."""
    height, width = frames.shape[1:3]
    scale = side / min(height, width)
    if scale == 1:
        return frames
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames])
