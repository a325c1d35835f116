"""Reading the base model out of a training run, without its LightningModule."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from infotok_lit.models.checkpoint import CheckpointError, KeyMap, read_pickle
from infotok_lit.models.families import family_loading
from infotok_lit.models.unified import UnifiedModel
from infotok_lit.modules.lora import LoraConfig, merged_state

CHECKPOINT_KEY = "infotok_lit"
BASE_PREFIX = "base."


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
        rank_zero_warn(f"{path} is passed over: it is no checkpoint of a run, or was cut off while it was written")
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


def base_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The base model's part of a run's state dict, under the base model's own names; adapters are merged in."""
    state = checkpoint["state_dict"]
    base = {name.removeprefix(BASE_PREFIX): value for name, value in state.items() if name.startswith(BASE_PREFIX)}
    lora = checkpoint[CHECKPOINT_KEY].get("lora")
    return base if lora is None else merged_state(base, LoraConfig(**lora))


def rebuild_base(checkpoint: dict[str, Any]) -> UnifiedModel:
    """The base model of a run's checkpoint, in evaluation mode; CheckpointError says what does not fit."""
    saved = checkpoint[CHECKPOINT_KEY]
    return family_loading(saved["family"]).rebuild(saved["config"], saved["tokenizer"], base_weights(checkpoint))


def load_base_weights(base: nn.Module, path: Path) -> None:
    """Load the base model of a run into `base`; CheckpointError says what does not fit."""
    weights = base_weights(read_run(path))
    base.load_state_dict(KeyMap(renames=()).from_official(weights, base.state_dict(), str(path)))
