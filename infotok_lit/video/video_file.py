"""Frames from and to video files (through PyAV, an extra) and folders of image files."""

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from infotok_lit.batch import BrokenSampleError
from infotok_lit.data.image_file import read_image
from infotok_lit.errors import DataError, MissingFileError, SettingsError
from infotok_lit.files import check_target, whole_file, whole_folder
from infotok_lit.video.frame_pixels import not_kept, upright

FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".gif", ".mpg", ".mpeg", ".ts")
CODECS = {
    ".mp4": ("libx264", {"crf": "12"}, "yuv420p"),
    ".mov": ("libx264", {"crf": "12"}, "yuv420p"),
    ".mkv": ("ffv1", {}, "bgr0"),
}
"""What is written: near-lossless H.264, and lossless FFV1."""
FRAME_LIMITS = {"min_side": 1, "max_aspect": float("inf")}
PROGRAM = "infotok_lit"
"""What PNG files say that they were written by."""
LATE = 0.5
"""Seconds by which the frames of a whole file may end before its sound does."""
BEFORE = 1
"""Seconds before the start: a place from which nothing is passed by."""


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

    A file that holds fewer frames than it says, or ends sooner, as one does that was cut off, is read with a warning;
    one that does not say (.mpg, .ts), if its last frame is torn. So is one with pixels that are not square, or HDR.

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
        container, stream = _open(av, path)
    except (av.FFmpegError, ValueError, OSError) as error:
        raise DataError(f"{path} is not a video that can be read ({error})") from error
    for told in not_kept(stream):
        warnings.warn(f"{path} {told}", stacklevel=2)
    found = stream.average_rate or stream.guessed_rate or frame_rate
    return OpenVideo(_decode(av, container, stream, str(path)), Fraction(found), _told(stream) or None)


def _open(av: ModuleType, source: Path | bytes) -> tuple[Any, Any]:
    """A container and its video stream; ValueError if it has none, and what PyAV raises if it is no container."""
    # An absolute path is a path: the name `10:30.mp4` alone would ask for a protocol 10.
    place = BytesIO(source) if isinstance(source, bytes) else str(source.absolute())
    # Titles that are no UTF-8, which old files have, do not matter.
    container = av.open(place, metadata_errors="ignore")
    stream = container.streams.best("video")
    if stream is None:
        container.close()
        raise ValueError("it has no pictures")
    stream.thread_type = "AUTO"
    return container, stream


def frame_files(folder: Path) -> list[Path]:
    """The image files of a folder, in the order of the numbers in their names; hidden files are none."""
    return sorted((path for path in folder.glob("[!.]*") if path.suffix.lower() in FRAME_SUFFIXES), key=frame_order)


def frame_order(path: Path) -> list[str | int]:
    """What frames are sorted by: the text and the numbers of a name in turn, so that any two can be compared."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"(\d+)", path.stem))]


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
    count, end, torn, told = 0, 0.0, False, _told(stream)
    lasts = 0.0 if told else (container.duration or 0) / 1_000_000

    def counted() -> Iterator[Any]:
        nonlocal count, end, torn
        for frame in container.decode(stream):
            count, torn = count + 1, frame.is_corrupt
            end = max(end, (frame.time or 0) + float((frame.duration or 0) * frame.time_base))
            yield frame

    with container:
        try:
            yield from _pixels(counted())
        except av.FFmpegError as error:
            raise DataError(f"{name} is damaged: {error}") from error
    cut = "ends with a torn frame" if torn else ""
    if count < told:
        cut = f"says that it has {told} frames, but holds {count}"
    elif end + LATE < lasts:
        cut = f"says that it lasts {lasts:.2f} s, but its frames end at {end:.2f} s"
    if cut:
        warnings.warn(f"{name} {cut}: is it cut off?", stacklevel=2)


def _told(stream: Any) -> int:
    """How many frames a file says that it shows, fewer than it holds if it was only marked as trimmed; 0 if nothing."""
    shown = (stream.container.duration or 0) / 1_000_000 * float(stream.average_rate or 0)
    return min(stream.frames, round(shown) or stream.frames)


def _pixels(frames: Iterable[Any]) -> Iterator[np.ndarray]:
    """Decoded frames as `upright` gives them, of the size of the first one."""
    size: dict[str, int] = {}
    for frame in frames:
        size = size or {"width": frame.width, "height": frame.height}
        yield upright(frame, size)


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
        with _stream(av, source) as stream:
            room = _length(av, stream) - frames + 1
            found = [] if room < 1 else list(islice(_pixels(_from_time(av, stream, int(start * room))), frames))
        if len(found) < frames:
            # A rate that varies, or a file that says nothing, says wrong or cannot be searched: its frames are counted.
            with _stream(av, source) as stream:
                count = sum(1 for _ in stream.container.decode(stream))
            if count < frames:
                raise ValueError(f"it has {count} frames, {frames} are needed")
            first = int(start * (count - frames + 1))
            with _stream(av, source) as stream:
                found = list(_pixels(islice(stream.container.decode(stream), first, first + frames)))
        return np.stack(found)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BrokenSampleError(f"{name}: {error}") from error


@contextmanager
def _stream(av: ModuleType, source: Path | bytes) -> Iterator[Any]:
    """A video stream, closed at the end; errors as for `_open`."""
    container, stream = _open(av, source)
    with container:
        yield stream


def _length(av: ModuleType, stream: Any) -> int:
    """How many frames there are, as the file says, or as its times do; 0 if it says nothing."""
    if told := _told(stream):
        return told
    container, rate = stream.container, stream.average_rate or 0
    duration = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1_000_000
    if container.format.name == "mpeg" and rate:
        # Its duration ends with the last time that the file holds, which is that of the first of some frames.
        _seek(av, stream, duration)
        last = max((packet.pts for packet in container.demux(stream) if packet.pts is not None), default=0)
        duration = max(duration, (last - (stream.start_time or 0)) * stream.time_base + 1 / rate)
        _seek(av, stream, -BEFORE)
    return int(duration * rate)


def _seek(av: ModuleType, stream: Any, time: Fraction | float) -> None:
    """To the key frame before so many seconds from the start; not at all in a file that cannot be searched."""
    with suppress(av.FFmpegError):
        stream.container.seek(int(time / stream.time_base) + (stream.start_time or 0), stream=stream)


def _from_time(av: ModuleType, stream: Any, first: int) -> Iterator[Any]:
    """Decoded frames from the `first` on, which is told by its time if frames have one; fewer where rates vary."""
    rate, begin = stream.average_rate, stream.start_time or 0

    def number_of(frame: Any, counted: int) -> int:
        timed = rate and frame.pts is not None
        return round((frame.pts - begin) * stream.time_base * rate) if timed else counted

    frames, back = stream.container.decode(stream), 0
    while first and rate:
        _seek(av, stream, first / rate - back)
        frames = stream.container.decode(stream)
        found = list(islice(frames, 1))
        frames = chain(found, frames)
        if (found and number_of(found[0], 0) <= first) or back > first / rate + BEFORE:
            break
        # Broadcasts are searched by packets, and decoded from the key frame that follows: so from an earlier one.
        back = 2 * back + 1
    for counted, frame in enumerate(frames):
        if number_of(frame, counted) >= first:
            yield frame


def check_video_target(path: Path, force: bool = False, source: Path | None = None) -> None:
    """Refuse what a video could not be written to, before any frame of it is decoded.

    Args:
        path: what to write; a folder of PNG files if it has no suffix.
        force: whether a file that is there may be replaced, or a folder of frames that was written before.
        source: what the video is made from.

    Raises:
        SettingsError: as `files.check_target`; also for a suffix that is not written, or if PyAV is missing.
    """
    if path.suffix and path.suffix.lower() not in CODECS:
        raise SettingsError(f"{path}: videos are written as {', '.join(CODECS)}, or as a folder of PNG files")
    if path.suffix:
        import_av()
    if path.suffix or not path.is_dir():
        check_target(path, force, source)
    elif not force:
        raise SettingsError(f"{path} exists; choose another name, or replace its frames with --force")
    else:
        written_frames(path)


def write_video(path: Path, frames: Iterable[np.ndarray], frame_rate: Fraction, force: bool = False) -> None:
    """Write frames (H, W, 3) uint8 to a video file, or to a folder of PNG files if `path` has no suffix.

    What is written appears complete or not at all.

    Args:
        force: replace what is there, as for `check_video_target`, which says what is raised.
    """
    check_video_target(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix:
        with whole_file(path) as target:
            _encode(target, frames, frame_rate)
        return
    mark = PngInfo()
    mark.add_text("Software", PROGRAM)
    with whole_folder(path, written_frames(path) if path.is_dir() else None) as folder:
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(folder / f"{number:06}.png", pnginfo=mark)


def written_frames(folder: Path) -> list[str]:
    """The names of the frames that `write_video` wrote into a folder; SettingsError if it holds anything else."""
    if folder.is_symlink() or Path.cwd().is_relative_to(folder.resolve()):
        raise SettingsError(f"{folder} is a link, or holds the working folder: choose another name")
    names = []
    for path in sorted(folder.iterdir()):
        ours = re.fullmatch(r"\d{6,}\.png", path.name) is not None and path.is_file()
        if ours:
            with path.open("rb") as file:
                ours = f"tEXtSoftware\0{PROGRAM}".encode() in file.read(128)
        if not ours:
            raise SettingsError(f"{folder} holds {path.name}, which `decompress` did not write: choose another folder")
        names.append(path.name)
    return names


def _encode(path: Path, frames: Iterable[np.ndarray], frame_rate: Fraction) -> None:
    av = import_av()
    codec, options, pixel_format = CODECS[path.suffix.lower()]
    remaining = iter(frames)
    first = next(remaining)
    height, width = first.shape[:2]
    try:
        with av.open(str(path.absolute()), "w") as container:
            stream = container.add_stream(codec, rate=frame_rate, options=options)
            stream.width, stream.height = width, height
            # Halved colour needs even sides.
            stream.pix_fmt = "yuv444p" if pixel_format == "yuv420p" and (width % 2 or height % 2) else pixel_format
            if pixel_format == "yuv420p":
                # What pixels are converted to. A file that does not say so is taken for BT.709 by players, if it is HD.
                stream.codec_context.colorspace = av.video.reformatter.Colorspace.ITU601
                stream.codec_context.color_range = av.video.reformatter.ColorRange.MPEG
            for frame in chain([first], remaining):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    except (av.FFmpegError, OverflowError) as error:
        raise DataError(
            f"{width} x {height} pixels at {float(frame_rate):g} frames a second cannot be written as {path.name} "
            f"({error}): write a folder of PNG files"
        ) from error
