"""`decompress`: a stream that `compress` wrote, as a video again."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from infotok_lit.commands.compress import open_tokenizer, refuse_existing
from infotok_lit.commands.parsing import run
from infotok_lit.commands.progress import progress_bar

if TYPE_CHECKING:
    import numpy as np


def decompress(
    model: str,
    stream: Path,
    out: Path,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    force: bool = False,
) -> None:
    """Decode an .itk stream with the tokenizer that wrote it.

    Args:
        model: The tokenizer's folder, or `embedded`.
        stream: The .itk file. It is checked as a whole before any of it is decoded.
        out: A video to write (.mp4 or .mov: H.264, .mkv: lossless), or without a suffix a new folder of PNG files.
        device: Where the tokenizer runs; auto: cuda if there is one.
        force: Replace a file that is there.
    """
    from infotok_lit.errors import MissingFileError
    from infotok_lit.video.codec import read_stream
    from infotok_lit.video.video_file import check_target, write_video

    refuse_existing(out, force)
    check_target(out)
    if not stream.is_file():
        raise MissingFileError(f"there is no stream at {stream}")
    tokenizer = open_tokenizer(model, device)
    with stream.open("rb") as file:
        video = read_stream(tokenizer, file, str(stream))
        count = video.header.frames
        with progress_bar(count) as bar:
            write_video(out, _watched(video.frames(), count, bar.show), video.header.frame_rate)
    sys.stdout.write(f"wrote {out}: {count} frames of {video.header.width} x {video.header.height} pixels\n")


def _watched(frames: Iterator["np.ndarray"], count: int, show: Callable[[float, str], None]) -> Iterator["np.ndarray"]:
    for number, frame in enumerate(frames, start=1):
        show(number, f"frames: {number}/{count}")
        yield frame


def main(argv: Sequence[str]) -> int:
    """`decompress --model DIR --stream x.itk --out y.mp4`."""
    return run(decompress, argv)
