"""Clips from folders, shards and video files; the stream that training reads."""

import io
import struct
import sys
import tarfile
import warnings
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_video import noise

from infotok_lit.batch import BrokenSampleError, TooManyBrokenSamplesError
from infotok_lit.data.stream import Request
from infotok_lit.errors import DataError, MissingFileError, SettingsError
from infotok_lit.video.clips import Augmentation, VideoFolder, VideoShards, central
from infotok_lit.video.datamodule import ClipDataModule, ClipDataset
from infotok_lit.video.moving_scenes import MovingScenes
from infotok_lit.video.video_file import read_part, read_video, write_video

RNG = np.random.default_rng(0)


def write_frames(folder: Path, frames: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame{number}.png")


def png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG")
    return buffer.getvalue()


# Folders and shards


def test_a_folder_of_frames_is_a_video_in_the_order_of_its_numbers(tmp_path) -> None:
    frames = noise(12, 10, 14)
    write_frames(tmp_path / "a", frames)
    opened = read_video(tmp_path / "a", Fraction(30))
    assert (opened.count, opened.frame_rate) == (12, 30)
    assert np.array_equal(np.stack(list(opened.frames)), frames)
    source = VideoFolder(str(tmp_path))
    assert len(source) == 1
    found = {source.clip(0, 9, np.random.default_rng(seed)).frames.tobytes() for seed in range(20)}
    assert found == {frames[first : first + 9].tobytes() for first in range(4)}


def test_a_folder_that_is_named_after_its_video_is_a_folder_of_frames(tmp_path) -> None:
    frames = noise(9, 10, 14)
    write_frames(tmp_path / "x.mp4", frames)
    source = VideoFolder(str(tmp_path))
    assert len(source) == 1 and np.array_equal(source.clip(0, 9, RNG).frames, frames)


def test_shards_hold_folders_of_frames(tmp_path) -> None:
    videos = {name: noise(11, 8, 8, seed) for seed, name in enumerate(("one", "two"))}
    with tarfile.open(tmp_path / "clips-0.tar", "w") as tar:
        for name, frames in videos.items():
            for number, frame in enumerate(frames):
                content = png(frame)
                member = tarfile.TarInfo(f"{name}/frame{number}.png")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    source = VideoShards(str(tmp_path / "clips-{0..0}.tar"), cache=str(tmp_path / "cache"))
    assert len(source) == 2
    for index, frames in enumerate(videos.values()):
        assert np.array_equal(source.clip(index, 11, RNG).frames, frames), "frame10 comes after frame9"
    (tmp_path / "no.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match="tar"):
        VideoShards(str(tmp_path / "no.tar"), cache=str(tmp_path / "cache"))


def test_what_cannot_be_used_is_named(tmp_path) -> None:
    write_frames(tmp_path / "short", noise(3, 8, 8))
    write_frames(tmp_path / "uneven", noise(2, 8, 8))
    Image.fromarray(noise(1, 9, 8)[0]).save(tmp_path / "uneven" / "frame9.png")
    source = VideoFolder(str(tmp_path))
    with pytest.raises(BrokenSampleError, match="short: it has 3 frames, 9 are needed"):
        source.clip(0, 9, RNG)
    with pytest.raises(BrokenSampleError, match="uneven: its frames differ in size"):
        source.clip(1, 3, RNG)
    with pytest.raises(DataError, match="other than the frames before it"):
        list(read_video(tmp_path / "uneven").frames)
    (tmp_path / "uneven" / "frame9.png").write_bytes(b"")
    with pytest.raises(DataError, match="frame9.png: the file is empty"):
        list(read_video(tmp_path / "uneven").frames)
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(MissingFileError):
            read_video(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="neither video files"):
        VideoFolder(str(tmp_path / "empty"))


def test_without_pyav_the_message_has_the_mend(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "x.mp4").write_bytes(b"whatever")
    for call in (
        lambda: read_video(tmp_path / "x.mp4"),
        lambda: write_video(tmp_path / "y.mp4", noise(1, 8, 8), Fraction(25)),
        lambda: VideoFolder(str(tmp_path)).clip(0, 1, RNG),
    ):
        with pytest.raises(SettingsError, match=r"pip install 'infotok_lit\[video\]'"):
            call()
    with pytest.raises(SettingsError, match="folder of PNG files"):
        write_video(tmp_path / "y.webm", noise(1, 8, 8), Fraction(25))
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


# Video files


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


SMOOTH = np.repeat(np.repeat(noise(40, 4, 6), 8, axis=1), 8, axis=2)


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
    """A telephone that is held upright writes lying frames, and a matrix."""
    pytest.importorskip("av", reason="needs the extra `video`")
    write_video(tmp_path / "lying.mp4", SMOOTH, Fraction(25))
    lying = next(read_video(tmp_path / "lying.mp4").frames)
    content = bytearray((tmp_path / "lying.mp4").read_bytes())
    matrix = content.find(b"tkhd") + 44
    for name, cos, sin, turned in (("clockwise", 0, 1, -1), ("over", -1, 0, 2), ("counter", 0, -1, 1)):
        content[matrix : matrix + 36] = struct.pack(
            ">9i", *(65536 * part for part in (cos, sin, 0, -sin, cos, 0, 0, 0, 16384))
        )
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(content)
        assert np.array_equal(next(read_video(path).frames), np.rot90(lying, turned))
        assert np.array_equal(read_part(path, 0.0, 1, name)[0], np.rot90(lying, turned))


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
    av = pytest.importorskip("av", reason="needs the extra `video`")
    write_video(tmp_path / "whole.mp4", SMOOTH, Fraction(25))
    with (
        av.open(str(tmp_path / "whole.mp4")) as whole,
        av.open(str(tmp_path / "x.mp4"), "w", options={"movflags": "faststart"}) as moved,
    ):
        stream = moved.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:  # the last one is empty
                packet.stream = stream
                moved.mux(packet)
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


def test_a_video_that_was_trimmed_is_whole(tmp_path) -> None:
    """A telephone trims a video by a list of what is shown, and leaves all frames in the file."""
    av = pytest.importorskip("av", reason="needs the extra `video`")
    write_video(tmp_path / "whole.mp4", SMOOTH, Fraction(25))
    with (
        av.open(str(tmp_path / "whole.mp4")) as whole,
        av.open(str(tmp_path / "x.mp4"), "w", options={"avoid_negative_ts": "disabled"}) as trimmed,
    ):
        stream = trimmed.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:
                packet.pts, packet.dts = (time - round(0.4 / packet.time_base) for time in (packet.pts, packet.dts))
                packet.stream = stream
                trimmed.mux(packet)
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


# Augmentation


def test_augmentation_crops_mirrors_and_turns_around() -> None:
    frames = noise(4, 16, 16)
    same = Augmentation(crop_only=1, flip=0, reverse=0).apply(frames, 16, RNG)
    assert np.array_equal(same, frames)
    assert np.array_equal(Augmentation(1, 1, 0).apply(frames, 16, RNG), frames[:, :, ::-1])
    assert np.array_equal(Augmentation(1, 0, 1).apply(frames, 16, RNG), frames[::-1])
    wide = noise(4, 20, 60)
    for crop_only in (0, 1):
        for _ in range(5):
            assert Augmentation(crop_only).apply(wide, 16, RNG).shape == (4, 16, 16, 3)
    assert Augmentation(1).apply(noise(4, 8, 30), 16, RNG).shape == (4, 16, 16, 3), "what is too small is scaled up"
    assert central(wide, 16).shape == (4, 16, 16, 3)
    with pytest.raises(SettingsError):
        Augmentation(flip=2)


# The stream


def test_a_broken_video_is_replaced_and_named(tmp_path) -> None:
    write_frames(tmp_path / "a", noise(9, 16, 16))
    write_frames(tmp_path / "b", noise(2, 16, 16))
    dataset = ClipDataset(VideoFolder(str(tmp_path)), 9, 16, seed=0, augmentation=None)
    drawn = dataset[Request(1, 0)]
    assert drawn.sample.name.endswith("a") and len(drawn.skipped) >= 1
    assert "b: it has 2 frames" in drawn.skipped[0]
    only_broken = ClipDataset(VideoFolder(str(tmp_path / "b")), 9, 16, seed=0, augmentation=None)
    with pytest.raises(TooManyBrokenSamplesError, match="it has 2 frames"):
        only_broken[Request(0, 0)]


def test_the_same_request_gives_the_same_clip() -> None:
    dataset = ClipDataset(MovingScenes(side=48), 5, 32, seed=3, augmentation=Augmentation())
    assert np.array_equal(dataset[Request(7, 0)].sample.frames, dataset[Request(7, 0)].sample.frames)
    assert not np.array_equal(dataset[Request(7, 0)].sample.frames, dataset[Request(7, 1)].sample.frames)


@pytest.mark.parametrize("changed", [{"frames": 0}, {"batch_size": 0}, {"seed": -1}, {"max_broken_share": 2.0}])
def test_data_settings_that_cannot_be_are_refused(changed: dict) -> None:
    with pytest.raises(SettingsError):
        ClipDataModule(MovingScenes(), **changed)


def test_clips_are_given_as_they_are_for_validation() -> None:
    data = ClipDataset(MovingScenes("val", side=32), 5, 32, seed=0, augmentation=None)
    assert torch.equal(
        torch.from_numpy(data[Request(3, 0)].sample.frames),
        torch.from_numpy(MovingScenes("val", side=32).draw(3, 5)[1]),
    )
