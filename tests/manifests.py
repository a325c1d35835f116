"""Keys and shapes of the official checkpoints, and models at full size without their gigabytes: on meta."""

import gzip
import json
from pathlib import Path

import torch
from torch import Tensor

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.models.family import family as family_called
from infotok_lit.models.unified import UnifiedModel

GOLDENS = Path(__file__).parent / "fixtures" / "goldens"
Shapes = dict[str, tuple[int, ...]]


def manifest(name: str) -> Shapes:
    if (GOLDENS / f"manifest_{name}.json").exists():
        entries = json.loads((GOLDENS / f"manifest_{name}.json").read_text())
        return {key: tuple(shape) for key, (shape, _) in entries.items()}
    with gzip.open(GOLDENS / "manifests_openuni.json.gz") as file:
        return {key: tuple(shape) for key, shape in json.load(file)[name].items()}


def main_file(family: str, size: str, suffix: str = "") -> Shapes:
    """That of `1.5b-hq` has the keys and shapes of `1.5b`."""
    return manifest(f"{family}_{size.removesuffix('-hq').replace('-', '_')}{suffix}")


def official_files(family: str, size: str) -> dict[str, Shapes]:
    """Stem of an exported file -> what its official counterpart holds."""
    files = {family: main_file(family, size)}
    if family == "harmon":
        return files | {"kl16": manifest("kl16_vae")}
    if family == "showo2":
        return files | {"wan_vae": manifest("wan21_vae")}
    whole, prefix = main_file(family, size, "_full"), "vae."
    vlm = manifest(f"internvl3_{'1b' if size == 'b-512' else '2b'}_official")
    return files | {
        "internvl3": vlm,
        "dc_ae": {name.removeprefix(prefix): shape for name, shape in whole.items() if name.startswith(prefix)},
    }


def on_meta(shapes: Shapes) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def shapes_of(weights: dict[str, Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in weights.items()}


def built(family: str, size: str) -> UnifiedModel:
    known = family_called(family)
    with torch.device("meta"):
        return known.build(known.config_of_size(size), str(SCENES_TOKENIZER))
