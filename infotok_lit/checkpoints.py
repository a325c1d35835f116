"""Reading weight files, and translating between official parameter names and ours.

Every file is read with `weights_only=True`; every load is strict and names what does not fit.
"""

import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from infotok_lit.errors import ExplainedError, MissingFileError

State = dict[str, Tensor]

WEIGHTS_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
"""What transformers and diffusers call the file in a folder; a large one is split, and described by FILE.index.json."""
WRAPPERS = ("state_dict", "model", "module")
FILE_ERRORS = (RuntimeError, EOFError, OSError, zipfile.BadZipFile)
OPCODE_ERRORS = (AttributeError, LookupError, TypeError, ValueError, struct.error)
"""What the unpickler raises, beside its own error, for bytes that are no pickle."""
SHOWN = 5


class CheckpointError(ExplainedError, ValueError):
    """A checkpoint cannot be used; the message names the file, what is wrong, and the mend."""


@dataclass(frozen=True)
class KeyMap:
    """Our parameter names -> official ones, by regular-expression substitutions applied in order.

    It is inverted over the names that a model has, so it needs no second table.
    """

    renames: tuple[tuple[str, str], ...]
    tied: tuple[tuple[str, str], ...] = ()
    """Pairs of official names that hold one tensor; a file may lack either."""
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
        return {ours: official[name].reshape(own[ours].shape) for name, ours in expected.items()}

    def _to_official_shape(self, name: str, tensor: Tensor) -> Tensor:
        if self.pointwise is not None and re.fullmatch(self.pointwise, name):
            return tensor[:, :, None, None]
        return tensor

    def _complete_tied(self, official: Mapping[str, Tensor]) -> State:
        completed = dict(official)
        for first, second in self.tied:
            if first in completed or second in completed:
                completed.setdefault(first, completed.get(second))
                completed.setdefault(second, completed[first])
        return completed


def _describe_problems(problems: Mapping[str, Sequence[str]], source: str) -> str:
    lines = [f"the weights in {source} do not fit this model:"]
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  {len(names)} {kind}: {', '.join(names[:SHOWN])}{more}")
    lines.append("check that the model size in the config is that of the checkpoint")
    return "\n".join(lines)


def read_weights(path: str | Path) -> State:
    """The tensors of a .safetensors or .pth/.pt/.ckpt/.bin file, or of a folder that transformers or diffusers wrote.

    One wrapping dictionary (`state_dict`, `model` or `module`) and a leading `module.` in the names are removed.

    Raises:
        MissingFileError: if there is nothing at `path`.
        CheckpointError: if it cannot be read, is truncated, or holds anything but tensors.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFileError(f"no checkpoint at {path}")
    if path.is_dir():
        return _read_folder(path)
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    return unwrap(loaded, str(path))


def read_pickle(path: Path, mmap: bool = False) -> Any:
    """What a file written by torch.save holds, read with `weights_only=True`.

    Args:
        mmap: read tensors when they are used: to look into a large file.

    Raises:
        CheckpointError: if it is damaged, or holds anything that is not plain data.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if path.stat().st_size > 0 and "Weights only load failed" in str(error):
            raise CheckpointError(
                f"{path} holds more than tensors and plain data, so it is not read with weights_only=True; "
                f"save its state dict alone and load that ({_first_line(error)})"
            ) from error
        raise _unreadable(path, error) from error
    except (*FILE_ERRORS, *OPCODE_ERRORS) as error:
        raise _unreadable(path, error) from error


def _read_safetensors(path: Path) -> State:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({_first_line(error)}); it may be truncated: fetch it again")


def unwrap(loaded: object, source: str) -> State:
    """The flat state dict inside what a checkpoint file held."""
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
            return read_weights(path / name)
        index = path / f"{name}.index.json"
        if index.exists():
            return {key: tensor for shard in _shards(index) for key, tensor in read_weights(path / shard).items()}
    raise MissingFileError(f"{path} holds neither {' nor '.join(WEIGHTS_FILES)}, whole or split with an index")


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of weights ({_first_line(error)}): fetch it again") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# Runs: what `fit` leaves

CHECKPOINT_KEY = "infotok_lit"
"""Where a training checkpoint says what rebuilds its model."""


def find_checkpoint(source: Path) -> Path | None:
    """The training checkpoint at `source`: itself, or the newest one inside a run folder; None if neither."""
    if source.is_dir():
        return newest_checkpoint([source])
    return source if source.suffix == ".ckpt" and source.exists() and is_run_checkpoint(source) else None


def newest_checkpoint(folders: Sequence[Path]) -> Path | None:
    """The newest checkpoint of a run below some folders; None if there is none.

    A newer file that is no whole checkpoint is passed over with a warning: a run that is killed while it writes, and
    whose temporary folder is on another disk, leaves one.
    """
    found = {path for folder in folders for path in folder.rglob("*.ckpt")}
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        if is_run_checkpoint(path):
            return path
        warnings.warn(
            f"{path} is passed over: it is no checkpoint of a run, or was cut off while it was written", stacklevel=2
        )
    return None


def is_run_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint of a run of ours (and not, say, the official kl16.ckpt)."""
    try:
        return CHECKPOINT_KEY in read_pickle(path, mmap=True)
    except (CheckpointError, TypeError):
        return False


def read_run(path: Path) -> dict[str, Any]:
    """A run's checkpoint: its state dict, and under "infotok_lit" what rebuilds the model.

    Raises:
        CheckpointError: if the file is damaged or is not one of ours.
    """
    checkpoint = read_pickle(path)
    if not isinstance(checkpoint, dict) or CHECKPOINT_KEY not in checkpoint:
        raise CheckpointError(f"{path} is not a checkpoint of an infotok_lit run")
    return checkpoint


# The inference folder: what training leaves behind, and what every inference command reads
#
# config.json            {"format": 1, "family": ..., "config": {...}}
# <stem>.safetensors     weights under official names, one file per official file (`harmon`, `kl16`)
# tokenizer.json ...     the tokenizer
# README.md              the model card

CONFIG_FILE = "config.json"
FORMAT = 1


def write_config(folder: Path, family: str, config: dict[str, Any]) -> None:
    """Write config.json into a folder."""
    content = {"format": FORMAT, "family": family, "config": config}
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")


def exported_family(folder: Path) -> str | None:
    """The family of an exported folder; None for anything else, such as a folder that transformers wrote."""
    try:
        content = json.loads((folder / CONFIG_FILE).read_text())
        return content["family"] if "format" in content else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_folder(folder: Path) -> tuple[str, dict[str, Any]]:
    """The family and the configuration in a folder's config.json.

    Raises:
        MissingFileError: if the folder has none.
        CheckpointError: if it is not one of ours.
    """

    path = folder / CONFIG_FILE
    if not path.exists():
        raise MissingFileError(f"{folder} is not an exported model: it has no {CONFIG_FILE}")
    try:
        content = json.loads(path.read_text())
        version, family, config = content["format"], content["family"], content["config"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not describe an exported model ({error})") from error
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}; this version of infotok_lit reads format {FORMAT}")
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
