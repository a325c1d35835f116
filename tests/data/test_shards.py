"""Tar shards against the folder they were made from."""

import gzip
import io
import json
import logging
import multiprocessing
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infotok_lit.batch import BrokenSampleError
from infotok_lit.data import shard_index as shard_index_module
from infotok_lit.data.fetch import expand_braces
from infotok_lit.data.image_text import ImageTextFolder
from infotok_lit.data.shards import ImageTextShards

PHOTOS = Path(__file__).parents[1] / "fixtures" / "photos"
ROWS = json.loads((PHOTOS / "annotations.json").read_text())
RNG = partial(np.random.default_rng, 0)


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def photo(index: int) -> bytes:
    return (PHOTOS / ROWS[index]["image"]).read_bytes()


def members_of(index: int) -> list[tuple[str, bytes]]:
    row = {key: ROWS[index][key] for key in ("captions", "qa")}
    return [(f"{index:03d}.jpg", photo(index)), (f"{index:03d}.json", json.dumps(row).encode())]


@pytest.fixture
def photo_shards(tmp_path: Path) -> str:
    """The photographs in three shards, as a brace pattern."""
    for number, first in enumerate((0, 5, 10)):
        members = [member for index in range(first, min(first + 5, 13)) for member in members_of(index)]
        write_shard(tmp_path / f"photos-{number:02d}.tar", members)
    return str(tmp_path / "photos-{00..02}.tar")


def shards(address: str | list[str], tmp_path: Path, **settings) -> ImageTextShards:
    return ImageTextShards(address, cache=str(tmp_path / "cache"), **settings)


def test_shards_give_what_the_folder_gives(photo_shards, tmp_path):
    folder, packed = ImageTextFolder(str(PHOTOS / "annotations.json")), shards(photo_shards, tmp_path)
    assert packed.branch_length("understanding") == packed.branch_length("generation") == 13
    for index in (12, 0, 7, 4, 5):  # any order
        one, other = (source.sample("understanding", index, RNG()) for source in (folder, packed))
        assert (one.question, one.answer) == (other.question, other.answer)
        assert (np.asarray(one.image) == np.asarray(other.image)).all()
    assert packed.sample("generation", 7, RNG()).name == photo_shards.replace("{00..02}", "01") + ": 007"


@pytest.mark.parametrize("suffix", ["gif", "bmp", "TIFF", "ppm", "avif"])
def test_images_of_every_format_that_folders_read(suffix, tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (12, 12), "red").save(file, suffix)
    write_shard(tmp_path / "a.tar", [(f"a.{suffix}", file.getvalue()), ("a.txt", "\ufeffa red square".encode())])
    sample = shards(str(tmp_path / "a.tar"), tmp_path).sample("generation", 0, RNG())
    assert sample.caption == "a red square" and np.asarray(sample.image)[0, 0, 0] > 240


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("a-{2..0}", ["a-2", "a-1", "a-0"]),
        ("{x,y}/{0..1}", ["x/0", "x/1", "y/0", "y/1"]),
        ("pipe:cat ${HOME}/{1..2} | awk '{print}'", [f"pipe:cat ${{HOME}}/{i} | awk '{{print}}'" for i in (1, 2)]),
    ],
)
def test_braces(pattern, expanded):
    assert expand_braces(pattern) == expanded


def test_text_members_and_other_members(tmp_path):
    path = write_shard(
        tmp_path / "mixed.tar",
        [
            ("d/a.PNG.jpg", b"no image member: the suffix is PNG.jpg"),
            ("d/a.jpg", photo(0)),
            ("d/a.txt", "a 🚀 flies\n".encode()),
            ("d/a.json", json.dumps({"caption": "a 🚀 flies", "qa": [{"question": "q", "answer": "a"}]}).encode()),
            ("d/._a.jpg", b"the litter of a file manager"),
            ("e/a.jpeg", photo(1)),
            ("e/a.cls", b"3"),
            ("e/b.txt", b"text without image"),
            ("e/c.webp", photo(2)),
            ("e/c.json", b"[1, 2"),
            ("e/d.jpg", photo(3)),
            ("e/d.txt", b"first"),
            ("e/d.jpg", photo(4)),
            ("e/d.txt", b"second"),
        ],
    )
    source = shards(str(path), tmp_path)
    assert len(source) == 6  # d/a, e/a, e/b, e/c, e/d, e/d
    assert source.branch_length("generation") == 4  # without the two that lack text or image
    captions = []
    for index in (0, 2, 3):
        captions.append(source.sample("generation", index, RNG()).caption)
    assert captions == ["a 🚀 flies", "first", "second"]
    with pytest.raises(BrokenSampleError, match=r"mixed.tar: e/c: .*"):
        source.sample("generation", 1, RNG())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_captions_as_editors_on_windows_save_them(encoding, tmp_path):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    members = [("a.jpg", photo(0)), ("a.txt", f"{mark}ein grüner Käfer\r\n".encode(encoding))]
    source = shards(str(write_shard(tmp_path / "a.tar", members)), tmp_path)
    assert source.sample("generation", 0, RNG()).caption == "ein grüner Käfer"


def test_a_caption_in_another_encoding_is_not_trained_on(tmp_path):
    members = [("a.jpg", photo(0)), ("a.txt", "ein grüner Käfer".encode("cp1252"))]
    source = shards(str(write_shard(tmp_path / "a.tar", members)), tmp_path)
    with pytest.raises(BrokenSampleError, match=r"a.tar: a: its .txt member is no text in UTF-8 .*: save it as UTF-8"):
        source.sample("generation", 0, RNG())


def test_pipe_is_run_once_for_a_shard_that_is_read(photo_shards, tmp_path):
    log = tmp_path / "runs"
    pattern = f"pipe:echo run >> {log}; cat {photo_shards}"
    for _ in range(2):
        source = shards(pattern, tmp_path)
        assert source.sample("generation", 12, RNG()).caption in ROWS[12]["captions"]
    assert log.read_text().count("run") == 2  # the first shard, and the last


def test_failing_pipe_is_reported_and_leaves_nothing(photo_shards, tmp_path):
    address = f"pipe:cat {photo_shards.replace('{00..02}', '00')}; echo no such bucket >&2; exit 3"
    with pytest.raises(ValueError, match=r"(?s)exit code 3 .*no such bucket"):
        shards(address, tmp_path)
    assert [path for path in (tmp_path / "cache").iterdir() if path.suffix in (".tar", ".part")] == []


def test_index_is_reused_until_the_shard_changes(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "a.tar", members_of(0) + members_of(1))
    scans = []
    scan = shard_index_module._scan
    monkeypatch.setattr(shard_index_module, "_scan", lambda *arguments: scans.append(arguments) or scan(*arguments))
    assert [len(shards(str(path), tmp_path)) for _ in range(3)] == [2, 2, 2]
    assert len(scans) == 1
    shards(str(path), tmp_path, caption_key="text")  # may serve other branches
    assert len(scans) == 2
    write_shard(path, members_of(0) + members_of(1) + members_of(2))
    assert len(shards(str(path), tmp_path)) == 3
    assert len(scans) == 3


def cut(path: Path, member: str, into: int) -> None:
    """Cut a shard off some bytes into a member."""
    with tarfile.open(path) as tar:
        offset = tar.getmember(member).offset_data
    with path.open("r+b") as file:
        file.truncate(offset + into)


@pytest.mark.parametrize(
    ("member", "into"), [("002.jpg", 1000), ("002.json", -700), ("002.json", -100), ("002.json", 20)]
)
def test_truncated_shard(tmp_path, caplog, member, into):
    path = write_shard(tmp_path / "a.tar", [member for index in range(4) for member in members_of(index)])
    cut(path, member, into)
    source = shards(str(path), tmp_path)
    assert f"{path}: it is cut off or damaged" in caplog.text
    assert source.branch_length("generation") == 3
    for index in range(2):
        assert source.sample("generation", index, RNG()).caption in ROWS[index]["captions"]
    with pytest.raises(BrokenSampleError, match=r"a.tar: 002: the shard is cut off inside this sample"):
        source.sample("generation", 2, RNG())


def test_garbage_inside_a_shard_is_not_taken_for_its_end(tmp_path, caplog):
    path = write_shard(tmp_path / "a.tar", [member for index in range(4) for member in members_of(index)])
    with tarfile.open(path) as tar:
        header = tar.getmember("002.jpg").offset
    with path.open("r+b") as file:
        file.seek(header)
        file.write(b"x" * 512)
    assert len(shards(str(path), tmp_path)) == 2
    assert f"cut off or damaged near byte {header}" in caplog.text


def test_whole_shards_are_not_called_damaged(photo_shards, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        shards(photo_shards, tmp_path)
    assert not caplog.records


@pytest.mark.parametrize(
    "content", [b"", b"not a tar", gzip.compress(bytes(10240), mtime=0)], ids=["empty", "text", "gzip"]
)
def test_what_is_no_tar_is_refused(content, tmp_path):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.tar is not an uncompressed tar file"):
        shards(str(tmp_path / "a.tar"), tmp_path)


def test_missing_and_empty_shards_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no shard .*b.tar"):
        shards(str(tmp_path / "b.tar"), tmp_path)
    with pytest.raises(ValueError, match=r"hold no samples: .*c.tar"):
        shards(str(write_shard(tmp_path / "c.tar", [])), tmp_path)
    with pytest.raises(ValueError, match=r"none were given"):
        shards([], tmp_path)


def test_processes_share_one_fetch(photo_shards, tmp_path):
    log = tmp_path / "runs"
    address = f"pipe:echo run >> {log}; sleep 0.3; cat {photo_shards.replace('{00..02}', '00')}"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=shards, args=(address, tmp_path)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text().count("run") == 1
