"""Sharded checkpoints: folders that torch.distributed.checkpoint wrote, read so that nothing in them can execute.

FOLDER.ckpt/
  .metadata        which part of which tensor lies where: a pickle of plain descriptions
  __<rank>_0.distcp   the parts that a process had of weights and optimiser states, each written by torch.save
  meta.pt          everything else that a checkpoint of a run holds
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infotok_lit.weight_files import DAMAGE_ERRORS, DAMAGED, check_checksums, read_pickle, unreadable

if TYPE_CHECKING:
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata

INDEX, META = ".metadata", "meta.pt"
WEIGHTS, OPTIMISER = "state_dict", "optimizer_"
"""How the two kinds of tensors are called in a folder."""
DESCRIPTIONS = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch": ("Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "WindowsPath", "PurePosixPath"),
    "collections": ("OrderedDict",),
}
"""All that an index may be made of: descriptions, and names of types."""


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether a folder is a sharded checkpoint, as far as its names tell."""
    return path.is_dir() and (path / META).is_file() and (path / INDEX).is_file()


def check_sharded(path: Path) -> None:
    """Read all of a sharded checkpoint once and compare the checksums in it.

    Raises:
        CheckpointError: if it is not what was written.
    """
    check_checksums(path / META)
    for place in read_index(path).storage_data.values():
        file = path / place.relative_path
        try:
            with file.open("rb") as stream:
                stream.seek(place.offset)
                part = stream.read(place.length)
            with zipfile.ZipFile(io.BytesIO(part)) as archive:
                changed = archive.testzip()
        except (OSError, *DAMAGE_ERRORS) as error:
            raise unreadable(file, DAMAGED) from error
        if changed is not None:
            raise unreadable(file, f"{DAMAGED} (the checksum of {changed} in it is wrong)")


def read_sharded_meta(path: Path) -> dict[str, Any]:
    """What a sharded checkpoint holds beside tensors, with no weights under `state_dict`."""
    return read_pickle(path / META) | {WEIGHTS: {}}


def read_sharded(path: Path, optimiser: bool = True) -> dict[str, Any]:
    """What a checkpoint of one process would hold: the same tensors, whole.

    Args:
        optimiser: also read the optimisers' states, to go on training.

    Raises:
        CheckpointError: if it is damaged, or holds anything but tensors and plain data.
    """
    import torch
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    index = read_index(path)
    kinds = (WEIGHTS, OPTIMISER) if optimiser else (WEIGHTS,)
    found: dict[str, Any] = {
        name: torch.empty(kept.size, dtype=kept.properties.dtype) if isinstance(kept, TensorStorageMetadata) else None
        for name, kept in index.state_dict_metadata.items()
        if name.startswith(kinds)
    }
    try:
        dcp.load(found, storage_reader=safe_reader(path), planner=plain_planner(), no_dist=True)
    except (OSError, pickle.UnpicklingError, *DAMAGE_ERRORS) as error:
        raise unreadable(path, DAMAGED) from error
    content = read_sharded_meta(path)
    nested: dict[str, Any] = {}
    for name, value in found.items():
        _put(nested, index.planner_data[name], value)
    nested = _with_lists(nested)
    content[WEIGHTS] = nested[WEIGHTS]
    if optimiser:
        content["optimizer_states"] = [
            _numbered(nested[name]) for name in sorted(name for name in nested if name.startswith(OPTIMISER))
        ]
    return content


def read_index(path: Path) -> Metadata:
    """What lies where; CheckpointError if it is damaged, or made of anything but descriptions."""
    try:
        with (path / INDEX).open("rb") as file:
            return _IndexReader(file).load()
    except (OSError, pickle.UnpicklingError, *DAMAGE_ERRORS) as error:
        raise unreadable(path / INDEX, DAMAGED) from error


def names_and_shapes(path: Path) -> dict[str, dict[str, Any]]:
    """`state_dict` -> the shapes of weights by name; `optimizer_0` -> None by the names of parameters with states."""
    index = read_index(path)
    found: dict[str, dict[str, Any]] = {WEIGHTS: {}}
    for name, (kind, *keys) in index.planner_data.items():
        if kind == WEIGHTS:
            found[kind][keys[0]] = getattr(index.state_dict_metadata[name], "size", None)
        elif keys[0] == "state":
            found.setdefault(kind, {})[keys[1]] = None
    return found


class _IndexReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in DESCRIPTIONS.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} describes no tensor")
        return super().find_class(module, name)


def safe_reader(path: Path) -> FileSystemReader:
    """torch's reader of the folder, which takes from the index descriptions only."""
    from torch.distributed.checkpoint import FileSystemReader

    class SafeReader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            return read_index(path)

    return SafeReader(path)


def plain_planner() -> DefaultLoadPlanner:
    """torch's planner, which takes plain data only for what is no tensor."""
    import torch
    from torch.distributed.checkpoint import DefaultLoadPlanner
    from torch.distributed.checkpoint.planner import ReadItem

    class PlainPlanner(DefaultLoadPlanner):
        def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
            content, (*keys, last) = self.original_state_dict, self.mappings[read_item.dest_index.fqn]
            for key in keys:
                content = content[key]
            content[last] = torch.load(value, weights_only=True)

    return PlainPlanner()


def _put(content: dict[Any, Any], keys: tuple[str | int, ...], value: Any) -> None:
    for key in keys[:-1]:
        content = content.setdefault(key, {})
    content[keys[-1]] = value


def _with_lists(content: Any) -> Any:
    """Nested dictionaries, of which those whose keys are numbers are the lists that they were."""
    if not isinstance(content, dict):
        return content
    values = {key: _with_lists(value) for key, value in content.items()}
    if values and all(isinstance(key, int) for key in values):
        return [values[key] for key in sorted(values)]
    return values


def _numbered(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state by parameters' names -> by their numbers in its groups, as torch's optimisers write it."""
    numbers: dict[str, int] = {}
    groups = [
        {**group, "params": [numbers.setdefault(name, len(numbers)) for name in group["params"]]}
        for group in state["param_groups"]
    ]
    return {"state": {numbers[name]: value for name, value in state["state"].items()}, "param_groups": groups}
