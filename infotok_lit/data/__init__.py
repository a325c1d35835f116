"""Images with text: sources (folders, tar shards), the endless stream over them, and the DataModule.

The names are looked up when they are used, so that a source can be read without Lightning.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "ImageTextFolder": "image_text",
    "ImageTextShards": "shards",
    "Mixture": "mixture",
    "UnifiedDataModule": "datamodule",
}


def __getattr__(name: str) -> Any:
    if name == "Scenes":
        raise AttributeError("infotok_lit.data.Scenes is infotok_lit.scenes.Scenes now: change the class_path")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
