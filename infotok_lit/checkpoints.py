"""Checkpoints: official names, weights in files and folders, the checkpoints of runs, and exported folders.

weight_files.py says how a file is read without executing anything. Every load is strict and names what does not fit.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from infotok_lit.errors import MissingFileError
from infotok_lit.sharded_checkpoints import check_sharded, is_sharded_checkpoint, read_sharded, read_sharded_meta
from infotok_lit.weight_files import (
    CheckpointError,
    check_checksums,
    check_kind,
    check_tensors,
    local_checkpoint,
    read_json,
    read_pickle,
    read_safetensors,
)

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]

SHOWN = 5
"""How many names a message lists."""


# Names: official ones and ours


@dataclass(frozen=True)
class KeyMap:
    """Our parameter names -> official ones, by regular-expression substitutions applied in order.

    It is inverted over the names that a model has, so it needs no second table.
    """

    renames: tuple[tuple[str, str], ...]
    tied: tuple[tuple[str, str], ...] = ()
    """Pairs of official names that hold one tensor; a file may lack either, and the second counts where they differ."""
    pointwise: str | None = None
    """Official names (a regular expression) that store a linear map as a 1x1 convolution."""

    def official_name(self, name: str) -> str:
        """The official name of our parameter `name`."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def to_official(self, state: Mapping[str, Tensor]) -> State:
        """Our state dict under official names and shapes."""
        official = {self.official_name(name): tensor for name, tensor in state.items()}
        if len(official) != len(state):
            raise AssertionError("two parameters share an official name: the key map is not invertible")
        return {name: self._to_official_shape(name, tensor) for name, tensor in official.items()}

    def from_official(self, official: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> State:
        """An official state dict under our names, checked against our own state dict `own`.

        Raises:
            CheckpointError: naming missing, unexpected and mis-shaped keys.
        """
        official = self._complete_tied(official)
        expected = {self.official_name(name): name for name in own}
        shapes = {name: self._to_official_shape(name, own[ours]).shape for name, ours in expected.items()}
        problems = {
            "missing": sorted(expected.keys() - official.keys()),
            "unexpected": sorted(official.keys() - expected.keys()),
            "mis-shaped": sorted(
                f"{name} {tuple(tensor.shape)}, expected {tuple(shapes[name])}"
                for name, tensor in official.items()
                if name in shapes and tensor.shape != shapes[name]
            ),
        }
        if any(problems.values()):
            raise CheckpointError(_describe_problems(problems, source))
        official |= {first: official[second] for first, second in self.tied}
        return {ours: official[name].reshape(own[ours].shape) for name, ours in expected.items()}

    def _to_official_shape(self, name: str, tensor: Tensor) -> Tensor:
        if self.pointwise is not None and re.fullmatch(self.pointwise, name):
            return tensor[:, :, None, None]
        return tensor

    def _complete_tied(self, official: Mapping[str, Tensor]) -> State:
        completed = dict(official)
        for there, absent in (*self.tied, *(pair[::-1] for pair in self.tied)):
            if there in completed:
                completed.setdefault(absent, completed[there])
        return completed


class OfficialPart(NamedTuple):
    """The parameters that one official file holds."""

    prefixes: tuple[str, ...]
    """Beginnings of our names."""
    keys: KeyMap
    """Our names -> official ones."""
    may_hold_more: bool = False
    """Whether official files hold names that no model needs, such as a discriminator's."""


def _describe_problems(problems: Mapping[str, Sequence[str]], source: str) -> str:
    lines = [f"the weights in {source} do not fit this model:"]
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  {len(names)} {kind}: {', '.join(names[:SHOWN])}{more}")
    lines.append("check that the model size in the config is that of the checkpoint")
    return "\n".join(lines)


# Weight files

WEIGHTS_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
"""What transformers and diffusers call the file in a folder; a large one is split, and described by FILE.index.json."""
WRAPPERS = ("state_dict", "model", "module")


def read_weights(source: str | Path) -> State:
    """The tensors of a .safetensors or .pth/.pt/.ckpt/.bin file, or of a folder that transformers or diffusers wrote.

    One wrapping dictionary (`state_dict`, `model` or `module`) and a leading `module.` in the names are removed.

    Raises:
        MissingFileError: if there is nothing at `source`.
        CheckpointError: if it cannot be read, is damaged, or holds anything but tensors.
    """
    path = local_checkpoint(source)
    if path.is_dir():
        return _read_folder(path)
    return _read_file(path)


def _read_file(path: Path) -> State:
    loaded = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    return unwrap(loaded, str(path))


def unwrap(loaded: object, source: str) -> State:
    """The flat state dict inside what a checkpoint file held."""
    from torch import Tensor

    for wrapper in WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{source} holds no state dict (a dictionary of tensors)")
    return {str(name).removeprefix("module."): tensor for name, tensor in loaded.items()}


def _read_folder(path: Path) -> State:
    for name in WEIGHTS_FILES:
        if (path / name).exists():
            return _read_file(path / name)
        index = path / f"{name}.index.json"
        if index.exists():
            return {key: tensor for shard in _shards(index) for key, tensor in _read_file(path / shard).items()}
    raise MissingFileError(f"{path} holds neither {' nor '.join(WEIGHTS_FILES)}, whole or split with an index")


def _shards(index: Path) -> list[str]:
    names = read_json(index, "is not an index of weights").get("weight_map")
    if not isinstance(names, dict) or not all(_is_plain_name(name) for name in names.values()):
        raise CheckpointError(f"{index} is not an index of weights: fetch it again")
    return sorted(set(names.values()))


def _is_plain_name(name: object) -> bool:
    """Whether this names a file in the same folder, and neither a folder nor a way out."""
    return isinstance(name, str) and name == Path(name).name and name not in ("", "..")


# Runs: what `fit` leaves

CHECKPOINT_KEY = "infotok_lit"
"""Where a training checkpoint says what rebuilds its model."""


def find_checkpoint(source: Path) -> Path | None:
    """The training checkpoint at `source`: itself, or the newest one inside a run folder; None if neither."""
    if source.is_dir() and not is_sharded_checkpoint(source):
        return newest_checkpoint([source])
    return source if source.suffix == ".ckpt" and is_run_checkpoint(source) else None


def newest_checkpoint(folders: Sequence[Path]) -> Path | None:
    """The newest whole checkpoint of a run below some folders; None if there is none.

    One that is damaged (by a killed run, or a disk) is passed over with a warning. Each candidate is read once.
    """
    for path in newest_first(checkpoints_below(folders)):
        try:
            return run_checkpoint(path)
        except (CheckpointError, MissingFileError) as error:
            warnings.warn(f"{path} is passed over for an older checkpoint: {error}", stacklevel=2)
    return None


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Checkpoints by the time of their writing; `last` stands before the one that it is a link to."""
    return sorted(paths, key=lambda path: (-path.stat().st_mtime, not path.stem.startswith("last"), path))


def checkpoints_below(folders: Sequence[Path]) -> set[Path]:
    """What has the name of a training checkpoint below some folders: files, and sharded ones."""
    found = (path for folder in folders for path in folder.rglob("*.ckpt"))
    return {path for path in found if path.is_file() or is_sharded_checkpoint(path)}


def run_checkpoint(source: str | Path) -> Path:
    """The checkpoint file to resume a run from, after a look at all of it.

    Raises:
        MissingFileError: if there is none.
        CheckpointError: if it is a URL, a folder, damaged, or no checkpoint of a run; the message says which.
    """
    path = local_checkpoint(source)
    check_checkpoint(path)
    _require_run(read_settings(path), path)
    return path


def check_checkpoint(path: Path) -> None:
    """Read all of a training checkpoint, a file or a folder, and compare its checksums.

    Raises:
        MissingFileError: if there is none.
        CheckpointError: if it is not what was written.
    """
    if is_sharded_checkpoint(path):
        check_sharded(path)
    else:
        check_kind(path)
        check_checksums(path)


def read_settings(path: Path) -> Any:
    """What a training checkpoint holds, of which only what is no tensor is sure to be there; little of it is read."""
    return read_sharded_meta(path) if is_sharded_checkpoint(path) else read_pickle(path, checked=False)


def is_run_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint of a run of ours (and not, say, the official kl16.ckpt)."""
    try:
        _require_run(read_settings(path), path)
    except (CheckpointError, MissingFileError):
        return False
    return True


def read_run(source: str | Path) -> dict[str, Any]:
    """A run's checkpoint: its state dict, and under "infotok_lit" what rebuilds the model; no optimiser is read.

    Raises:
        MissingFileError: if there is none.
        CheckpointError: if the file is damaged or is not one of ours.
    """
    path = local_checkpoint(source)
    if is_sharded_checkpoint(path):
        checkpoint = read_sharded(path, optimiser=False)
        _require_run(checkpoint, path)
        return checkpoint
    checkpoint = read_pickle(path, checked=False)
    _require_run(checkpoint, path)
    states = (checkpoint["state_dict"], checkpoint.get("current_model_state", {}))
    check_tensors(path, (value for state in states for value in state.values()))
    return checkpoint


def _require_run(checkpoint: object, path: Path) -> None:
    if not (
        isinstance(checkpoint, dict)
        and isinstance(checkpoint.get(CHECKPOINT_KEY), dict)
        and isinstance(checkpoint.get("state_dict"), dict)
    ):
        raise CheckpointError(f"{path} is not a checkpoint of an infotok_lit run")


# The inference folder: what training leaves behind, and what every inference command reads
#
# config.json            {"format": 1, "family": ..., "config": {...}}
# <stem>.safetensors     weights under official names, one file per official file (`harmon`, `kl16`)
# tokenizer.json ...     the tokenizer
# README.md              the model card

CONFIG_FILE = "config.json"
FORMAT = 1
NO_EXPORT = "does not describe an exported model"


def write_config(folder: Path, family: str, config: dict[str, Any]) -> None:
    """Write config.json into a folder."""
    content = {"format": FORMAT, "family": family, "config": config}
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")


def exported_family(folder: Path) -> str | None:
    """The family of an exported folder; None for anything else, such as a folder that transformers wrote."""
    try:
        content = read_json(folder / CONFIG_FILE, NO_EXPORT)
    except CheckpointError:
        return None
    family = content.get("family")
    return family if {"format", "config"} <= content.keys() and isinstance(family, str) else None


def read_folder(folder: Path) -> tuple[str, dict[str, Any]]:
    """The family and the configuration in a folder's config.json.

    Raises:
        MissingFileError: if the folder has none.
        CheckpointError: if it is not one of ours.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        raise MissingFileError(f"{folder} is not an exported model: it has no {CONFIG_FILE}")
    content = read_json(path, NO_EXPORT)
    family, config = content.get("family"), content.get("config")
    if "format" not in content or not isinstance(family, str) or not isinstance(config, dict):
        raise CheckpointError(f"{path} {NO_EXPORT}: it needs `format`, `family` and `config`")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {content['format']}; this version of infotok_lit reads {FORMAT}")
    return family, config


def read_config(folder: Path, family: str, title: str) -> dict[str, Any]:
    """The configuration in a folder; CheckpointError if it holds another family than this, `title` in messages."""
    found, config = read_folder(folder)
    if found != family:
        raise CheckpointError(f"{folder} holds a {found} model, not {title}")
    return config


def first_existing(folder: Path, *names: str) -> Path:
    """The first of the files that is there; the first name where none is, for the error that follows."""
    paths = [folder / name for name in names]
    return next((path for path in paths if path.exists()), paths[0])
