"""Building Toy: fresh, from an exported folder, from its official file, or from a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.checkpoints import first_existing, read_config, read_weights
from infotok_lit.models.common.tokenizer import load_tokenizer
from infotok_lit.models.toy.config import ToyConfig, config_of_size
from infotok_lit.models.toy.model import KEYS, Toy
from infotok_lit.models.toy.processor import ToyProcessor

__all__ = ["config_of_size"]
TOKENIZERS = {"scenes32": str(SCENES_TOKENIZER)}


def build(config: ToyConfig, tokenizer: str) -> Toy:
    """A fresh Toy; a size names its own tokenizer."""
    loaded = load_tokenizer(TOKENIZERS.get(tokenizer, tokenizer))
    tokens = (config.image_size // config.block_size) ** 2
    return Toy(config, ToyProcessor(loaded, config.image_size, tokens))


def of_size(size: str, tokenizer: str | None = None, settings: Mapping[str, Any] = MappingProxyType({})) -> Toy:
    """A fresh Toy of a size; `settings` change entries of its configuration."""
    return build(config_of_size(size).with_settings(settings), tokenizer or size)


def rebuild(config: dict[str, Any], tokenizer: str, state: dict[str, Tensor]) -> Toy:
    """The model of a training checkpoint, which has our own parameter names."""
    model = build(ToyConfig.from_dict(config), tokenizer)
    model.load_state_dict(state)
    return model.eval()


@dataclass(frozen=True)
class OfficialWeights:
    """An official state dict, and the file that it comes from."""

    state: dict[str, Tensor]
    source: str

    def load_into(self, model: Toy) -> Toy:
        """The model with these weights; CheckpointError names what does not fit."""
        state = dict(self.state)
        # The tied head is stored once.
        state.setdefault("llm.lm_head.weight", state.get("llm.model.embed_tokens.weight"))
        model.load_state_dict(KEYS.from_official(state, model.state_dict(), self.source))
        return model


def read_official(weights: Path, parts: Mapping[str, Path], config: ToyConfig) -> OfficialWeights:
    """Read the official file."""
    return OfficialWeights(read_weights(weights), str(weights))


def read_exported(folder: Path) -> tuple[ToyConfig, OfficialWeights]:
    """The configuration and the weights in an exported folder."""
    config = ToyConfig.from_dict(read_config(folder, Toy.family, Toy.title))
    return config, read_official(first_existing(folder, "toy.safetensors", "toy.pth"), {}, config)


def from_folder(folder: Path) -> Toy:
    """The model in an exported folder, in evaluation mode."""
    config, official = read_exported(folder)
    return official.load_into(build(config, str(folder))).eval()


def from_official(weights: Path, size: str, parts: Mapping[str, Path], tokenizer: str | None) -> Toy:
    """The model in its official file, in evaluation mode."""
    return read_official(weights, parts, config_of_size(size)).load_into(of_size(size, tokenizer)).eval()


def differing_parts(found: ToyConfig, wanted: ToyConfig) -> list[str]:
    """The entries in which two Toys differ so that weights of one do not fit the other."""
    names = ("llm", "block_size", "kept", "image_size")
    return [name for name in names if getattr(found, name) != getattr(wanted, name)]
