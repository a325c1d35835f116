"""`compress` and `decompress`: a video as a stream of the tokens that it deserves, and back."""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from infotok_lit.assets import ASSETS, EMBEDDED
from infotok_lit.errors import MissingFileError, SettingsError
from infotok_lit.files import check_target, replacing, undone_by_sigterm
from infotok_lit.model_choice import chosen_device
from infotok_lit.progress import progress_bar

if TYPE_CHECKING:
    import numpy as np

    from infotok_lit.video.codec import CodecConfig, CompressionReport
    from infotok_lit.video.tokenizer import VideoTokenizer


@dataclass(frozen=True)
class CuttingOptions:
    """How a video is cut, and how its budget is shared out.

    Args:
        rule: What decides a window's share: `global` compares its error with the video's mean, `training` with that of
            the training clips, `window` gives each the same.
        window: Frames per window; default: 33, or what the tokenizer takes.
        overlap: Frames over which windows are blended.
        tile: Longer frames are cut into tiles of this many pixels.
    """

    rule: Literal["global", "training", "window"] = "global"
    window: int | None = None
    overlap: int = 1
    tile: int = 256

    def at(self, rate: float) -> "CodecConfig":
        """What the codec is told; SettingsError for what cannot be."""
        from infotok_lit.video.codec import CodecConfig

        return CodecConfig(rate, **asdict(self))


def compress(
    model: str,
    video: Path,
    out: Path,
    cutting: CuttingOptions,
    rate: float = 0.5,
    fps: float = 25.0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    force: bool = False,
) -> None:
    """Compress a video to an .itk stream with an adaptive video tokenizer.

    Args:
        model: An exported tokenizer's folder, or `embedded`: the small one that ships, which knows Moving Scenes only.
        video: A video file (read with PyAV), or a folder of image files.
        out: The stream to write, such as x.itk.
        rate: The mean share of tokens that is kept, between 1/16 and 1.
        fps: Frames per second of a folder of frames, which does not say.
        device: Where the tokenizer runs; auto: cuda if there is one.
        force: Replace a file that is there.
    """
    from infotok_lit.video.codec import compress as write_stream
    from infotok_lit.video.video_file import read_video

    config = cutting.at(rate)
    if not 1e-3 <= fps < 1e6:
        raise SettingsError(f"fps is {fps}: give the frames per second of the folder, 0.001 or more")
    check_target(out, force, video)
    tokenizer = open_tokenizer(model, device)
    opened = read_video(video, Fraction(fps).limit_denominator(1001))
    out.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar(opened.count or 0) as bar, undone_by_sigterm(), replacing(out) as file:

        def show(done: int) -> None:
            bar.show(done, f"frames: {done}/{opened.count or '?'}")

        report = write_stream(tokenizer, opened.frames, opened.frame_rate, file, config, progress=show)
    sys.stdout.write(f"wrote {out}: {describe(report)}\n")


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
        force: Replace a file that is there, or a folder of frames that was written before.
    """
    from infotok_lit.video.codec import read_stream
    from infotok_lit.video.video_file import check_video_target, write_video

    check_video_target(out, force, stream)
    if not stream.is_file():
        raise MissingFileError(f"there is no stream at {stream}")
    tokenizer = open_tokenizer(model, device)
    with stream.open("rb") as file:
        video = read_stream(tokenizer, file, str(stream))
        count = video.header.frames
        with progress_bar(count) as bar:

            def watched() -> Iterator["np.ndarray"]:
                for number, frame in enumerate(video.frames(), start=1):
                    bar.show(number, f"frames: {number}/{count}")
                    yield frame

            write_video(out, watched(), video.header.frame_rate, force)
    sys.stdout.write(f"wrote {out}: {count} frames of {video.header.width} x {video.header.height} pixels\n")


def describe(report: "CompressionReport") -> str:
    """What a stream costs, in words."""
    share, mask = report.kept / report.tokens, report.mask_bits / report.tokens
    return (
        f"{report.frames} frames in {report.file_bits // 8:,} bytes; {report.kept:,} of {report.tokens:,} tokens "
        f"({share:.1%}; windows ask for {min(report.rates):.2f} to {max(report.rates):.2f}); the mask takes {mask:.3f} "
        f"bits a token; {report.bpp16:.3f} bits per 16 pixels, {report.paper_bpp16:.3f} as the paper counts"
    )


def open_tokenizer(model: str, device: str) -> "VideoTokenizer":
    """The tokenizer that `--model` and `--device` name; errors say what is wrong with them."""
    from infotok_lit.video.official import load_tokenizer

    place = chosen_device(device)
    folder = ASSETS / "videotok_scenes" if model == EMBEDDED else Path(model)
    if not folder.is_dir():
        raise MissingFileError(
            f"there is no video tokenizer at {folder}: name a folder to which one was exported, or {EMBEDDED} for the "
            "small one that ships"
        )
    return load_tokenizer(folder).to(place)
