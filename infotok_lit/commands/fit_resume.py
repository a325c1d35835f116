"""Which checkpoint `fit` goes on from, and whether it is one of the same run."""

import json
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from infotok_lit.checkpoints import (
    CheckpointError,
    check_checkpoint,
    checkpoints_below,
    newest_checkpoint,
    newest_first,
    read_settings,
)
from infotok_lit.errors import MissingFileError
from infotok_lit.sharded_checkpoints import is_sharded_checkpoint
from infotok_lit.weight_files import local_checkpoint

SHOWN = 8
"""How many differences a message lists."""
FREE = {
    "model": ("activation_checkpointing", "answer_tokens"),
    "data": ("val", "generation_val", "val_batch_size", "val_samples", "num_workers", "max_broken_share"),
}
"""Arguments of model and data that may change within a run; everything else of them shapes it."""

Settings = Mapping[str, Any]


def shaping_settings(config: Settings) -> dict[str, Any]:
    """What makes a run the run that it is: its model with objective and optimiser, its data and its seed.

    The trainer's settings (length, devices, logging) are not among it.
    """
    shaping: dict[str, Any] = {"seed_everything": config.get("seed_everything")}
    for part, free in FREE.items():
        content = dict(config.get(part) or {})
        arguments = {name: value for name, value in (content.get("init_args") or {}).items() if name not in free}
        shaping[part] = content | {"init_args": arguments}
    return json.loads(json.dumps(shaping, default=str))


def differences(then: Settings, now: Settings) -> list[str]:
    """`KEY is X here, and Y in the run`, for each setting that differs."""
    return [
        f"{key} is {_shown(new)} here, and {_shown(old)} in the run"
        for key, old, new in _differing(then, now, prefix="")
    ]


def chosen_checkpoint(trainer: Trainer, given: str | None, config: Settings, command: str) -> Path | None:
    """The checkpoint behind --ckpt_path; None for none.

    Raises:
        MissingFileError: if there is nothing at the path, or no run to go on with: rather than a silent fresh start.
        CheckpointError: for a URL, a folder, a damaged file, or where `last` finds runs of other configurations only.
    """
    if given is None:
        return None
    wanted = shaping_settings(config)
    if command == "validate":
        # Weights may be measured on any data.
        wanted = {"model": wanted["model"]}
    if given == "last":
        return last_checkpoint(trainer, wanted)
    path = _checked(given)
    changed = differences(_recorded(path), wanted)
    if changed:
        rank_zero_warn(f"--ckpt_path {path}: the configuration is not the run's:\n{_listed(changed)}")
    return path


def last_checkpoint(trainer: Trainer, wanted: Settings) -> Path:
    """The newest checkpoint of a run with these settings, below the folders that the trainer writes to.

    Raises:
        MissingFileError: if there is no checkpoint.
        CheckpointError: if all are of other configurations; the message names what differs from the newest.
    """
    folders = run_folders(trainer)
    files = newest_first(checkpoints_below(folders))
    changed: dict[Path, list[str]] = {}
    for folder in dict.fromkeys(path.parent for path in files):
        found = newest_checkpoint([folder])
        if found is None:
            continue
        changed[found] = differences(_recorded(found), wanted)
        if not changed[found]:
            rank_zero_info(f"Going on from {found}.")
            return found
    if not changed:
        below = " or ".join(str(folder.resolve()) for folder in folders)
        raise MissingFileError(f"--ckpt_path last: no checkpoint below {below}; start without --ckpt_path")
    newest, listed = next(iter(changed.items()))
    raise CheckpointError(
        f"--ckpt_path last: no earlier run has this configuration. The newest, {newest}, differs:\n{_listed(listed)}\n"
        f"To go on with it all the same, name it: --ckpt_path {newest}. To start anew from its weights, set "
        f"model.init_args.init_from to it. To start from the beginning, leave --ckpt_path out."
    )


def explain_misfit(error: Exception, checkpoint: Path, config: Settings) -> None:
    """Raise CheckpointError if the error is that a checkpoint's state does not fit what is configured; else return."""
    files = {Path(frame.filename).name for frame in traceback.extract_tb(error.__traceback__)}
    if not isinstance(error, RuntimeError | ValueError | KeyError) or "checkpoint_connector.py" not in files:
        return
    changed = differences(_recorded(checkpoint), shaping_settings(config))
    reason = f":\n{_listed(changed)}\n" if changed else f" ({(str(error).splitlines() or [''])[0]}). "
    raise CheckpointError(
        f"--ckpt_path {checkpoint} does not fit this configuration{reason}Set what differs to the run's values, or "
        "start anew from its weights with model.init_args.init_from"
    ) from error


def _checked(given: str) -> Path:
    path = local_checkpoint(given)
    if path.is_dir() and not is_sharded_checkpoint(path):
        raise CheckpointError(f"--ckpt_path {path} is a folder: name a checkpoint in it, such as checkpoints/last.ckpt")
    if not path.exists():
        raise MissingFileError(f"--ckpt_path {path}: there is no such file")
    check_checkpoint(path)
    if _content(path) is None:
        raise CheckpointError(f"--ckpt_path {path} is truncated, or is not a checkpoint of a run")
    return path


def _content(path: Path) -> dict[str, Any] | None:
    try:
        content = read_settings(path)
    except CheckpointError:
        return None
    return content if isinstance(content, dict) and "state_dict" in content else None


def _recorded(path: Path) -> Settings:
    """The settings in a checkpoint; empty where it records none, as those of older versions."""
    content = _content(path) or {}
    return content.get("callbacks", {}).get("RunRecord", {}).get("settings", {})


def run_folders(trainer: Trainer) -> list[Path]:
    """The folders below which a trainer's runs lie: those of its loggers and of its checkpoint callbacks."""
    folders = [Path(logger.save_dir, logger.name or "") for logger in trainer.loggers if logger.save_dir is not None]
    chosen = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    folders += [Path(folder) for folder in chosen if folder is not None]
    return folders or [Path(trainer.default_root_dir, "checkpoints")]


def _differing(then: Settings, now: Settings, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(then.keys() | now.keys()) if prefix else sorted(then.keys() & now.keys()):
        old, new, key = then.get(name), now.get(name), f"{prefix}{name}"
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differing(old, new, f"{key}.")
        elif old != new:
            yield key, old, new


def _listed(lines: list[str]) -> str:
    more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([*(f"  {line}" for line in lines[:SHOWN]), *more])


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
