"""Weight files of every kind are read; a wrong or damaged one is refused with a message that says what is wrong."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from tiny import tiny_harmon
from torch import Tensor

from infotok_lit.models.checkpoint import CheckpointError, KeyMap, read_weights

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2), "b.weight": torch.full((40,), 7.0)}
LINE = "(?s)"


def assert_read(path: Path, expected: dict[str, Tensor] = WEIGHTS) -> None:
    found = read_weights(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("suffix", ["pth", "pt", "ckpt", "bin"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "module"])
def test_pickled_files(tmp_path, suffix, wrapper) -> None:
    path = tmp_path / f"weights.{suffix}"
    torch.save(WEIGHTS if wrapper is None else {"epoch": 3, wrapper: WEIGHTS}, path)
    assert_read(path)


def test_safetensors(tmp_path) -> None:
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    assert_read(tmp_path / "a.safetensors")


def test_old_pickles_and_data_parallel_prefixes(tmp_path) -> None:
    prefixed = {f"module.{name}": value for name, value in WEIGHTS.items()}
    torch.save({"state_dict": prefixed}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_read(tmp_path / "old.pth")


@pytest.mark.parametrize("shard_size", [1000, 100])
def test_hugging_face_folders(tmp_path, shard_size) -> None:
    save_torch_state_dict(WEIGHTS, tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == 100)
    assert_read(tmp_path)


def test_nothing_there(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*absent.pth"):
        read_weights(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match="holds neither model.safetensors nor model.safetensors.index.json"):
        read_weights(tmp_path)


def test_a_missing_shard_is_named(tmp_path) -> None:
    save_torch_state_dict(WEIGHTS, tmp_path, max_shard_size=100)
    sorted(tmp_path.glob("*.safetensors"))[0].unlink()
    with pytest.raises(FileNotFoundError, match="model-00001-of-"):
        read_weights(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"metadata": {}}', '{"weight_map": 3}'])
def test_a_damaged_index_is_refused(tmp_path, content) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="model.safetensors.index.json is not an index of weights"):
        read_weights(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "old"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.2, 0.5, 0.9, 0.99])
def test_truncated_files(tmp_path, kind, share) -> None:
    path = tmp_path / ("cut.safetensors" if kind == "safetensors" else "cut.pth")
    if kind == "safetensors":
        save_file(WEIGHTS, path)
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=LINE + rf"{path} .*(truncated: fetch it again|holds more than tensors)"):
        read_weights(path)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>404</html>", b"\x00" * 300, b"version https://git-lfs"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_that_are_no_weights(tmp_path, suffix, content) -> None:
    path = tmp_path / f"page.{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path} "):
        read_weights(path)


@pytest.mark.parametrize(
    "content",
    [{}, [torch.ones(1)], torch.ones(1), {"lr": 0.1}, {"state_dict": {}}, {"model": {"a": torch.ones(1), "step": 3}}],
)
def test_files_without_a_state_dict(tmp_path, content) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="other.pth holds no state dict"):
        read_weights(tmp_path / "other.pth")


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_code_in_a_file_is_not_run(tmp_path) -> None:
    trace = tmp_path / "ran"
    torch.save({"state_dict": WEIGHTS, "payload": Payload(trace)}, tmp_path / "unsafe.pth")
    with pytest.raises(CheckpointError, match="holds more than tensors.*weights_only=True.*save its state dict alone"):
        read_weights(tmp_path / "unsafe.pth")
    assert not trace.exists()


def test_what_does_not_fit_is_named() -> None:
    model = tiny_harmon()
    official = model.official_weights()["harmon"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = dict(official)
    del wrong["mar.mask_token"]
    wrong["proj_in.0.weight"] = torch.zeros(3, 5)
    wrong["llm.extra.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as refusal:
        model.load_official_weights(wrong, "harmon.pth")
    message = str(refusal.value)
    for words in (
        "harmon.pth do not fit",
        "1 missing: mar.mask_token",
        "1 unexpected: llm.extra.weight",
        "1 mis-shaped: proj_in.0.weight (3, 5), expected (16, 16)",
        "model size",
    ):
        assert words in message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_long_list_is_cut_short() -> None:
    with pytest.raises(CheckpointError, match="105 unexpected: b000, b001, b002, b003, b004 and 100 more"):
        extra = {f"b{i:03}": torch.ones(1) for i in range(105)}
        KeyMap(renames=()).from_official(WEIGHTS | extra, WEIGHTS, "file")


def test_tensors_of_half_precision_are_cast_to_the_model() -> None:
    source, target = tiny_harmon(seed=1), tiny_harmon(seed=2)
    official = {name: value.bfloat16() for name, value in source.official_weights()["harmon"].items()}
    target.load_official_weights(official, "half")
    for name, value in target.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, source.state_dict()[name].bfloat16().float())


def test_index_files_name_their_shards_once(tmp_path) -> None:
    """An index may map many tensors to one shard, as every real one does."""
    save_file({"a": torch.ones(1), "b": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"c": torch.ones(2)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_read(tmp_path, {"a": torch.ones(1), "b": torch.zeros(1), "c": torch.ones(2)})
