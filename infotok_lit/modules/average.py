"""The moving average of a run's weights in its checkpoints: which weights it is of, and which of the two is meant."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from infotok_lit.checkpoints import CHECKPOINT_KEY, CheckpointError
from infotok_lit.models.export import Weights

AVERAGE = "weight_average"
"""Where a module keeps the moving average of its trained weights, under their names (callbacks/weight_average.py)."""
RAW = "current_model_state"
"""Where Lightning's own averaging keeps the weights themselves; `state_dict` is then the average."""


def module_weights(checkpoint: Mapping[str, Any], weights: Weights = "averaged") -> dict[str, torch.Tensor]:
    """The state dict in a run's checkpoint, with the moving average in the place of the weights if there is one.

    Args:
        weights: `raw` for the weights themselves.
    """
    if RAW in checkpoint:
        return checkpoint[RAW if weights == "raw" else "state_dict"]
    state, prefix = checkpoint["state_dict"], f"{AVERAGE}."
    raw = {name: value for name, value in state.items() if not name.startswith(prefix)}
    averages = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if weights == "raw" or not averages:
        return raw
    record = _average(checkpoint)
    if record is None:
        raise CheckpointError("the checkpoint does not say which weights share a moving average: take --weights raw")
    return raw | averages | {alias: averages[name] for alias, name in record["tied"].items()}


def record_of_average(module: nn.Module) -> dict[str, Any] | None:
    """What a module's `WeightAverage` says of itself; None where there is none.

    Modules put it into what rebuilds them: a checkpoint with weights only holds nothing of callbacks.
    """
    return module.get_submodule(AVERAGE).record() if hasattr(module, AVERAGE) else None


def _average(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    of_callback = checkpoint.get("callbacks", {}).get("WeightAverage")
    return checkpoint.get(CHECKPOINT_KEY, {}).get(AVERAGE) if of_callback is None else of_callback


def average_updates(checkpoint: Mapping[str, Any]) -> int | None:
    """How often a run's average of its weights was updated; None for a run that has none."""
    if RAW in checkpoint:
        return int(checkpoint["averaging_state"]["n_averaged"])
    record = _average(checkpoint)
    return None if record is None else record["updates"]


def weights_in_words(checkpoint: Mapping[str, Any], weights: Weights) -> str:
    """What a run's `averaged` or `raw` weights are, for people."""
    updates = average_updates(checkpoint)
    if updates is None:
        return "raw (no moving average)"
    return "raw (not the run's moving average)" if weights == "raw" else f"moving average ({updates} updates)"
