"""Images with text: sources (drawn scenes, folders, tar shards), the endless stream over them, and the DataModule.

The names are looked up when they are used: models import the sample types from here, and must not import Lightning.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "ImageTextFolder": "image_text",
    "ImageTextShards": "shards",
    "Scenes": "scenes",
    "UnifiedDataModule": "datamodule",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
