"""The families of base models: a family is a folder beside this file, and its code is imported when it is needed.

A family's folder has `config.py`, which imports nothing heavy, and `loading.py`; `FamilyConfig` and `FamilyLoading` say
what the two must have.
"""

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from infotok_lit import models

if TYPE_CHECKING:
    from torch import Tensor

    from infotok_lit.models.unified import UnifiedModel


class FamilyConfig(Protocol):
    """The light half of a family."""

    Size: Any
    """A Literal of the names of its sizes."""
    DrawingConfig: type
    """A dataclass of the options of drawing."""
    PARTS: Mapping[str, str]
    """Name -> what it is, of the official files that a checkpoint needs beside its main one."""


class OfficialWeights(Protocol):
    """Official state dicts, read but not yet in a model."""

    def load_into(self, model: "UnifiedModel") -> "UnifiedModel":
        """The model with these weights; CheckpointError names what does not fit."""


class FamilyLoading(Protocol):
    """The heavy half of a family."""

    def config_of_size(self, size: str) -> Any:
        """The configuration of a size; ValueError if there is none."""

    def of_size(self, size: str, tokenizer: str | None, settings: Mapping[str, Any]) -> "UnifiedModel":
        """A fresh model; `settings` change entries of the size's configuration (model_config.py)."""

    def rebuild(self, config: dict[str, Any], tokenizer: str, state: dict[str, "Tensor"]) -> "UnifiedModel":
        """The model of a training checkpoint, in evaluation mode; `state` has our own parameter names."""

    def from_folder(self, folder: Path) -> "UnifiedModel":
        """The model in an exported folder, in evaluation mode."""

    def from_official(
        self, weights: Path, size: str, parts: Mapping[str, Path], tokenizer: str | None
    ) -> "UnifiedModel":
        """The model in official files, in evaluation mode; `parts` as in `FamilyConfig.PARTS`."""

    def read_exported(self, folder: Path) -> tuple[Any, OfficialWeights]:
        """The configuration and the weights in an exported folder; CheckpointError if it holds another family."""

    def read_official(self, weights: Path, parts: Mapping[str, Path], config: Any) -> OfficialWeights:
        """The weights in official files; ValueError names a part that is needed and not given."""

    def differing_parts(self, found: Any, wanted: Any) -> list[str]:
        """The entries in which two configurations differ so that weights of one do not fit the other."""


def families() -> list[str]:
    """The families that there are."""
    found = (module.name for module in pkgutil.iter_modules(models.__path__) if module.ispkg)
    return [name for name in found if name != "common"]


def family_config(family: str) -> FamilyConfig:
    """The light half of a family."""
    return import_module(f"{models.__name__}.{_known(family)}.config")


def family_loading(family: str) -> FamilyLoading:
    """The heavy half of a family; ValueError for one that there is not."""
    return import_module(f"{models.__name__}.{_known(family)}.loading")


def load_folder(folder: Path) -> "UnifiedModel":
    """The model in an exported folder, in evaluation mode."""
    from infotok_lit.checkpoints import read_folder

    family, _ = read_folder(folder)
    return family_loading(family).from_folder(folder)


def _known(family: str) -> str:
    if family not in families():
        raise ValueError(f"the model is of family {family!r}; this version knows {', '.join(families())}")
    return family
