"""Data that was made to harm, or was harmed: nothing runs, nothing hangs, and whatever is left out is named."""

import io
import json
import logging
import os
import stat
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infotok_lit.batch import BrokenSampleError, Source
from infotok_lit.data.image_file import read_image
from infotok_lit.data.image_text import ImageTextFolder
from infotok_lit.data.shards import ImageTextShards
from infotok_lit.errors import ExplainedError

RNG = partial(np.random.default_rng, 0)
DEEP = b"[" * 100_000 + b"]" * 100_000


def png(colour: str = "red", size: tuple[int, int] = (12, 12)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def shard(path: Path, **captions: str | bytes) -> Path:
    """A sample per name: a picture with its caption, or with the bytes of its .json."""
    with tarfile.open(path, "w") as tar:
        for name, text in captions.items():
            add(tar, f"{name}.png", png())
            if isinstance(text, str):
                add(tar, f"{name}.txt", text.encode())
            else:
                add(tar, f"{name}.json", text)
    return path


def shards(path: Path, **settings) -> ImageTextShards:
    return ImageTextShards(str(path), cache=str(path.parent / "cache"), **settings)


def folder(path: Path, rows: list[dict], **settings) -> ImageTextFolder:
    (path / "a.png").write_bytes(png())
    (path / "rows.json").write_text(json.dumps(rows))
    return ImageTextFolder(str(path / "rows.json"), **settings)


def captions(source: Source) -> list[str]:
    """The caption of every sample, or why there is none."""
    found = []
    for index in range(source.branch_length("generation")):
        try:
            found.append(source.sample("generation", index, RNG()).caption)
        except BrokenSampleError as error:
            found.append(str(error))
    return found


def in_time(call, seconds: float = 120.0) -> list:
    """What a call that must not hang returns or raises."""
    answer = []

    def attempt() -> None:
        try:
            answer.append(call())
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    return answer


# Images


def test_no_image_starts_a_program(tmp_path, monkeypatch) -> None:
    """Pillow hands PostScript to Ghostscript; here stands a program of that name that leaves a trace."""
    trace, program = tmp_path / "it_ran", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"
    path = tmp_path / "picture.jpg"
    path.write_bytes(postscript)
    for source in (path, postscript):
        with pytest.raises(BrokenSampleError, match=r"not an image of a known format \(JPEG, PNG"):
            read_image(source)
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_no_image(tmp_path, kind) -> None:
    path = tmp_path / "a.jpg"
    {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "device": lambda: path.symlink_to("/dev/zero")}[kind]()
    (error,) = in_time(partial(read_image, path))
    assert isinstance(error, BrokenSampleError) and "a folder, a pipe or a device, not a file" in str(error)


def test_too_many_pixels_are_a_broken_sample(tmp_path) -> None:
    rows = [{"image": "a.png", "caption": "small"}, {"image": "b.png", "caption": "large"}]
    (tmp_path / "b.png").write_bytes(png(size=(40, 50)))
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a.png", png())
        add(tar, "a.txt", b"small")
        add(tar, "b.png", png(size=(40, 50)))
        add(tar, "b.txt", b"large")
    for source in (folder(tmp_path, rows, max_pixels=1999), shards(path, max_pixels=1999)):
        small, large = captions(source)
        assert small == "small"
        assert large.endswith("40x50 pixels: more than the limit of 1999 pixels in all")
    assert captions(folder(tmp_path, rows, max_pixels=2000)) == ["small", "large"]
    for wrong in ({"max_pixels": 0}, {"min_side": 0}, {"max_aspect": 1.0}):
        with pytest.raises(ExplainedError, match=next(iter(wrong))):
            folder(tmp_path, rows, **wrong)


# Rows


def test_deeply_nested_rows_are_broken_rows(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    good = json.dumps({"image": "a.png", "caption": 'a [bracket] and a "quote" {'}).encode()
    deep = b'{"image": "a.png", "caption": ' + DEEP + b"}"
    (tmp_path / "lines.jsonl").write_bytes(good + b"\n" + deep + b"\n" + good)
    (tmp_path / "list.json").write_bytes(b"[" + good + b", " + deep + b",\n" + good + b"]")
    (tmp_path / "only.json").write_bytes(DEEP)
    for name, where in (("lines.jsonl", "lines.jsonl, line 2"), ("list.json", "list.json, row 1")):
        first, second, third = captions(ImageTextFolder(str(tmp_path / name)))
        assert first == third == 'a [bracket] and a "quote" {'
        assert where in second and second.endswith("nested more than 32 levels deep")
    (only,) = captions(ImageTextFolder(str(tmp_path / "only.json")))
    assert "only.json, row 0" in only


@pytest.mark.parametrize("depth", [40, 400, 100_000])
def test_depth_that_one_place_can_read_and_another_cannot_is_refused_everywhere(tmp_path, depth) -> None:
    nested = b"[" * depth + b"]" * depth
    (tmp_path / "text.json").write_bytes(b'{"caption": ' + nested + b"}")
    source = folder(tmp_path, [{"image": "a.png", "annotation": "text.json"}])
    assert captions(source)[0].endswith("nested more than 32 levels deep")
    path = shard(tmp_path / "a.tar", good="fine", deep=b'{"caption": ' + nested + b"}", also="well")
    fine, broken, well = captions(shards(path))
    assert (fine, well) == ("fine", "well")
    assert "a.tar: deep: " in broken and "nested more than 32 levels deep" in broken


def test_commands_in_data_are_names_of_files(tmp_path) -> None:
    trace = tmp_path / "it_ran"
    command = f"pipe:touch {trace}"
    rows = [{"image": command, "caption": "a"}, {"image": "a.png", "annotation": command}]
    assert all("there is no" in text for text in captions(folder(tmp_path, rows)))
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, f"{command}.png", png())
        add(tar, f"{command}.json", json.dumps({"caption": "a", "image": command, "shards": command}).encode())
    assert captions(shards(path)) == ["a"]
    assert not trace.exists()


# Tar files


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(**fields: str) -> bytes:
    """An extended header that overrides fields of the next one."""
    lines = b"".join(b"%d %s=%s\n" % (len(k) + len(v) + 5, k.encode(), v.encode()) for k, v in fields.items())
    return header("pax", len(lines), tarfile.XHDTYPE) + lines.ljust(512, b"\0")


FORGED = {
    "negative size": header("c.png", -512),
    "size beyond the end": header("c.png", 2**60),
    "text of that size": header("c.png", 0) + header("c.json", 2**62),
    "negative size in an extended header": pax(size="-1024") + header("c.png", 0),
    "long names without end": header("long", 512, tarfile.GNUTYPE_LONGNAME) * 3000,
    "a negative long name": header("long", -512, tarfile.GNUTYPE_LONGNAME),
    "letters for numbers": b"c.png".ljust(100, b"\0") + b"z" * 412,
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_headers_end_the_shard_there_and_are_said(tmp_path, caplog, kind) -> None:
    path = shard(tmp_path / "a.tar", a="first", b="second")
    with tarfile.open(path) as tar:
        end = max(member.offset_data + 512 for member in tar)
    path.write_bytes(path.read_bytes()[:end] + FORGED[kind] + bytes(1024))
    (found,) = in_time(lambda: captions(shards(path)))
    assert found[:2] == ["first", "second"]
    assert all("cut off inside this sample" in text for text in found[2:])
    assert f"{path}: it is cut off or damaged near byte" in caplog.text


def test_a_sparse_member_is_a_broken_sample(tmp_path) -> None:
    """Its bytes in the tar are not those of the file."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(png())
        info.pax_headers = {"GNU.sparse.map": "0,10", "GNU.sparse.size": "4096"}
        tar.addfile(info, io.BytesIO(png()))
        add(tar, "a.txt", b"holes")
    assert "sparse file" in captions(shards(path))[0]


def test_tars_one_after_another_are_one_shard(tmp_path, caplog) -> None:
    caplog.set_level(logging.WARNING)
    path = shard(tmp_path / "a.tar", a="first", b="second")
    other = shard(tmp_path / "b.tar", c="third")
    path.write_bytes(path.read_bytes() + other.read_bytes())
    assert captions(shards(path)) == ["first", "second", "third"]
    assert not caplog.records
    path.write_bytes(path.read_bytes() + b"and then this" * 100)
    assert captions(shards(path)) == ["first", "second", "third"]
    assert "cut off or damaged" in caplog.text


def test_names_with_several_dots(tmp_path, caplog) -> None:
    names = ("IMG_1.2", "IMG_1.3", "plain", "v1.0/a")
    assert captions(shards(shard(tmp_path / "a.tar", **{name: name for name in names}))) == list(names)
    assert "several dots" not in caplog.text
    path = tmp_path / "b.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.png", "a.mask.png", "a.mask.2.png"):
            add(tar, name, png())
        add(tar, "a.txt", b"a")
    assert captions(shards(path)) == ["a"]
    assert "2 members are part of no sample" in caplog.text and "a.mask.png" in caplog.text


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-9], lambda content: DEEP])
def test_a_damaged_index_is_made_again(tmp_path, caplog, damage) -> None:
    path = shard(tmp_path / "a.tar", a="first", b="second")
    shards(path)
    (index,) = (tmp_path / "cache").glob("*.index.json")
    whole = index.read_bytes()
    index.write_bytes(damage(whole))
    assert captions(shards(path)) == ["first", "second"]
    assert f"the index {index} is damaged" in caplog.text
    assert index.read_bytes() == whole


def test_one_changed_digit_in_an_index_is_noticed(tmp_path, caplog) -> None:
    """It would pair images with texts of others."""
    path = shard(tmp_path / "a.tar", a="first", b="second")
    shards(path)
    (index,) = (tmp_path / "cache").glob("*.index.json")
    index.write_bytes(index.read_bytes().replace(b"1536", b"4608", 1))
    assert captions(shards(path)) == ["first", "second"]
    assert "is damaged" in caplog.text
