"""How a run whose processes share the model out is started, saved and resumed."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from infotok_lit.checkpoints import CHECKPOINT_KEY, SHOWN, CheckpointError, read_pickle
from infotok_lit.files import PART, staging_path
from infotok_lit.modules.average import AVERAGE
from infotok_lit.modules.run_checkpoint import BASE_PREFIX
from infotok_lit.modules.sharding import own_share
from infotok_lit.sharded_checkpoints import (
    META,
    is_sharded_checkpoint,
    names_and_shapes,
    plain_planner,
    read_sharded_meta,
    safe_reader,
)


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2: each process keeps its share of weights, gradients and optimiser states, and sees data of its own.

    `tensor_parallel_size` processes share one copy of the model out, by default those of a node; there are
    `data_parallel_size` copies, by default one a node. (The names are Lightning's; no single layer is computed by
    several processes.) A checkpoint is a folder to which every process writes its share; with
    `save_distributed_checkpoint: false` the first process collects all of it in memory and writes one file. Either
    resumes with any number of processes, under this strategy or another.
    """

    def setup_environment(self) -> None:
        """Start the processes with one state of torch's random numbers.

        Each cuts its share out of the model that it builds, so all must build the same.
        """
        super().setup_environment()
        torch.set_rng_state(self.broadcast(torch.get_rng_state()))

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """For loaders of your own: no two processes see the same data."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a folder beside its place, then swap; collective.

        Raises:
            OSError: if the disk is full, or cannot be written to.
        """
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path, staging = (Path(one) for one in self.broadcast((str(filepath), str(staging_path(Path(filepath))))))
        tensors = {"state_dict": checkpoint["state_dict"]}
        tensors |= {f"optimizer_{number}": state for number, state in enumerate(checkpoint.get("optimizer_states", []))}
        others = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(staging))
        if self.is_global_zero:
            torch.save(others, staging / META)
            _swap(staging, path)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and optimiser states, each process its share, from a folder or a file; collective.

        Returns:
            what else the checkpoint holds.

        Raises:
            CheckpointError: naming what is missing, mis-shaped or damaged.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        model, optimisers = self.lightning_module, list(self.optimizers)
        if not is_sharded_checkpoint(path):
            content = read_pickle(path, checked=False)
            # A copy: into its own, the module puts what the file leaves out, which is here already.
            state = dict(content["state_dict"])
            model.on_load_checkpoint(content)
            del content["state_dict"]
            _load_whole(_awaited(model, content), state, path)
            for optimiser, state in zip(optimisers, content.pop("optimizer_states", []), strict=False):
                _load_optimiser(optimiser, state)
            return content
        content, held = read_sharded_meta(path), names_and_shapes(path)
        model.on_load_checkpoint({**content, "state_dict": dict(held["state_dict"])})
        state = {"state_dict": _awaited(model, content)}
        _refuse_misfit({name: tensor.shape for name, tensor in state["state_dict"].items()}, held["state_dict"], path)
        # The tensors are the model's own, so they are loaded in place.
        dcp.load(state, storage_reader=safe_reader(path), planner=plain_planner())
        for number, optimiser in enumerate(optimisers):
            own = get_optimizer_state_dict(model, optimiser)
            _refuse_misfit(dict.fromkeys(own["state"]), held.get(f"optimizer_{number}", {}), path)
            dcp.load({f"optimizer_{number}": own}, storage_reader=safe_reader(path), planner=plain_planner())
            set_optimizer_state_dict(model, optimiser, own)
        return content


def _awaited(model: nn.Module, content: dict[str, Any]) -> dict[str, Tensor]:
    """The model's tensors by name that a checkpoint holds: all but those that it says to leave out."""
    left_out = {f"{BASE_PREFIX}{name}" for name in content[CHECKPOINT_KEY].get("frozen", {})}
    return {name: tensor for name, tensor in get_model_state_dict(model).items() if name not in left_out}


def _load_whole(own: dict[str, Tensor], state: dict[str, Tensor], path: Path) -> None:
    shapes, held = ({name: tensor.shape for name, tensor in one.items()} for one in (own, state))
    _refuse_misfit(shapes, held, path)
    with torch.no_grad():
        for name, tensor in own.items():
            own_share(tensor).copy_(own_share(_share_like(state[name], tensor)))


def _refuse_misfit(own: Mapping[str, Any], held: Mapping[str, Any], path: Path) -> None:
    """CheckpointError unless a checkpoint holds what is awaited, by name and shape, and nothing else.

    torch.distributed.checkpoint leaves alone what is not asked for, and raises no Exception for what is missing.
    """
    wrong = sorted(own.keys() ^ held.keys()) or [name for name in own if own[name] != held[name]]
    averages = {name for name in own if name.startswith(f"{AVERAGE}.")}
    if wrong and averages == set(wrong) and not any(name.startswith(f"{AVERAGE}.") for name in held):
        raise CheckpointError(
            f"{path} holds no moving average of these weights, and under FSDP2 none begins there: leave out --config "
            "trainer/weight_average, or start anew from its weights with model.init_from"
        )
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        names = f"{', '.join(wrong[:SHOWN])}{more}"
        raise CheckpointError(f"{path} does not fit this model: missing, unexpected or mis-shaped: {names}")


def _load_optimiser(optimiser: Optimizer, state: dict[str, Any]) -> None:
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    shared_out = {
        number: {
            name: _share_like(value, parameters[number]) if value.shape == parameters[number].shape else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    optimiser.load_state_dict({**state, "state": shared_out})


def _share_like(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, shared out like another."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _swap(staging: Path, path: Path) -> None:
    """Put what was staged in its place, of which an earlier checkpoint goes."""
    if path.is_dir() and not is_sharded_checkpoint(path):
        raise IsADirectoryError(f"{path} is a folder and no checkpoint, so it is not replaced: choose another place")
    earlier = path.with_name(f"{staging.name.removesuffix(PART)}.earlier{PART}")
    if path.exists():
        path.rename(earlier)
    staging.rename(path)
    if earlier.is_dir():
        shutil.rmtree(earlier)
    else:
        earlier.unlink(missing_ok=True)
