"""Checkpoint files that appear whole or not at all, and are read without executing anything."""

import contextlib
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from infotok_lit.files import PART, staging_path
from infotok_lit.sharded_checkpoints import is_sharded_checkpoint, read_sharded
from infotok_lit.weight_files import read_pickle


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it, so that a kill or a full disk costs no earlier one.

    Lightning would collect it in memory and copy it from the temporary folder, where a killed run leaves it behind. A
    killed run of ours leaves FILE.HOST.PROCESS.part, which `remove_leftovers` finds.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write; OSError if the folder is full or cannot be written to. A URL is Lightning's business."""
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = staging_path(path)
        try:
            with staging.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """What a checkpoint holds, on the CPU; CheckpointError if it is damaged or holds more than plain data."""
        path = Path(path)
        return read_sharded(path) if is_sharded_checkpoint(path) else read_pickle(path)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes of this machine left behind while they saved, anywhere below a folder."""
    for path in folder.rglob(f".*{PART}"):
        host, _, process = path.name.removesuffix(PART).rpartition(".")
        if process.isdigit() and host.endswith(f".{socket.gethostname()}") and not _is_alive(int(process)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        try:
            os.kill(process, 0)
        except PermissionError:
            return True
        return True
    return False
