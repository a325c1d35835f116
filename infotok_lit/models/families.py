"""Which class serves which family; a family's code is imported when it is needed."""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from infotok_lit.models.checkpoint import CheckpointError
from infotok_lit.models.folder import read_config
from infotok_lit.models.unified import UnifiedModel

FAMILIES = {"harmon": "infotok_lit.models.harmon.loading"}
"""Family -> the module that has `from_folder`, `from_official` and `rebuild`, as below but for the family."""


def load_folder(folder: Path) -> UnifiedModel:
    """The model in an exported folder, in evaluation mode."""
    family, _ = read_config(folder)
    return _family(family).from_folder(folder)


def load_official(
    family: str, weights: Path, size: str, autoencoder: Path | None = None, tokenizer: str | None = None
) -> UnifiedModel:
    """The model in an official checkpoint, in evaluation mode.

    Args:
        weights: a file, or a folder with safetensors.
        size: which of the family's official sizes it is.
        autoencoder: the image autoencoder's own file, where `weights` does not hold it.
        tokenizer: a folder or a hub name; default: that of the checkpoint folder, or of the size.
    """
    return _family(family).from_official(weights, size, autoencoder, tokenizer)


def rebuild(family: str, config: dict[str, Any], tokenizer: str, state: dict[str, Tensor]) -> UnifiedModel:
    """The model of a training checkpoint, in evaluation mode."""
    return _family(family).rebuild(config, tokenizer, state)


def _family(family: str) -> ModuleType:
    if family not in FAMILIES:
        raise CheckpointError(f"the model is of family {family!r}; this version knows {', '.join(FAMILIES)}")
    return import_module(FAMILIES[family])
