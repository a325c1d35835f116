"""A moving average of the trained weights: kept with them, and measured and exported in their place."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from infotok_lit.errors import SettingsError
from infotok_lit.modules.average import AVERAGE
from infotok_lit.modules.run_callbacks import ModelCallback
from infotok_lit.modules.sharding import own_share, reshard


class WeightAverage(ModelCallback):
    """An exponential moving average of every weight that is trained, the heads' among them.

    It begins as the initial weights, and update n = 0, 1, ... makes it d * average + (1 - d) * weights with
    d = min(decay, (1 + n) / (warmup + n)), as TensorFlow's ExponentialMovingAverage has it: a decay that is meant for
    the end of training would hold on to its beginning.

    The averages are buffers of the module, `weight_average.<name of the weight>`, each of its weight's shape and
    sharding. So whatever strategy saves, shards and restores the weights does so with them, and a run goes on exactly.

    Args:
        decay: The share of the average that an update keeps, from 0 to below 1.
        warmup: How slowly the decay rises to that; 1 for the full decay from the start.
        every_n_steps: How many optimiser steps lie between updates.
        validate: Whether validation, and what the run leaves, is about the average; False for the last weights. What
            `ExportInference` writes is its own setting.
    """

    def __init__(self, decay: float = 0.999, warmup: int = 10, every_n_steps: int = 1, validate: bool = True) -> None:
        if not 0 <= decay < 1:
            raise SettingsError(f"WeightAverage: decay is {decay}; set it from 0 to below 1")
        if warmup < 1 or every_n_steps < 1:
            raise SettingsError(f"WeightAverage: warmup and every_n_steps must be 1 or more: {warmup}, {every_n_steps}")
        self.decay, self.warmup, self.every_n_steps, self.validate = decay, warmup, every_n_steps, validate
        self.updates = 0
        self.tied: dict[str, str] = {}
        """Further names of weights -> the one that the average has."""
        self.shown = False
        """Whether average and weights have changed places."""
        self._seen_step = 0

    def on_model_built(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin as the initial weights, also for a second module; a resumed run then overwrites both."""
        self.updates, self.tied, self.shown = 0, {}, False
        trained = {name: weight for name, weight in pl_module.named_parameters() if weight.requires_grad}
        first_names = {id(weight): name for name, weight in trained.items()}
        for name, weight in pl_module.named_parameters(remove_duplicate=False):
            if first_names.get(id(weight), name) != name:
                self.tied[name] = first_names[id(weight)]
        averages = _tree_of_buffers(trained)
        averages.record = self.state_dict
        pl_module.add_module(AVERAGE, averages)
        # Equal weights have equal averages: nothing is to be sent before each forward pass.
        names = [f"{AVERAGE}.{name}" for name in trained]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pl_module, names)
        pl_module.register_load_state_dict_pre_hook(partial(self._make_way))
        pl_module.register_state_dict_post_hook(partial(self._undo_in_state_dict))

    def show(self, pl_module: pl.LightningModule, average: bool) -> None:
        """Let the module compute with the average, or with the weights themselves; what it does already stays."""
        if average == self.shown:
            return
        with torch.inference_mode(False), torch.no_grad():
            for own, other in zip(*_local_pairs(pl_module), strict=True):
                kept = own.clone()
                own.copy_(other)
                other.copy_(kept)
        self.shown = average

    @contextmanager
    def showing(self, pl_module: pl.LightningModule, average: bool) -> Iterator[None]:
        """`show` for as long as the context lasts."""
        before = self.shown
        self.show(pl_module, average)
        try:
            yield
        finally:
            self.show(pl_module, before)

    def decay_at(self, update: int) -> float:
        """The decay of an update, which are counted from 0."""
        return min(self.decay, (1 + update) / (self.warmup + update))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Know the step that a resumed run goes on from; SettingsError for a module that keeps no average."""
        _names(pl_module)
        self._seen_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Train the weights themselves."""
        self.show(pl_module, average=False)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update, unless this batch only accumulates."""
        stepped = trainer.global_step > self._seen_step
        self._seen_step = trainer.global_step
        if stepped and trainer.global_step % self.every_n_steps == 0:
            weights, averages = _local_pairs(pl_module)
            get_ema_multi_avg_fn(self.decay_at(self.updates))(averages, weights, self.updates)
            self.updates += 1

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here until the next training batch, the average is what callbacks see."""
        self.show(pl_module, self.validate)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The average is what the run leaves."""
        self.show(pl_module, self.validate)

    def state_dict(self) -> dict[str, Any]:
        """The number of updates, and what shares an average; the averages are the module's."""
        return {"updates": self.updates, "tied": self.tied}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.updates = state_dict["updates"]

    def _make_way(self, pl_module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Weights and averages come under their own names, also where a fit or a validation left the average shown."""
        self.show(pl_module, average=False)
        _begin_where_absent(pl_module, state, prefix)

    def _undo_in_state_dict(self, pl_module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        """A checkpoint has the weights under their own names, also one that is written while the average is shown."""
        if not self.shown:
            return
        for name in _names(pl_module):
            own, other = f"{prefix}{name}", f"{prefix}{AVERAGE}.{name}"
            state[own], state[other] = state[other], state[own]
        for name, first in self.tied.items():
            state[f"{prefix}{name}"] = state[f"{prefix}{first}"]


@contextmanager
def as_validated(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Inside, the module computes with what validation is about: beside a WeightAverage, usually the average."""
    with ExitStack() as stack:
        for callback in trainer.callbacks:
            if isinstance(callback, WeightAverage):
                stack.enter_context(callback.showing(pl_module, callback.validate))
        yield


def _tree_of_buffers(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module with copies of tensors as buffers, under the same dotted names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        node.register_buffer(leaf, tensor.detach().clone())
    return root


def _names(pl_module: nn.Module) -> Iterator[str]:
    """The weights that have an average; SettingsError for a module that keeps none."""
    if not hasattr(pl_module, AVERAGE):
        raise SettingsError(
            f"WeightAverage: {type(pl_module).__name__} keeps no average; its configure_model is to end with "
            "infotok_lit.modules.run_callbacks.tell_model_is_built"
        )
    return (name for name, _ in pl_module.get_submodule(AVERAGE).named_buffers())


def _local_pairs(pl_module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The trained weights and their averages; of sharded ones, the shards of this process."""
    reshard(*pl_module.modules())
    names = list(_names(pl_module))
    weights = [pl_module.get_parameter(name).detach() for name in names]
    averages = [pl_module.get_buffer(f"{AVERAGE}.{name}") for name in names]
    return [own_share(weight) for weight in weights], [own_share(average) for average in averages]


def _begin_where_absent(pl_module: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    """The average of a run that had none begins as the weights that it is resumed from."""
    absent = [name for name in _names(pl_module) if f"{prefix}{AVERAGE}.{name}" not in state]
    if absent:
        rank_zero_warn("WeightAverage: the checkpoint holds no average, so it begins as the weights there")
    state.update(
        {f"{prefix}{AVERAGE}.{name}": state[f"{prefix}{name}"] for name in absent if f"{prefix}{name}" in state}
    )
