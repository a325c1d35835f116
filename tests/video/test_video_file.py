"""Video files and folders of frames: what is read of them, and what is written."""

import struct
import warnings
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_video import noise

from infotok_lit.batch import BrokenSampleError
from infotok_lit.errors import DataError, SettingsError
from infotok_lit.video.video_file import read_part, read_video, write_video

SMOOTH = np.repeat(np.repeat(noise(40, 4, 6), 8, axis=1), 8, axis=2)


def test_video_files_are_read_and_written(tmp_path) -> None:
    pytest.importorskip("av", reason="needs the extra `video`")
    frames, rate = noise(20, 24, 32), Fraction(30000, 1001)
    write_video(tmp_path / "x.mkv", frames, rate)
    opened = read_video(tmp_path / "x.mkv")
    assert abs(opened.frame_rate - rate) < 0.1
    assert np.array_equal(np.stack(list(opened.frames)), frames)
    smooth = np.repeat(np.repeat(noise(20, 3, 4), 11, axis=1), 11, axis=2)[:, :31, :41]
    write_video(tmp_path / "x.mp4", smooth, rate)
    opened = read_video(tmp_path / "x.mp4")
    lossy = np.stack(list(opened.frames))
    assert (lossy.shape, opened.count, opened.frame_rate) == (smooth.shape, 20, rate)
    assert np.abs(lossy.astype(int) - smooth).mean() < 6
    for start in (0.0, 0.4, 0.99):
        first = int(start * 12)
        part = read_part(tmp_path / "x.mp4", start, 9, "x.mp4")
        assert np.array_equal(part, lossy[first : first + 9])
        assert np.array_equal(read_part((tmp_path / "x.mp4").read_bytes(), start, 9, "x.mp4"), part)
    with pytest.raises(BrokenSampleError, match="21 are needed"):
        read_part(tmp_path / "x.mp4", 0.0, 21, "x.mp4")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "x.mp4").read_bytes()[:300])
    with pytest.raises(DataError, match="cut.mp4"):
        read_video(tmp_path / "cut.mp4")
    with pytest.raises(BrokenSampleError, match=r"cut\.mp4"):
        read_part(tmp_path / "cut.mp4", 0.0, 9, "cut.mp4")


def write_timed(path: Path, times: Sequence[int]) -> None:
    """A video of the first of SMOOTH, at these milliseconds."""
    import av

    with av.open(str(path), "w", options={"live": "1"} if path.stem == "live" else {}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time, pixels in zip(times, SMOOTH, strict=False):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def copy_packets(source: Path, target: Path, options: dict[str, str], earlier: float = 0.0) -> None:
    """Copy a video without coding it anew; what comes to lie before its start, by so many seconds, is not shown."""
    import av

    with av.open(str(source)) as whole, av.open(str(target), "w", options=options) as copied:
        stream = copied.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:  # the last one is empty
                packet.pts, packet.dts = (time - round(earlier / packet.time_base) for time in (packet.pts, packet.dts))
                packet.stream = stream
                copied.mux(packet)


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("steady.ts", range(0, 1600, 40)),  # one key frame, which a search passes by
        ("late.mkv", [*range(0, 300, 10), *range(300, 5300, 500)]),
        ("live.mkv", range(0, 1600, 40)),  # does not say how long it is, as what a browser records
    ],
)
def test_clips_come_from_everywhere_in_a_video_whatever_its_times(tmp_path, name: str, times: Sequence[int]) -> None:
    pytest.importorskip("av", reason="needs the extra `video`")
    write_timed(tmp_path / name, times)
    frames = np.stack(list(read_video(tmp_path / name).frames))
    assert len(frames) == len(times) == 40
    firsts = []
    for start in (0.0, 0.3, 0.6, 0.99):
        part = read_part(tmp_path / name, start, 9, name)
        firsts += [first for first in range(32) if np.array_equal(frames[first : first + 9], part)]
    assert len(firsts) == 4 and firsts == sorted(firsts) and firsts[0] == 0 and firsts[-1] > 12
    with pytest.raises(BrokenSampleError, match="it has 40 frames, 41 are needed"):
        read_part(tmp_path / name, 0.5, 41, name)


@pytest.mark.parametrize(("name", "codec", "off_by"), [("x.ts", "libx264", 0), ("x.mpg", "mpeg2video", 1)])
def test_clips_of_broadcasts_come_from_everywhere(tmp_path, name: str, codec: str, off_by: int) -> None:
    """They are searched by packets, not by key frames; times of .mpg files may be off by half a frame after that."""
    av = pytest.importorskip("av", reason="needs the extra `video`")
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"g": "10"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for pixels in SMOOTH:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    frames = np.stack(list(read_video(tmp_path / name).frames))
    for wanted in (0, 1, 12, 15, 19, 25, 31):
        part = read_part(tmp_path / name, (wanted + 0.5) / 32, 9, name)
        (first,) = (first for first in range(32) if np.array_equal(frames[first : first + 9], part))
        assert abs(first - wanted) <= off_by


def test_a_video_is_turned_as_its_file_asks(tmp_path) -> None:
    """A telephone that is held upright writes lying frames, and a matrix; its front camera may mirror."""
    pytest.importorskip("av", reason="needs the extra `video`")
    write_video(tmp_path / "lying.mp4", SMOOTH, Fraction(25))
    lying = next(read_video(tmp_path / "lying.mp4").frames)
    content = bytearray((tmp_path / "lying.mp4").read_bytes())
    matrix = content.find(b"tkhd") + 44
    across = lying.swapaxes(0, 1)
    for name, (a, b, c, d), wanted in (
        ("clockwise", (0, 1, -1, 0), np.rot90(lying, -1)),
        ("over", (-1, 0, 0, -1), np.rot90(lying, 2)),
        ("counter", (0, -1, 1, 0), np.rot90(lying, 1)),
        ("mirrored", (-1, 0, 0, 1), lying[:, ::-1]),
        ("upside down", (1, 0, 0, -1), lying[::-1]),
        ("transposed", (0, 1, 1, 0), across),
        ("the other way", (0, -1, -1, 0), across[::-1, ::-1]),
        ("turned a little", (0.94, 0.34, -0.34, 0.94), lying),
    ):
        parts = (int(65536 * part) for part in (a, b, 0, c, d, 0, 0, 0, 16384))
        content[matrix : matrix + 36] = struct.pack(">9i", *parts)
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(content)
        assert np.array_equal(next(read_video(path).frames), wanted), name
        assert np.array_equal(read_part(path, 0.0, 1, name)[0], wanted)


@pytest.mark.parametrize(("name", "codec", "pixel_format"), [("x.mov", "qtrle", "argb"), ("x.mkv", "ffv1", "bgra")])
def test_a_video_with_transparency_lies_on_white_as_images_do(tmp_path, name, codec, pixel_format) -> None:
    av = pytest.importorskip("av", reason="needs the extra `video`")
    layers = np.zeros((3, 16, 32, 4), dtype=np.uint8)
    layers[..., 0], layers[:, :, 8:16, 3], layers[:, :, 16:, 3] = 200, 51, 255
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 16, 32, pixel_format
        for layer in layers:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(layer, format="rgba")))
        container.mux(stream.encode())
    share = layers[..., 3:] / 255
    wanted = share * layers[..., :3] + (1 - share) * 255
    assert np.abs(np.stack(list(read_video(tmp_path / name).frames)) - wanted).max() <= 1
    assert np.abs(read_part(tmp_path / name, 0.0, 3, name) - wanted).max() <= 1


@pytest.mark.parametrize(("name", "height"), [("x.mp4", 24), ("odd.mov", 23)])
def test_a_written_file_says_what_its_colours_are(tmp_path, name: str, height: int) -> None:
    """Players take a large video that does not say so for BT.709, and show other colours."""
    av = pytest.importorskip("av", reason="needs the extra `video`")
    red = np.tile(np.array((200, 40, 60), dtype=np.uint8), (3, height, 32, 1))
    write_video(tmp_path / name, red, Fraction(25))
    with av.open(str(tmp_path / name)) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_range) == (5, 1), "BT.601, limited range"
    # Its matrix, worked out by hand.
    assert [bytes(plane)[0] for plane in frame.planes] == pytest.approx([93, 113, 198], abs=1)
    assert np.abs(np.stack(list(read_video(tmp_path / name).frames)).astype(int) - red).max() <= 3


def test_a_video_that_was_cut_off_is_read_with_a_warning(tmp_path) -> None:
    pytest.importorskip("av", reason="needs the extra `video`")
    write_video(tmp_path / "whole.mp4", SMOOTH, Fraction(25))
    copy_packets(tmp_path / "whole.mp4", tmp_path / "x.mp4", {"movflags": "faststart"})
    content = (tmp_path / "x.mp4").read_bytes()
    (tmp_path / "x.mp4").write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"x\.mp4 says that it has 40 frames, but holds \d+: is it cut off"):
        assert 0 < len(list(read_video(tmp_path / "x.mp4").frames)) < 40
    # It says how long it is, not how many frames it has.
    write_video(tmp_path / "y.mkv", SMOOTH, Fraction(25))
    list(read_video(tmp_path / "y.mkv").frames)
    content = (tmp_path / "y.mkv").read_bytes()
    (tmp_path / "y.mkv").write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"y\.mkv says that it lasts 1\.60 s, but its frames end at 0\.\d+ s: is it"):
        list(read_video(tmp_path / "y.mkv").frames)


def test_a_video_whose_pixels_are_not_square_is_read_with_a_warning(tmp_path) -> None:
    av = pytest.importorskip("av", reason="needs the extra `video`")
    with av.open(str(tmp_path / "disc.mpg"), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.height, stream.width, stream.pix_fmt = 576, 720, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(64, 45)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(noise(1, 576, 720)[0], format="rgb24")))
        container.mux(stream.encode())
    with pytest.warns(UserWarning, match=r"disc\.mpg shows its pixels 1\.42 times as wide as high, which is not kept"):
        assert next(read_video(tmp_path / "disc.mpg").frames).shape == (576, 720, 3)


def test_a_video_with_hdr_colours_is_read_with_a_warning(tmp_path) -> None:
    """Telephones film so by default."""
    av = pytest.importorskip("av", reason="needs the extra `video`")
    for number, curve in ((1, None), (16, "PQ"), (18, "HLG")):
        path = tmp_path / f"{number}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p10le"
            stream.codec_context.color_trc = number
            container.mux(stream.encode(av.VideoFrame.from_ndarray(SMOOTH[0], format="rgb24")))
            container.mux(stream.encode())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert len(list(read_video(path).frames)) == 1
        assert [f"{number}.mp4 has HDR colours ({curve})" in str(warning.message) for warning in caught] == (
            [] if curve is None else [True]
        )


@pytest.mark.parametrize(("name", "codec"), [("x.ts", "libx264"), ("x.mpg", "mpeg2video")])
def test_a_broadcast_that_ends_in_a_torn_frame_is_warned_of(tmp_path, name: str, codec: str) -> None:
    """It does not say how much it holds."""
    av = pytest.importorskip("av", reason="needs the extra `video`")
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for pixels in noise(40, 64, 96):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(read_video(path).frames)) == 40
    with av.open(str(path)) as container:
        sizes = [packet.size for packet in container.demux(video=0) if packet.size]
    # Halfway through a frame: how many bytes one takes differs from run to run, as x264 encodes in threads.
    share = (sum(sizes[:28]) + sizes[28] / 2) / sum(sizes)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.warns(UserWarning, match=f"{name} ends with a torn frame: is it cut off"):
        assert 20 < len(list(read_video(path).frames)) < 40


def test_a_video_that_was_trimmed_is_whole(tmp_path) -> None:
    """A telephone trims a video by a list of what is shown, and leaves all frames in the file."""
    pytest.importorskip("av", reason="needs the extra `video`")
    write_video(tmp_path / "whole.mp4", SMOOTH, Fraction(25))
    copy_packets(tmp_path / "whole.mp4", tmp_path / "x.mp4", {"avoid_negative_ts": "disabled"}, earlier=0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = read_video(tmp_path / "x.mp4")
        frames = np.stack(list(opened.frames))
    assert len(frames) == opened.count == 30
    assert np.array_equal(read_part(tmp_path / "x.mp4", 0.7, 1, "x.mp4")[0], frames[21])


def test_names_with_colons_and_titles_in_other_encodings_are_no_matter(tmp_path, monkeypatch) -> None:
    pytest.importorskip("av", reason="needs the extra `video`")
    monkeypatch.chdir(tmp_path)
    write_video(Path("10:30.mp4"), SMOOTH, Fraction(25))
    content = Path("10:30.mp4").read_bytes()
    assert len(list(read_video(Path("10:30.mp4")).frames)) == 40
    assert content.count(b"Lavf") == 1, "the title that a program left"
    Path("old.mp4").write_bytes(content.replace(b"Lavf", b"\xe4\xf6\xfc\xdf"))
    assert len(list(read_video(Path("old.mp4")).frames)) == 40
    assert read_part(Path("old.mp4"), 0.5, 9, "old.mp4").shape == (9, 32, 48, 3)


def test_a_folder_of_frames_is_written_whole(tmp_path) -> None:
    frames = noise(3, 8, 8)
    write_video(tmp_path / "out", frames, Fraction(25))
    assert np.array_equal(np.stack(list(read_video(tmp_path / "out").frames)), frames)

    def failing():
        yield frames[0]
        raise DataError("damaged")

    with pytest.raises(DataError):
        write_video(tmp_path / "other", failing(), Fraction(25))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(SettingsError, match="out exists; choose another name, or replace its frames"):
        write_video(tmp_path / "out", frames[:1], Fraction(25))
    write_video(tmp_path / "out", frames[:1], Fraction(25), force=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["000000.png"], "longer ones leave nothing behind"
    # Another's frame, under a name that would be ours.
    Image.fromarray(frames[1]).save(tmp_path / "out" / "000001.png")
    with pytest.raises(SettingsError, match=r"out holds 000001\.png, which `decompress` did not write"):
        write_video(tmp_path / "out", frames, Fraction(25), force=True)
    assert np.array_equal(np.stack(list(read_video(tmp_path / "out").frames)), frames[:2])
