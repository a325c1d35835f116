"""Rate and distortion against their definitions, on streams that were really written."""

import csv
import math
import shutil
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_video import noise, tiny_tokenizer
from torch import nn

from infotok_lit.checkpoints import CheckpointError
from infotok_lit.cli import main as command_line
from infotok_lit.commands.compress import CuttingOptions
from infotok_lit.commands.rate_distortion import rate_distortion
from infotok_lit.video.codec import CodecConfig, compress, read_stream
from infotok_lit.video.losses import SCALE, SHIFT, Vgg16Features, psnr
from infotok_lit.video.official import export_tokenizer
from infotok_lit.video.quality import Lpips, means_by_rate, measure_quality
from infotok_lit.video.video_file import OpenVideo, write_video


def test_quality_is_that_of_the_decoded_stream(tmp_path) -> None:
    tokenizer, frames = tiny_tokenizer(), noise(20, 16, 24)
    config = CodecConfig(rate=0.5, window=9)
    row = measure_quality(tokenizer, "x", lambda: OpenVideo(iter(frames), Fraction(25), 20), config)
    with (tmp_path / "x.itk").open("w+b") as file:
        report = compress(tokenizer, frames, Fraction(25), file, config)
        file.seek(0)
        decoded = np.stack(list(read_stream(tokenizer, file, "x").frames()))
    errors = np.square(frames.astype(float) - decoded).mean((1, 2, 3))
    assert row.psnr == pytest.approx((10 * np.log10(255**2 / errors)).mean(), rel=1e-5)
    assert row.bpp16 == pytest.approx(16 * 8 * (tmp_path / "x.itk").stat().st_size / frames[..., 0].size)
    assert (row.paper_bpp16, row.kept) == (report.paper_bpp16, report.kept / report.tokens)
    assert 0 < row.ssim < 0.5 and row.lpips is None
    small = measure_quality(tokenizer, "x", lambda: OpenVideo(iter(noise(1, 8, 8)), Fraction(25), 1), CodecConfig())
    assert small.ssim is None


def test_psnr_is_its_definition() -> None:
    a = torch.zeros(2, 1, 2, 2, 3, dtype=torch.uint8)
    b = a.clone()
    b[0] = 10
    assert psnr(a, b).tolist() == pytest.approx([20 * math.log10(255 / 10), 100.0])


def test_lpips_is_its_definition(tmp_path) -> None:
    torch.manual_seed(0)
    features = Vgg16Features([[4], [5], [6], [7], [8]])
    weights = [torch.rand(width) for width in (4, 5, 6, 7, 8)]
    a, b = torch.rand(2, 3, 16, 16) * 2 - 1, torch.rand(2, 3, 16, 16) * 2 - 1
    found = Lpips(features, weights)(a, b)
    shift, scale = torch.tensor(SHIFT).view(3, 1, 1), torch.tensor(SCALE).view(3, 1, 1)
    for sample in range(2):
        one, other = (features(((clip - shift) / scale)[sample : sample + 1]) for clip in (a, b))
        total = 0.0
        for left, right, weight in zip(one, other, weights, strict=True):
            height, width = left.shape[2:]
            for y in range(height):
                for x in range(width):
                    # A place without any activation has no direction, and counts as zero.
                    units = [part[0, :, y, x] / max(float(part[0, :, y, x].norm()), 1e-9) for part in (left, right)]
                    total += float((weight * (units[0] - units[1]) ** 2).sum()) / (height * width)
        assert found[sample].item() == pytest.approx(total, rel=1e-4)
    assert Lpips(features, weights)(a, a).abs().max() == 0
    for widths in ((64,), (64, 192, 384, 256, 256)):  # cut short, and AlexNet's
        state = {f"lin{i}.model.1.weight": torch.zeros(1, width, 1, 1) for i, width in enumerate(widths)}
        torch.save(state, tmp_path / "vgg.pth")
        with pytest.raises(CheckpointError, match="not LPIPS"):
            Lpips.from_files(tmp_path / "vgg.pth", tmp_path / "vgg.pth")


def test_frames_too_small_for_lpips_have_none() -> None:
    lpips, frames = Lpips(Vgg16Features([[2]] * 5), [torch.ones(2)] * 5), noise(2, 12, 15)
    opened = lambda: OpenVideo(iter(frames), Fraction(25), 2)  # noqa: E731
    row = measure_quality(tiny_tokenizer(), "x", opened, CodecConfig(), lpips)
    assert row.lpips is None and row.ssim is not None


def test_the_command_says_what_it_cannot_do_before_it_measures(tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("no folder")
    for video, out, said in (
        ("[]", "out", "name one or more with --video"),
        ("[x]", "file", "is a file"),
    ):
        assert command_line(["rate_distortion", "--model", "x", "--video", video, "--out", str(tmp_path / out)]) == 2
        assert said in capsys.readouterr().err


def test_a_video_that_cannot_be_read_is_said_before_anything_is_measured(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("infotok_lit.video.quality.measure_quality", lambda *_: pytest.fail("measured"))
    write_video(tmp_path / "a", noise(2, 16, 16), Fraction(25))
    (tmp_path / "b.mp4").write_bytes(b"no video")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "0.png").write_bytes(b"no picture")
    arguments = ["rate_distortion", "--model", "embedded", "--device", "cpu", "--out", str(tmp_path / "out")]
    for name, said in (("gone", "there is no video"), ("b.mp4", "not a video"), ("c", "0.png")):
        assert command_line([*arguments, "--video", str(tmp_path / "a"), str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_was_measured_before_a_damaged_frame_is_kept_until_all_is_measured(tmp_path, capsys) -> None:
    for name in ("a", "b"):
        write_video(tmp_path / name, noise(3, 16, 16), Fraction(25))
    (tmp_path / "b" / "000002.png").write_bytes(b"no picture")
    videos = ["--video", str(tmp_path / "a"), str(tmp_path / "b")]
    arguments = ["rate_distortion", "--model", "embedded", "--device", "cpu", "--rates", "1", "0.5", *videos]
    assert command_line([*arguments, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "000002.png" in said and "what was measured so far is in" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rate_distortion_part.csv"]
    rows = list(csv.DictReader((tmp_path / "out" / "rate_distortion_part.csv").open()))
    assert [(row["video"], row["rate"]) for row in rows] == [(str(tmp_path / "a"), rate) for rate in ("1.0", "0.5")]
    shutil.copy(tmp_path / "b" / "000001.png", tmp_path / "b" / "000002.png")
    assert command_line([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "rate_distortion_part.csv exists" in capsys.readouterr().err, "it may have taken hours"
    assert command_line([*arguments, "--out", str(tmp_path / "out"), "--force"]) == 0
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["rate_distortion.csv", "rate_distortion.png"], "all of it is in the table now"


def test_the_command_leaves_a_table_and_a_plot(tmp_path, capsys) -> None:
    export_tokenizer(tiny_tokenizer(), tmp_path / "model", {})
    for name in ("a", "b"):
        write_video(tmp_path / name, noise(6, 16, 16), Fraction(25))
    videos = ["--video", str(tmp_path / "a"), str(tmp_path / "b")]
    arguments = ["rate_distortion", "--model", str(tmp_path / "model"), *videos, "--out", str(tmp_path / "out")]
    arguments += ["--rates", "1", "0.25", "--device", "cpu"]
    assert command_line(arguments) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "rate_distortion.csv").open()))
    assert [row["rate"] for row in rows] == ["1.0", "0.25", "1.0", "0.25", "0.25", "1.0"]
    mean = (float(rows[1]["bpp16"]) + float(rows[3]["bpp16"])) / 2
    assert float(rows[4]["bpp16"]) == pytest.approx(mean) and float(rows[4]["bpp16"]) < float(rows[5]["bpp16"])
    assert (tmp_path / "out" / "rate_distortion.png").read_bytes().startswith(b"\x89PNG")
    assert "rate 0.25:" in capsys.readouterr().out
    assert command_line(arguments) == 2
    assert "exists" in capsys.readouterr().err


def test_frames_are_measured_on_the_tokenizers_device(monkeypatch) -> None:
    """On `meta`, which stands for a card: the stream is left out, as nothing can be computed there."""
    frames, seen = noise(16, 8, 8), []
    report = SimpleNamespace(frames=16, kept=1, tokens=1, bpp16=1.0, paper_bpp16=1.0)
    # Too small for SSIM, which `meta` cannot compute.
    monkeypatch.setattr("infotok_lit.video.quality.LPIPS_SIDE", 8)
    monkeypatch.setattr("infotok_lit.video.quality.compress", lambda *_: report)
    monkeypatch.setattr(
        "infotok_lit.video.quality.read_stream", lambda *_: SimpleNamespace(frames=lambda: iter(frames))
    )

    def lpips(*clips: torch.Tensor) -> torch.Tensor:
        seen.extend(clip.device.type for clip in clips)
        return torch.zeros(len(clips[0]))

    distance = SimpleNamespace(update=lambda clips, real: seen.append(clips.device.type))
    tokenizer = SimpleNamespace(device=torch.device("meta"))
    opened = lambda: OpenVideo(iter(frames), Fraction(25), 16)  # noqa: E731
    row = measure_quality(tokenizer, "x", opened, CodecConfig(), lpips, distance)
    assert seen == ["meta"] * 4 and row.psnr == 100


def test_the_command_puts_its_networks_on_the_tokenizers_device(monkeypatch, tmp_path) -> None:
    class Measured(Exception):
        pass

    def measure(tokenizer, name, open_video, config, lpips, distance) -> None:
        raise Measured({part.device.type for network in (lpips, distance) for part in network.parameters()})

    features = nn.Linear(1, 1)
    features.num_features = 1
    monkeypatch.setattr("infotok_lit.video.quality.measure_quality", measure)
    monkeypatch.setattr("infotok_lit.video.quality.Lpips.from_files", lambda *_: nn.Linear(1, 1))
    monkeypatch.setattr("infotok_lit.video.fvd.I3d.from_file", lambda *_: features)
    monkeypatch.setattr(
        "infotok_lit.commands.rate_distortion.open_tokenizer",
        lambda model, device: SimpleNamespace(device=torch.device(device)),
    )
    weights = dict.fromkeys(("vgg_weights", "lpips_weights", "i3d_weights"), tmp_path)
    write_video(tmp_path / "a", noise(1, 8, 8), Fraction(25))
    with pytest.raises(Measured) as caught:
        rate_distortion("m", [tmp_path / "a"], tmp_path / "out", CuttingOptions(), device="meta", **weights)
    assert caught.value.args == ({"meta"},)


def test_a_rate_that_is_named_twice_is_measured_once(monkeypatch, tmp_path) -> None:
    class Measured(Exception):
        pass

    def measure(tokenizer, videos, each, *rest) -> None:
        raise Measured(at.rate for at in each)

    monkeypatch.setattr("infotok_lit.commands.rate_distortion._measured", measure)
    monkeypatch.setattr("infotok_lit.commands.rate_distortion.open_tokenizer", lambda model, device: None)
    write_video(tmp_path / "a", noise(1, 8, 8), Fraction(25))
    with pytest.raises(Measured) as caught:
        rate_distortion("m", [tmp_path / "a"], tmp_path / "out", CuttingOptions(), rates=[0.5, 1.0, 0.5])
    assert list(caught.value.args[0]) == [0.5, 1.0]


def test_means_are_over_videos_at_each_rate() -> None:
    tokenizer = tiny_tokenizer()

    def row(seed: int, rate: float):
        opened = lambda: OpenVideo(iter(noise(5, 16, 16, seed)), Fraction(25), 5)  # noqa: E731
        return measure_quality(tokenizer, str(seed), opened, CodecConfig(rate=rate))

    rows = [row(0, 0.5), row(1, 0.5), row(0, 1.0)]
    half, whole = means_by_rate(rows)
    assert half.psnr == pytest.approx((rows[0].psnr + rows[1].psnr) / 2)
    assert (half.rate, half.frames, whole.psnr) == (0.5, 10, rows[2].psnr)
