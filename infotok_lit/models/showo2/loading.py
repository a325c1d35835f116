"""Building Show-o2 from an exported folder, from official checkpoints, or fresh."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.checkpoints import first_existing, read_config, read_weights
from infotok_lit.errors import SettingsError
from infotok_lit.models.common.tokenizer import load_tokenizer
from infotok_lit.models.showo2.config import Showo2Config, Size, config_of_size
from infotok_lit.models.showo2.keys import EMBEDDINGS, LM_HEAD
from infotok_lit.models.showo2.model import Showo2
from infotok_lit.models.showo2.processor import Showo2Processor, add_missing_tokens

TOKENIZERS: dict[Size, str] = {
    "scenes32": str(SCENES_TOKENIZER),
    "1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "1.5b-hq": "Qwen/Qwen2.5-1.5B-Instruct",
    "7b": "Qwen/Qwen2.5-7B-Instruct",
}


def of_size(size: Size, tokenizer: str | None = None, settings: Mapping[str, Any] = MappingProxyType({})) -> Showo2:
    """A fresh Show-o2.

    Args:
        size: which configuration.
        tokenizer: a folder, a name on the Hugging Face hub, or a size, for its own; default: the one of `size`.
        settings: entries of the configuration that differ from the size's.
    """
    return build(config_of_size(size).with_settings(settings), tokenizer or size)


def build(config: Showo2Config, tokenizer: str) -> Showo2:
    """A fresh Show-o2 of any configuration, with its processor.

    Args:
        tokenizer: a folder, a hub name, or a size: a size names its tokenizer in a checkpoint, so that the checkpoint
            can be moved to another machine.
    """
    loaded = add_missing_tokens(load_tokenizer(TOKENIZERS.get(tokenizer, tokenizer)))
    if len(loaded) > config.llm.vocab_size:
        raise SettingsError(f"the tokenizer has {len(loaded)} tokens, the language model only {config.llm.vocab_size}")
    return Showo2(config, Showo2Processor(loaded, config.image_size, config.num_image_tokens, config.prompts))


def from_folder(folder: Path) -> Showo2:
    """The model in an exported folder, in evaluation mode."""
    config, official = read_exported(folder)
    return official.load_into(build(config, str(folder))).eval()


def read_exported(folder: Path) -> "tuple[Showo2Config, OfficialWeights]":
    """The configuration and the weights in an exported folder; CheckpointError if it holds another family."""
    config = Showo2Config.from_dict(read_config(folder, Showo2.family, Showo2.title))
    weights = first_existing(folder, "showo2.safetensors", "showo2.pth")
    autoencoder = first_existing(folder, "wan_vae.safetensors", "wan_vae.ckpt")
    official = read_official(weights, {"autoencoder": autoencoder}, config)
    if config.quantiser.kind == "none":
        return config, official
    quantiser = read_weights(first_existing(folder, "quantiser.safetensors", "quantiser.ckpt"))
    return config, replace(official, quantiser=quantiser)


def from_official(weights: Path, size: Size, parts: Mapping[str, Path], tokenizer: str | None) -> Showo2:
    """The model in official files (the folder of show-o2-1.5B and Wan2.1_VAE.pth), in evaluation mode."""
    official = read_official(weights, parts, config_of_size(size))
    brings_tokenizer = (weights / "tokenizer_config.json").exists()
    model = of_size(size, tokenizer or (str(weights) if brings_tokenizer else None))
    return official.load_into(model).eval()


@dataclass(frozen=True)
class OfficialWeights:
    """Official state dicts, and the files that they come from."""

    showo2: dict[str, Tensor]
    showo2_source: str
    autoencoder: dict[str, Tensor] | None
    """None for a model whose autoencoder has no weights."""
    autoencoder_source: str
    quantiser: dict[str, Tensor] | None = None
    """None where there is no quantiser yet: a model that asks for one starts it anew."""

    def load_into(self, model: Showo2) -> Showo2:
        """The model with these weights; CheckpointError names what does not fit."""
        model.load_official_weights(self.showo2, self.showo2_source)
        if self.autoencoder is not None:
            model.load_autoencoder_weights(self.autoencoder, self.autoencoder_source)
        if self.quantiser is not None:
            model.load_quantiser_weights(self.quantiser, self.showo2_source)
        return model


def read_official(weights: Path, parts: Mapping[str, Path], config: Showo2Config) -> OfficialWeights:
    """Read official weight files.

    Raises:
        SettingsError: if the model needs an autoencoder file and none is given.
    """
    state = read_weights(weights)
    if config.llm.tie_word_embeddings:
        _warn_of_untied_head(state, weights)
    if config.autoencoder.kind != "wan":
        return OfficialWeights(state, str(weights), None, "")
    if "autoencoder" not in parts:
        raise SettingsError(
            f"{weights} holds no image autoencoder: set `autoencoder` to Wan2.1_VAE.pth (Wan-AI/Wan2.1-T2V-14B)"
        )
    return OfficialWeights(state, str(weights), read_weights(parts["autoencoder"]), str(parts["autoencoder"]))


def differing_parts(found: Showo2Config, wanted: Showo2Config) -> list[str]:
    """The entries in which two Show-o2 differ so that weights of one do not fit the other."""
    names = ["autoencoder", "semantic", "llm", "diffusion_head"]
    # A quantiser may be added to a model without one.
    names += [] if found.quantiser.kind == "none" else ["quantiser"]
    return [name for name in names if getattr(found, name) != getattr(wanted, name)]


def rebuild(config: dict[str, Any], tokenizer: str, state: dict[str, Tensor]) -> Showo2:
    """The model of a training checkpoint: its configuration, tokenizer and own (not official) parameter names."""
    model = build(Showo2Config.from_dict(config), tokenizer)
    model.load_state_dict(state)
    return model.eval()


def _warn_of_untied_head(state: Mapping[str, Tensor], source: Path) -> None:
    """The official loader unties the head, so fine-tuning with it can leave two different tables."""
    head, table = state.get(LM_HEAD), state.get(EMBEDDINGS)
    if head is not None and table is not None and not torch.equal(head, table):
        warnings.warn(
            f"{source} holds an output head that differs from its embedding table, but this size ties them: the "
            "embedding table is used for both. To keep them apart, set settings.llm.tie_word_embeddings to false",
            stacklevel=2,
        )
