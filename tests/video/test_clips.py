"""Clips from folders, shards and video files; the stream that training reads."""

import io
import sys
import tarfile
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
from infotok_lit.video.video_file import read_video, write_video

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
                # Beside each file, macOS's tar puts a hidden one, which is no image.
                hidden, content = b"\0\5\x16\7 Mac OS X", png(frame)
                for start, what in (("._", hidden), ("", content)):
                    member = tarfile.TarInfo(f"./{name}/{start}frame{number}.png")
                    member.size = len(what)
                    tar.addfile(member, io.BytesIO(what))
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
