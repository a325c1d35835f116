"""A run's checkpoints: written whole or not at all, without what the run does not train, and compared on resuming.

What they leave out is read again from where the run began, and compared with what it was by digests.
"""

import contextlib
import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from infotok_lit.checkpoints import SHOWN, CheckpointError
from infotok_lit.files import PART, replacing
from infotok_lit.modules.lora import BASE, LoraConfig
from infotok_lit.modules.optimiser import OptimiserConfig
from infotok_lit.sharded_checkpoints import is_sharded_checkpoint, read_sharded
from infotok_lit.weight_files import local_checkpoint, read_pickle

BASE_PREFIX = "base."


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it, so that a kill or a full disk costs no earlier one.

    Lightning would collect it in memory and copy it from the temporary folder, where a killed run leaves it behind. A
    killed run of ours leaves FILE.HOST.PROCESS.part, which `remove_leftovers` finds.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write; OSError if the folder is full or cannot be written to. To a URL Lightning writes; none is read."""
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """What a checkpoint holds, on the CPU; CheckpointError for a URL, damage, and more than plain data."""
        path = local_checkpoint(path)
        return read_sharded(path) if is_sharded_checkpoint(path) else read_pickle(path)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes of this machine left behind while they saved, anywhere below a folder."""
    for path in folder.rglob(f".*{PART}"):
        host, _, process = path.name.removesuffix(PART).rpartition(".")
        if process.isdigit() and host.endswith(f".{socket.gethostname()}") and not _is_alive(int(process)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def names_in(folder: Path) -> set[str] | None:
    """The names in a folder; None where there is none."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else None


def remove_start(folder: Path, before: set[str] | None) -> None:
    """Remove what the start of a run that never began wrote, and the folder if there was none before."""
    for name in (names_in(folder) or set()) - (before or set()):
        # The latter name their process: another run may begin in the same folder.
        if name == "hparams.yaml" or (name.startswith("events.out.tfevents.") and f".{os.getpid()}." in name):
            (folder / name).unlink()
    if before is None:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _is_alive(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        try:
            os.kill(process, 0)
        except PermissionError:
            return True
        return True
    return False


def check_resumed(run: Mapping[str, Any], lora: LoraConfig | None, optimiser: OptimiserConfig) -> None:
    """Warn about settings that resuming overrides with the checkpoint's.

    Args:
        run: what the checkpoint says of its run.
        lora: the configured adapters.
        optimiser: the configured optimiser.

    Raises:
        CheckpointError: if the run has other adapters.
    """
    theirs = None if run.get("lora") is None else LoraConfig(**run["lora"])
    if theirs != lora:
        raise CheckpointError(
            f"model.lora is {lora} in the config, but the run to resume has {theirs}. Set it to the run's, or "
            "start anew from its weights, into which its adapters are merged, with model.init_from"
        )
    saved = run.get("restored_settings", {})
    for name, now in optimiser.restored().items():
        if name in saved and saved[name] != now:
            rank_zero_warn(
                f"{name} is {now} in the config, but resuming goes on with the checkpoint's {saved[name]}. "
                "To start anew from its weights with the new setting, use model.init_from instead of --ckpt_path."
            )


class FrozenWeights:
    """The frozen parameters of a base model, which its run's checkpoints leave out.

    Args:
        base: the model as it trains, with its adapters; not sharded yet.
        source: where its weights came from and can be read again; None if nowhere, so that nothing is left out.
        strategy: what is about to shard the model; None for nothing.
        changing: whether they are about to be kept in another type; known by what they were, they can be read again.
        computed: patterns of layers whose weights are not read as they are, but computed from what is read: another
            processor rounds otherwise, so a checkpoint holds them.
    """

    def __init__(
        self,
        base: nn.Module,
        source: str | None,
        strategy: Strategy | None = None,
        changing: bool = False,
        computed: Sequence[str] = (),
    ) -> None:
        # Lightning's own strategy for sharding resumes from whole checkpoints only.
        source = None if type(strategy) is ModelParallelStrategy else source
        self.base, self.source = base, source
        named = base.named_parameters(remove_duplicate=False) if source is not None else ()
        self.names = [name for name, parameter in named if not parameter.requires_grad]
        self.held = {name for name in self.names if any(fnmatchcase(_layer_of(name), one) for one in computed)}
        if strategy is not None or changing:
            _ = self.digests

    @cached_property
    def digests(self) -> dict[str, str]:
        """Name in the base model -> digest; they never change."""
        return {name: digest(self.base.get_parameter(name)) for name in self.names}

    def leave_out(self, state: dict[str, Tensor]) -> dict[str, str]:
        """Take them out of a run's state dict, if it holds any; their digests, by which `fill_in` knows them again."""
        names = [name for name in self.names if name not in self.held]
        found = [name for name in names if state.pop(f"{BASE_PREFIX}{name}", None) is not None]
        return {name: self.digests[name] for name in found}

    def fill_in(self, checkpoint: dict[str, Any], recorded: Mapping[str, str]) -> None:
        """Put this model's own into the state dicts of a checkpoint; CheckpointError if they are not the run's."""
        if not recorded:
            return
        own = self.digests if self.names else {}
        other = [name for name in recorded if own.get(name) != recorded[name]]
        if other:
            raise CheckpointError(_changed(other, f"model.init_from {self.source}"))
        for state in (checkpoint.get("state_dict"), checkpoint.get("current_model_state")):
            if state:
                state |= {f"{BASE_PREFIX}{name}": self.base.get_parameter(name).detach() for name in recorded}


def _layer_of(name: str) -> str:
    """The layer that a parameter belongs to, without adapters."""
    return name.replace(BASE, ".").rpartition(".")[0]


def digest(tensor: Tensor) -> str:
    """TYPE:SHA-256 of a tensor's numbers."""
    numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{str(tensor.dtype).removeprefix('torch.')}:{hashlib.sha256(numbers).hexdigest()}"


def completed(
    state: Mapping[str, Tensor], initial: Mapping[str, Tensor], recorded: Mapping[str, str], source: str
) -> dict[str, Tensor]:
    """A run's state dict with what it leaves out, from the initial model's; CheckpointError if that has changed.

    Args:
        initial: by the names of a base model without adapters.
        recorded: digests by name, as `FrozenWeights.leave_out` gave them.
        source: where `initial` comes from, for the message.
    """
    found, other = {}, []
    for name, expected in recorded.items():
        value = initial.get(name.replace(BASE, "."))
        value = None if value is None else value.to(getattr(torch, expected.partition(":")[0]))
        if value is None or digest(value) != expected:
            other.append(name)
        else:
            found[f"{BASE_PREFIX}{name}"] = value
    if other:
        raise CheckpointError(_changed(other, source))
    return {**state, **found}


def _changed(names: list[str], source: str) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (
        f"the checkpoint leaves out what its run did not train and takes it from {source}, where it is not as it was: "
        f"{', '.join(names[:SHOWN])}{more}. Give model.init_from and model.parts as in the run, with the files of then"
    )
