"""Whatever lies where a checkpoint should: nothing of it is executed, and one true message says what it is."""

import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_model

from infotok_lit.checkpoints import (
    exported_family,
    find_checkpoint,
    newest_checkpoint,
    read_folder,
    read_run,
    read_weights,
    run_checkpoint,
)
from infotok_lit.commands.fit_resume import chosen_checkpoint
from infotok_lit.errors import ExplainedError, MissingFileError
from infotok_lit.models.export import export_model
from infotok_lit.models.family import load_folder
from infotok_lit.modules import HarmonModule
from infotok_lit.weight_files import CheckpointError, local_checkpoint

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(300)}
RUN = {"state_dict": STATE, "infotok_lit": {"family": "harmon"}, "global_step": 3}
BAIT = ("likely succeed", "weights_only=False", "`weights_only` to `False`", "add_safe_globals")
"""Advice of torch that would have a user execute the file."""


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return (os.mkdir, (str(self.witness),))


def as_run(path: Path) -> None:
    run_checkpoint(path)


def as_init_from(path: Path) -> None:
    HarmonModule(init_from=str(path)).configure_model()


def as_part(path: Path) -> None:
    weights = path.with_name("harmon_0.5b.pth")
    torch.save({"mar.z_proj.bias": torch.zeros(1)}, weights)
    HarmonModule(size="0.5b", init_from=str(weights), parts={"autoencoder": str(path)}).configure_model()


ROADS = [read_weights, read_run, as_run, as_init_from, as_part]


@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.__name__)
@pytest.mark.parametrize("save", [torch.save, "legacy", "pickle"])
def test_nothing_is_executed_on_any_road(tmp_path, road, save) -> None:
    witness, path = tmp_path / "executed", tmp_path / "weights.ckpt"
    content = {**RUN, "helper": Payload(witness)}
    if save == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=save is torch.save)
    with pytest.raises(ExplainedError) as refused:
        road(path)
    assert not witness.exists()
    assert ("a plain pickle" if save == "pickle" else "mkdir") in str(refused.value), "it says what would have run"
    assert not any(bait in str(refused.value) for bait in BAIT) and "\n" not in str(refused.value)
    pickle.loads(pickle.dumps(Payload(witness)))
    assert witness.exists(), "the payload works where it is let"


def test_a_torchscript_archive_is_not_read(tmp_path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(STATE, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("weights/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="TorchScript") as refused:
        read_weights(path)
    assert not any(bait in str(refused.value) for bait in BAIT)


@pytest.mark.parametrize(
    "scheme", ["http://h/", "https://h/", "s3://b/", "memory://", "hf://o/n/", "simplecache::http://h/"]
)
@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.__name__)
def test_a_url_is_refused_with_the_mend(tmp_path, road, scheme) -> None:
    if scheme == "hf://o/n/" and road in (as_init_from, as_part):
        pytest.skip("a name on the hub is a source of weights: tests/export/test_hub.py")
    url = f"{scheme}weights.ckpt"
    with pytest.raises(CheckpointError, match="is a URL.*download it first"):
        if road is as_part:
            torch.save({"mar.z_proj.bias": torch.zeros(1)}, tmp_path / "h.pth")
            init = {"size": "0.5b", "init_from": str(tmp_path / "h.pth"), "parts": {"autoencoder": url}}
            HarmonModule(**init).configure_model()
        elif road is as_init_from:
            HarmonModule(init_from=url).configure_model()
        else:
            road(url)


def test_a_file_url_is_told_to_be_a_path() -> None:
    with pytest.raises(CheckpointError, match="without the scheme"):
        local_checkpoint("file:///tmp/weights.ckpt")
    for path in ("C/weights.ckpt", "a:b", "runs/x y/last.ckpt", "/tmp/a::b", "step=3-loss=0.1.ckpt"):
        assert local_checkpoint(path) == Path(path)


# Damage


def same(left: object, right: object) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def test_a_changed_bit_is_noticed_or_changes_nothing(tmp_path) -> None:
    whole = tmp_path / "whole.ckpt"
    torch.save(RUN, whole)
    content, path, noticed = whole.read_bytes(), tmp_path / "last.ckpt", 0
    rng = random.Random(0)
    for position in (
        *rng.sample(range(len(content)), 150),
        *(content.index(STATE["b"].numpy().tobytes()) + i for i in range(9)),
    ):
        changed = bytearray(content)
        changed[position] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            assert same(read_run(path), RUN)
            run_checkpoint(path)
        except CheckpointError as error:
            noticed += 1
            assert "last.ckpt" in str(error)
    assert noticed > 50


def test_the_newest_whole_checkpoint_is_taken_and_the_damaged_one_named(tmp_path) -> None:
    for number, name in enumerate(("old", "middle", "new", "newest")):
        torch.save({**RUN, "global_step": number}, tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (number, number))
    data = STATE["b"].numpy().tobytes()
    flipped = (tmp_path / "newest.ckpt").read_bytes().replace(data, b"\x01" + data[1:])
    for name, content in (("newest", flipped), ("new", (tmp_path / "new.ckpt").read_bytes()[:-30])):
        (tmp_path / f"{name}.ckpt").write_bytes(content)
        os.utime(tmp_path / f"{name}.ckpt", (9, 9))
    (tmp_path / "folder.ckpt").mkdir()
    with pytest.warns(UserWarning) as said:
        assert find_checkpoint(tmp_path) == tmp_path / "middle.ckpt"
    texts = [str(warning.message) for warning in said]
    assert any("newest.ckpt is passed over" in text and "checksum" in text for text in texts)
    assert any("new.ckpt is passed over" in text and "truncated" in text for text in texts)


def test_fit_refuses_to_resume_from_what_is_no_whole_checkpoint(tmp_path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(RUN, path)
    data = STATE["b"].numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(data, b"\x01" + data[1:]))
    for given, message in (
        (str(path), "the checksum of"),
        (f"file://{path}", "is a URL"),
        ("http://h/last.ckpt", "is a URL"),
        ("simplecache::s3://a/b.ckpt", "is a URL"),
    ):
        with pytest.raises(CheckpointError, match=message):
            chosen_checkpoint(None, given, {}, "fit")


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "web page": (
        lambda path: path.write_text("\n<!DOCTYPE html><html><body>Sign in</body>"),
        "web page; download the file",
    ),
    "error page": (
        lambda path: path.write_text('<?xml version="1.0"?><Error>AccessDenied</Error>'),
        "it is a web page",
    ),
    "pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"),
        "Git LFS pointer; .*git lfs pull",
    ),
    "text": (lambda path: path.write_text("müde\n" * 300), "it is a text file"),
    "json": (lambda path: path.write_text('{"a": 1}'), "it is a text file"),
    "empty": (lambda path: path.touch(), "it is empty.*truncated"),
    "noise": (lambda path: path.write_bytes(random.Random(0).randbytes(999)), "damaged or truncated"),
    "pipe": (os.mkfifo, "it is no file"),
}


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path, kind, suffix) -> None:
    path = tmp_path / f"weights{suffix}"
    make, message = KINDS[kind]
    make(path)
    with pytest.raises(CheckpointError, match=rf"weights{suffix} cannot be read: .*{message}") as refused:
        read_weights(path)
    assert "\n" not in str(refused.value)


def test_a_folder_or_nothing_is_no_run(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="it is a folder"):
        run_checkpoint(tmp_path)
    with pytest.raises(MissingFileError, match=r"no checkpoint at .*gone\.ckpt"):
        run_checkpoint(tmp_path / "gone.ckpt")
    assert newest_checkpoint([tmp_path]) is None
    for content in (
        [1],
        {"state_dict": {}},
        {"infotok_lit": 3, "state_dict": {}},
        {"infotok_lit": {}, "state_dict": 3},
    ):
        torch.save(content, tmp_path / "other.ckpt")
        with pytest.raises(CheckpointError, match="is not a checkpoint of an infotok_lit run"):
            run_checkpoint(tmp_path / "other.ckpt")


# Headers and configurations that are built to do harm


def header(text: str, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text.encode() + data


def entry(**changes: object) -> str:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}})


@pytest.mark.parametrize(
    "content",
    [
        header(entry(), b"\0" * 4, length=2**63),
        header(entry(), b"\0" * 4, length=2**40),
        header('{"a":' * 5000, length=25000),
        header("[" * 100_000),
        header(entry(data_offsets=[0, 2**60]), b"\0" * 4),
        header(entry(data_offsets=[4, 0]), b"\0" * 4),
        header(entry(shape=[2**62, 2**62]), b"\0" * 4),
        header(entry(shape=[-1]), b"\0" * 4),
        header(entry(dtype="PICKLE"), b"\0" * 4),
        header('{"a": 3}'),
        header("\0" * 8),
    ],
)
def test_a_hostile_header_is_one_message(tmp_path, content) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors cannot be read: it is damaged"):
        read_weights(path)


@pytest.mark.parametrize("shard", ["../weights.bin", "/etc/passwd", ".", "..", "", 3, None, ["a"], "sub/weights.bin"])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, shard) -> None:
    torch.save(STATE, tmp_path / "weights.bin")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="is not an index of weights"):
        read_weights(folder)


def test_folders_that_hold_themselves_end(tmp_path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(CheckpointError, match="it is a folder"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b'{"format": 1, "family": "harmon", "config": ' + b'{"a":' * 100_000,
        b"\xff\xfe",
        b"[]",
        b"null",
        b'"format"',
        b'{"format": 1, "family": "harmon"}',
        b'{"format": 1, "family": ["harmon"], "config": {}}',
        b'{"format": 1, "family": "harmon", "config": []}',
        b'{"format": 2, "family": "harmon", "config": {}}',
    ],
)
def test_a_hostile_configuration_is_one_message(tmp_path, content) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert exported_family(tmp_path) in (None, "harmon")
    with pytest.raises(CheckpointError, match=r"config\.json (does not describe an exported model|has format 2)"):
        read_folder(tmp_path)
    with pytest.raises(ExplainedError):
        load_folder(tmp_path)


def test_the_tokenizer_of_an_export_runs_no_code(tmp_path, monkeypatch) -> None:
    """A tokenizer with `auto_map` asks whether to run its code, unless it is told not to."""
    folder, witness = tmp_path / "out", tmp_path / "executed"
    export_model(tiny_model(), folder, {})
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(witness)!r})\nclass Evil:\n    pass\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run the code"))
    try:
        load_folder(folder)
    except ExplainedError as error:
        assert "trust_remote_code=True" not in str(error)
    assert not witness.exists()


def test_weights_are_still_read(tmp_path) -> None:
    torch.save(STATE, tmp_path / "a.pth")
    torch.save(STATE, tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "c.safetensors")
    # Its first bytes are the length of a header, whatever they look like.
    save_file(STATE, tmp_path / "d.safetensors", metadata={"pad": "x" * (0x0380 - 0x95)})
    assert (tmp_path / "d.safetensors").read_bytes()[:2] == b"\x80\x03", "as a pickle begins"
    for path in tmp_path.iterdir():
        assert same(read_weights(path), STATE)
    torch.save(RUN, tmp_path / "d.ckpt")
    assert run_checkpoint(tmp_path / "d.ckpt") == tmp_path / "d.ckpt"
