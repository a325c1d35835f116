"""Frames from and to video files (through PyAV, an extra) and folders of image files."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from infotok_lit.batch import BrokenSampleError
from infotok_lit.data.image_file import read_image
from infotok_lit.errors import DataError, MissingFileError, SettingsError
from infotok_lit.files import whole_file, whole_folder

FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".gif", ".mpg", ".mpeg", ".ts")
CODECS = {
    ".mp4": ("libx264", {"crf": "12"}, "yuv420p"),
    ".mov": ("libx264", {"crf": "12"}, "yuv420p"),
    ".mkv": ("ffv1", {}, "bgr0"),
}
"""What is written: near-lossless H.264, and lossless FFV1."""
FRAME_LIMITS = {"min_side": 1, "max_aspect": float("inf")}


def import_av() -> ModuleType:
    """PyAV; SettingsError with the mend if it is missing."""
    try:
        import av
    except ImportError as error:
        raise SettingsError(
            "video files are read and written with PyAV, which is not installed: pip install 'infotok_lit[video]', "
            "or use folders of frames"
        ) from error
    return av


@dataclass(frozen=True)
class OpenVideo:
    """A video that is read once, frame by frame."""

    frames: Iterator[np.ndarray]
    """uint8 (H, W, 3) RGB, all of one size."""
    frame_rate: Fraction
    count: int | None
    """How many frames the file says it has; None if it does not say."""


def read_video(path: Path, frame_rate: Fraction = Fraction(25)) -> OpenVideo:
    """A video file, or a folder of image files in the order of their names.

    Args:
        frame_rate: of a folder of frames, and of a file that does not say.

    Raises:
        MissingFileError: if there is nothing at `path`, or no frame.
        DataError: if it is no video; also from the frames, where one is damaged.
        SettingsError: if it is a video file and PyAV is missing.
    """
    if not path.exists():
        raise MissingFileError(f"there is no video at {path}")
    if path.is_dir():
        files = frame_files(path)
        if not files:
            raise MissingFileError(f"{path} holds no frames ({', '.join(FRAME_SUFFIXES)})")
        return OpenVideo(_read_frames(files), frame_rate, len(files))
    av = import_av()
    try:
        container = av.open(str(path))
        stream = container.streams.video[0]
    except (av.FFmpegError, IndexError, OSError) as error:
        raise DataError(f"{path} is not a video that can be read ({error})") from error
    found = stream.average_rate or stream.guessed_rate or frame_rate
    return OpenVideo(_decode(av, container, stream, str(path)), Fraction(found), stream.frames or None)


def frame_files(folder: Path) -> list[Path]:
    """The image files of a folder, in the order of the numbers in their names."""
    found = (path for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES)
    return sorted(found, key=lambda path: [int(part) if part.isdigit() else part for part in _parts(path.stem)])


def _parts(name: str) -> list[str]:
    """Text and digits in turn, text first, so that any two names can be compared."""
    return re.split(r"(\d+)", name)


def _read_frames(files: Iterable[Path]) -> Iterator[np.ndarray]:
    size = None
    for path in files:
        try:
            frame = np.asarray(read_image(path, **FRAME_LIMITS))
        except BrokenSampleError as error:
            raise DataError(str(error)) from error
        if size is not None and frame.shape != size:
            raise DataError(f"{path} is {frame.shape[1]} x {frame.shape[0]}, other than the frames before it")
        size = frame.shape
        yield frame


def _decode(av: ModuleType, container: Any, stream: Any, name: str) -> Iterator[np.ndarray]:
    """All frames, upright; a stream that changes its size is scaled to that of its first frame."""
    with container:
        stream.thread_type = "AUTO"
        size: dict[str, int] = {}
        try:
            for frame in container.decode(stream):
                size = size or {"width": frame.width, "height": frame.height}
                yield upright(frame, size)
        except av.FFmpegError as error:
            raise DataError(f"{name} is damaged: {error}") from error


def upright(frame: Any, size: dict[str, int]) -> np.ndarray:
    """A decoded frame as uint8 (H, W, 3) RGB, turned as its file asks for."""
    pixels = frame.to_ndarray(format="rgb24", **size)
    return np.ascontiguousarray(np.rot90(pixels, k=round(frame.rotation / 90)))


def read_part(source: Path | bytes, start: float, frames: int, name: str) -> np.ndarray:
    """Some frames of a video file, from the share `start` of those at which that many still follow.

    Args:
        source: the file, or its bytes.
        start: in [0, 1).
        frames: how many.
        name: for errors.

    Returns:
        uint8 (frames, H, W, 3).

    Raises:
        BrokenSampleError: if it cannot be decoded, or has too few frames.
        SettingsError: if PyAV is missing.
    """
    av = import_av()
    try:
        with av.open(BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            first = int(start * max(0, _length(container, stream) - frames + 1))
            _seek(container, stream, first)
            return _collect(container, stream, first, frames)
    except (av.FFmpegError, IndexError, OSError, ValueError) as error:
        raise BrokenSampleError(f"{name}: {error}") from error


def _length(container: Any, stream: Any) -> int:
    """How many frames there are, as the file says, or as its duration and rate do."""
    if stream.frames:
        return stream.frames
    duration = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1_000_000
    return int(duration * (stream.average_rate or 0))


def _seek(container: Any, stream: Any, first: int) -> None:
    """Go to the key frame before a frame, if the stream knows its rate."""
    if first and stream.average_rate:
        seconds = first / stream.average_rate
        container.seek(int(seconds / stream.time_base) + (stream.start_time or 0), stream=stream)


def _collect(container: Any, stream: Any, first: int, frames: int) -> np.ndarray:
    rate, begin = stream.average_rate, stream.start_time or 0
    size: dict[str, int] = {}
    found = []
    for number, frame in enumerate(container.decode(stream)):
        timed = rate and frame.pts is not None
        place = round((frame.pts - begin) * stream.time_base * rate) if timed else number
        if place < first:
            continue
        size = size or {"width": frame.width, "height": frame.height}
        found.append(upright(frame, size))
        if len(found) == frames:
            return np.stack(found)
    raise ValueError(f"it has {len(found)} frames from frame {first} on, {frames} are needed")


def check_target(path: Path) -> None:
    """SettingsError if a video cannot be written to `path`: another suffix, or no PyAV for it."""
    if path.suffix and path.suffix.lower() not in CODECS:
        raise SettingsError(f"{path}: videos are written as {', '.join(CODECS)}, or as a folder of PNG files")
    if path.suffix:
        import_av()


def write_video(path: Path, frames: Iterable[np.ndarray], frame_rate: Fraction) -> None:
    """Write frames (H, W, 3) uint8 to a video file, or to a folder of PNG files if `path` has no suffix.

    What is written appears complete or not at all.

    Raises:
        SettingsError: for a suffix that is not written, or if PyAV is missing.
    """
    check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix:
        with whole_file(path) as target:
            _encode(target, frames, frame_rate)
        return
    with whole_folder(path) as folder:
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(folder / f"{number:06}.png")


def _encode(path: Path, frames: Iterable[np.ndarray], frame_rate: Fraction) -> None:
    av = import_av()
    codec, options, pixel_format = CODECS[path.suffix.lower()]
    remaining = iter(frames)
    first = next(remaining)
    height, width = first.shape[:2]
    try:
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=frame_rate, options=options)
            stream.width, stream.height = width, height
            # Halved colour needs even sides.
            stream.pix_fmt = "yuv444p" if pixel_format == "yuv420p" and (width % 2 or height % 2) else pixel_format
            for frame in chain([first], remaining):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    except (av.FFmpegError, OverflowError) as error:
        raise DataError(
            f"{width} x {height} pixels at {float(frame_rate):g} frames a second cannot be written as {path.name} "
            f"({error}): write a folder of PNG files"
        ) from error
