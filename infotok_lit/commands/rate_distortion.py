"""`rate_distortion`: the quality of compressed videos against their bits."""

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from infotok_lit.commands.compress import CuttingOptions, open_tokenizer
from infotok_lit.errors import DataError, SettingsError
from infotok_lit.files import check_target, replacing, write_whole
from infotok_lit.progress import progress_bar

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance

    from infotok_lit.video.codec import CodecConfig
    from infotok_lit.video.quality import Lpips, Quality
    from infotok_lit.video.tokenizer import VideoTokenizer

TABLE, PICTURE = "rate_distortion.csv", "rate_distortion.png"
PART = "rate_distortion_part.csv"
"""What was measured before a failure."""


def rate_distortion(
    model: str,
    video: list[Path],
    out: Path,
    cutting: CuttingOptions,
    rates: list[float] | None = None,
    vgg_weights: Path | None = None,
    lpips_weights: Path | None = None,
    i3d_weights: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    force: bool = False,
) -> None:
    """Compress videos at several rates, decode them, and report PSNR, SSIM, LPIPS and FVD against the files' bits.

    Args:
        model: An exported tokenizer's folder, or `embedded`.
        video: Video files and folders of frames.
        out: A folder for the table and the plot.
        rates: Mean shares of tokens that are kept; default: 1, 0.75, 0.5 and 0.25.
        vgg_weights: torchvision's VGG-16, for LPIPS.
        lpips_weights: The lpips package's weights/v0.1/vgg.pth, for LPIPS.
        i3d_weights: An I3D of Kinetics-400, i3d_pretrained_400.pt or rgb_imagenet.pt, for FVD of clips of 16 frames.
        device: Where the tokenizer runs, and what measures its frames; auto: cuda if there is one.
        force: Replace a table and a plot that are there.
    """
    from infotok_lit.video.fvd import I3d, video_distance
    from infotok_lit.video.quality import Lpips, means_by_rate

    each = [cutting.at(rate) for rate in dict.fromkeys(rates or (1.0, 0.75, 0.5, 0.25))]
    if (vgg_weights is None) != (lpips_weights is None):
        raise SettingsError("LPIPS needs both vgg_weights and lpips_weights; leave out both for none")
    if not video:
        raise SettingsError("there is no video to compress: name one or more with --video")
    for name in (TABLE, PICTURE, PART):
        check_target(out / name, force)
    _check_videos(video)
    tokenizer = open_tokenizer(model, device)
    lpips = None
    if vgg_weights is not None and lpips_weights is not None:
        lpips = Lpips.from_files(vgg_weights, lpips_weights).to(tokenizer.device)
    i3d = None if i3d_weights is None else I3d.from_file(i3d_weights)
    distances = {} if i3d is None else {at.rate: video_distance(i3d).to(tokenizer.device) for at in each}
    rows = _measured(tokenizer, video, each, lpips, distances, out / PART)
    means = means_by_rate(rows, distances)
    _write(out, rows, means)
    sys.stdout.writelines(map(_line, means))
    if i3d is not None and all(row.fvd is None for row in means):
        sys.stdout.write("no FVD: it needs two clips of 16 frames or more, and should have hundreds\n")
    sys.stdout.write(f"wrote {out / TABLE} and {PICTURE}\n")


def _check_videos(paths: Sequence[Path]) -> None:
    """See that each video has a first frame, one open at a time; errors as for `read_video`."""
    from infotok_lit.video.video_file import read_video

    for path in paths:
        if next(read_video(path).frames, None) is None:
            raise DataError(f"{path} holds no frames")


def _measured(
    tokenizer: "VideoTokenizer",
    videos: Sequence[Path],
    each: "Sequence[CodecConfig]",
    lpips: "Lpips | None",
    distances: "Mapping[float, FrechetInceptionDistance]",
    part: Path,
) -> "list[Quality]":
    """A row for every video at every rate. Those before a failure are written to `part`: they may have taken hours."""
    from infotok_lit.video.quality import measure_quality
    from infotok_lit.video.video_file import read_video

    rows: list[Quality] = []
    with progress_bar(len(videos) * len(each)) as bar:
        try:
            for path, at in product(videos, each):
                bar.show(len(rows), f"{path.name} at rate {at.rate:g}")
                measures = (lpips, distances.get(at.rate))
                rows.append(measure_quality(tokenizer, str(path), lambda path=path: read_video(path), at, *measures))
        except (Exception, KeyboardInterrupt):
            if rows:
                _write_table(part, rows)
                sys.stderr.write(f"what was measured so far is in {part}\n")
            raise
    return rows


def _write(out: Path, rows: "Sequence[Quality]", means: "Sequence[Quality]") -> None:
    """The table of all rows, and the plot of the means."""
    from infotok_lit.video.quality import plot_quality

    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / PICTURE) as file:
        plot_quality(means, file)
    _write_table(out / TABLE, [*rows, *means])
    (out / PART).unlink(missing_ok=True)  # of an earlier call that failed, and is done now


def _write_table(path: Path, rows: "Sequence[Quality]") -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, list(asdict(rows[0])))
    writer.writeheader()
    writer.writerows(map(asdict, rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, table.getvalue().encode())


def _line(row: "Quality") -> str:
    """A row of the table, in words."""
    quality = f"{row.psnr:.2f} dB" + ("" if row.ssim is None else f", SSIM {row.ssim:.4f}")
    quality += "" if row.lpips is None else f", LPIPS {row.lpips:.4f}"
    quality += "" if row.fvd is None else f", FVD {row.fvd:.1f}"
    bits = f"{row.bpp16:.3f} bits per 16 pixels ({row.paper_bpp16:.3f} as the paper counts)"
    return f"rate {row.rate:g}: {quality}; {bits}\n"
