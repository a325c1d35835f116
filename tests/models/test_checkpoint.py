"""Every kind of weight file is read; every kind of wrong one is named."""

import json

import pytest
import torch
from safetensors.torch import save_file

from infotok_lit.checkpoints import CheckpointError, KeyMap, read_weights

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(2)}


def same(loaded: dict[str, torch.Tensor]) -> bool:
    return loaded.keys() == STATE.keys() and all(torch.equal(loaded[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".pt", ".bin"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "module"])
def test_torch_files_flat_or_wrapped(tmp_path, suffix, wrapper) -> None:
    content = STATE if wrapper is None else {wrapper: STATE, "epoch": 3}
    torch.save(content, tmp_path / f"weights{suffix}")
    assert same(read_weights(tmp_path / f"weights{suffix}"))


def test_the_prefix_of_data_parallel_training_is_removed(tmp_path) -> None:
    torch.save({f"module.{name}": tensor for name, tensor in STATE.items()}, tmp_path / "weights.pth")
    assert same(read_weights(tmp_path / "weights.pth"))


FOLDER_FILES = ["model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin"]


@pytest.mark.parametrize("name", FOLDER_FILES)
def test_folders_as_transformers_and_diffusers_write_them(tmp_path, name) -> None:
    save = torch.save if name.endswith(".bin") else save_file
    save(STATE, tmp_path / name)
    assert same(read_weights(tmp_path / name))
    assert same(read_weights(tmp_path))
    shards = tmp_path / "sharded"
    shards.mkdir()
    files = {key: f"{number}-{name}" for number, key in enumerate(STATE)}
    for key, file in files.items():
        save({key: STATE[key]}, shards / file)
    (shards / f"{name}.index.json").write_text(json.dumps({"weight_map": files}))
    assert same(read_weights(shards))


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_truncated_file_is_named(tmp_path, name) -> None:
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(STATE, path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read.*truncated"):
        read_weights(path)


@pytest.mark.parametrize("content", [b"u", b"J\x01", b"X\x01\x00\x00\x00\xff", b"h\x07", b"}]s."])
def test_bytes_that_are_no_checkpoint_are_named(tmp_path, content) -> None:
    """Each has the unpickler fail in another way: no stack, too few bytes, no UTF-8, an unknown memo, no pair."""
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights.pth cannot be read"):
        read_weights(path)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_an_empty_file_is_named(tmp_path, name) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read"):
        read_weights(tmp_path / name)


class Harmful:
    """Something that a pickle could run."""


def test_a_file_with_more_than_tensors_is_not_executed(tmp_path) -> None:
    torch.save({"weights": STATE, "helper": Harmful()}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="weights_only=True.*save its state dict alone"):
        read_weights(tmp_path / "weights.pth")


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}])
def test_a_file_without_a_state_dict_is_named(tmp_path, content) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_weights(tmp_path / "weights.pth")


def test_nothing_there(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*missing\.pth"):
        read_weights(tmp_path / "missing.pth")
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors"):
        read_weights(tmp_path)


def test_a_key_map_inverts_itself() -> None:
    keys = KeyMap(renames=((r"^ours\.", "theirs."), (r"\.q\.", ".query.")), pointwise=r".*query\.weight")
    own = {"ours.q.weight": torch.randn(3, 4), "ours.bias": torch.randn(2)}
    official = keys.to_official(own)
    assert {name: tuple(t.shape) for name, t in official.items()} == {
        "theirs.query.weight": (3, 4, 1, 1),
        "theirs.bias": (2,),
    }
    back = keys.from_official(official, own, "a test")
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)
