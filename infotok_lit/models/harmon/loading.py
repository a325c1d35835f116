"""Building Harmon from an exported folder, from official checkpoints, or fresh."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.checkpoints import first_existing, read_config, read_weights
from infotok_lit.errors import SettingsError
from infotok_lit.models.common.token_grid import token_grid
from infotok_lit.models.common.tokenizer import load_tokenizer
from infotok_lit.models.harmon.config import HarmonConfig, Size, config_of_size
from infotok_lit.models.harmon.model import Harmon
from infotok_lit.models.harmon.processor import HarmonProcessor

TOKENIZERS: dict[Size, str] = {
    "scenes32": str(SCENES_TOKENIZER),
    "0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
}


def of_size(size: Size, tokenizer: str | None = None, settings: Mapping[str, Any] = MappingProxyType({})) -> Harmon:
    """A fresh Harmon.

    Args:
        size: which configuration.
        tokenizer: a folder, a name on the Hugging Face hub, or a size, for its own; default: the one of `size`.
        settings: entries of the configuration that differ from the size's.
    """
    return build(config_of_size(size).with_settings(settings), tokenizer or size)


def build(config: HarmonConfig, tokenizer: str) -> Harmon:
    """A fresh Harmon of any configuration, with its processor.

    Args:
        tokenizer: a folder, a hub name, or a size: a size names its tokenizer in a checkpoint, so that the checkpoint
            can be moved to another machine.
    """
    rows, columns = token_grid(config.image_size, config.image_size, config.token_pixels)
    num_image_tokens = rows * columns + config.mar.num_buffers
    loaded = load_tokenizer(TOKENIZERS.get(tokenizer, tokenizer))
    return Harmon(config, HarmonProcessor(loaded, config.image_size, num_image_tokens))


def from_folder(folder: Path) -> Harmon:
    """The model in an exported folder, in evaluation mode."""
    config, official = read_exported(folder)
    return official.load_into(build(config, str(folder))).eval()


def read_exported(folder: Path) -> "tuple[HarmonConfig, OfficialWeights]":
    """The configuration and the weights in an exported folder; CheckpointError if it holds another family."""
    config = HarmonConfig.from_dict(read_config(folder, Harmon.family, Harmon.title))
    weights = first_existing(folder, "harmon.safetensors", "harmon.pth")
    autoencoder = first_existing(folder, "kl16.safetensors", "kl16.ckpt")
    return config, read_official(weights, {"autoencoder": autoencoder}, config)


def from_official(weights: Path, size: Size, parts: Mapping[str, Path], tokenizer: str | None) -> Harmon:
    """The model in official files (harmon_0.5b.pth and kl16.ckpt, or a conversion), in evaluation mode."""
    official = read_official(weights, parts, config_of_size(size))
    brings_tokenizer = (weights / "tokenizer_config.json").exists()
    model = of_size(size, tokenizer or (str(weights) if brings_tokenizer else None))
    return official.load_into(model).eval()


@dataclass(frozen=True)
class OfficialWeights:
    """Official state dicts, and the files that they come from."""

    harmon: dict[str, Tensor]
    harmon_source: str
    autoencoder: dict[str, Tensor] | None
    """None for a model whose autoencoder has no weights."""
    autoencoder_source: str

    def load_into(self, model: Harmon) -> Harmon:
        """The model with these weights; CheckpointError names what does not fit."""
        model.load_official_weights(self.harmon, self.harmon_source)
        if self.autoencoder is not None:
            model.load_autoencoder_weights(self.autoencoder, self.autoencoder_source)
        return model


def read_official(weights: Path, parts: Mapping[str, Path], config: HarmonConfig) -> OfficialWeights:
    """Read official weight files; a conversion that holds `vae.*` keys needs no autoencoder file.

    Raises:
        SettingsError: if the model needs an autoencoder file and none is given.
    """
    state = read_weights(weights)
    if config.autoencoder.kind != "kl16":
        return OfficialWeights(state, str(weights), None, "")
    inside = {name.removeprefix("vae."): tensor for name, tensor in state.items() if name.startswith("vae.")}
    if inside:
        return OfficialWeights(state, str(weights), inside, str(weights))
    if "autoencoder" not in parts:
        raise SettingsError(
            f"{weights} holds no image autoencoder: set `autoencoder` to the official kl16.ckpt (wusize/harmon)"
        )
    return OfficialWeights(state, str(weights), read_weights(parts["autoencoder"]), str(parts["autoencoder"]))


def differing_parts(found: HarmonConfig, wanted: HarmonConfig) -> list[str]:
    """The entries in which two Harmons differ so that weights of one do not fit the other."""
    # Dropout has no weights, and acts in training only.
    found = replace(found, mar=replace(found.mar, dropout=wanted.mar.dropout))
    return [name for name in ("autoencoder", "mar", "llm") if getattr(found, name) != getattr(wanted, name)]


def rebuild(config: dict[str, Any], tokenizer: str, state: dict[str, Tensor]) -> Harmon:
    """The model of a training checkpoint: its configuration, tokenizer and own (not official) parameter names."""
    model = build(HarmonConfig.from_dict(config), tokenizer)
    model.load_state_dict(state)
    return model.eval()
