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
"""Family -> the module that has `from_folder(folder)` and `rebuild(config, tokenizer, state)`."""


def load_folder(folder: Path) -> UnifiedModel:
    """The model in an exported folder, in evaluation mode."""
    family, _ = read_config(folder)
    return _family(family).from_folder(folder)


def rebuild(family: str, config: dict[str, Any], tokenizer: str, state: dict[str, Tensor]) -> UnifiedModel:
    """The model of a training checkpoint, in evaluation mode."""
    return _family(family).rebuild(config, tokenizer, state)


def _family(family: str) -> ModuleType:
    if family not in FAMILIES:
        raise CheckpointError(f"the model is of family {family!r}; this version knows {', '.join(FAMILIES)}")
    return import_module(FAMILIES[family])
