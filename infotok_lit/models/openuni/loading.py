"""Building OpenUni from an exported folder, from official checkpoints, or fresh."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.checkpoints import CheckpointError, State, first_existing, read_config, read_weights
from infotok_lit.errors import SettingsError
from infotok_lit.models.common.tokenizer import load_tokenizer
from infotok_lit.models.openuni.config import OpenUniConfig, Size, config_of_size
from infotok_lit.models.openuni.model import OWN_PARTS, OpenUni
from infotok_lit.models.openuni.processor import OpenUniProcessor, add_missing_tokens

TOKENIZERS: dict[Size, str] = {
    "scenes32": str(SCENES_TOKENIZER),
    "b-512": "OpenGVLab/InternVL3-1B",
    "l-512": "OpenGVLab/InternVL3-2B",
    "l-1024": "OpenGVLab/InternVL3-2B",
}
REQUIRED = ("meta_queries", "connector.", "projector.")
"""What every OpenUni checkpoint holds."""


def of_size(size: Size, tokenizer: str | None = None, settings: Mapping[str, Any] = MappingProxyType({})) -> OpenUni:
    """A fresh OpenUni.

    Args:
        size: which configuration.
        tokenizer: a folder, a name on the Hugging Face hub, or a size, for its own; default: the one of `size`.
        settings: entries of the configuration that differ from the size's.
    """
    return build(config_of_size(size).with_settings(settings), tokenizer or size)


def build(config: OpenUniConfig, tokenizer: str) -> OpenUni:
    """A fresh OpenUni of any configuration, with its processor.

    Args:
        tokenizer: a folder, a hub name, or a size: a size names its tokenizer in a checkpoint, so that the checkpoint
            can be moved to another machine.
    """
    loaded = add_missing_tokens(load_tokenizer(TOKENIZERS.get(tokenizer, tokenizer)))
    if len(loaded) > config.llm.vocab_size:
        raise SettingsError(f"the tokenizer has {len(loaded)} tokens, the language model only {config.llm.vocab_size}")
    processor = OpenUniProcessor(
        loaded,
        config.image_size,
        config.vision.image_size,
        config.vision.grid_side**2,
        config.max_caption,
        config.system,
    )
    return OpenUni(config, processor)


def from_folder(folder: Path) -> OpenUni:
    """The model in an exported folder, in evaluation mode."""
    config, official = read_exported(folder)
    return official.load_into(build(config, str(folder))).eval()


def read_exported(folder: Path) -> "tuple[OpenUniConfig, OfficialWeights]":
    """The configuration and the weights in an exported folder; CheckpointError if it holds another family."""
    config = OpenUniConfig.from_dict(read_config(folder, OpenUni.family, OpenUni.title))
    parts = {
        "vlm": first_existing(folder, "internvl3.safetensors", "internvl3.ckpt"),
        "autoencoder": first_existing(folder, "dc_ae.safetensors", "dc_ae.ckpt"),
    }
    return config, read_official(first_existing(folder, "openuni.safetensors", "openuni.pth"), parts, config)


def from_official(weights: Path, size: Size, parts: Mapping[str, Path], tokenizer: str | None) -> OpenUni:
    """The model in official files, in evaluation mode; the tokenizer is that of the InternVL3 folder if it has one."""
    official = read_official(weights, parts, config_of_size(size))
    vlm = parts.get("vlm")
    brings_tokenizer = vlm is not None and (vlm / "tokenizer_config.json").exists()
    return official.load_into(of_size(size, tokenizer or (str(vlm) if brings_tokenizer else None))).eval()


@dataclass(frozen=True)
class OfficialWeights:
    """Official state dicts by part, each with the file that it comes from."""

    own: tuple[State, str]
    """Queries, connector, projector and diffusion transformer."""
    vlm: tuple[State, str]
    autoencoder: tuple[State, str] | None
    """None for a model whose autoencoder has no weights."""

    def load_into(self, model: OpenUni) -> OpenUni:
        """The model with these weights; CheckpointError names what does not fit."""
        model.load_own_weights(*self.own)
        model.load_vlm_weights(*self.vlm)
        if self.autoencoder is not None:
            model.load_autoencoder_weights(*self.autoencoder)
        return model


def read_official(weights: Path, parts: Mapping[str, Path], config: OpenUniConfig) -> OfficialWeights:
    """Read official weight files; a file that holds a part itself needs no other file for it.

    Raises:
        SettingsError: naming a part that is needed and not given, or what the main file lacks.
    """
    state = read_weights(weights)
    absent = [part for part in REQUIRED if not any(name.startswith(part) for name in state)]
    if absent:
        raise CheckpointError(f"{weights} is no OpenUni checkpoint: it lacks {', '.join(absent)}")
    own = {name: tensor for name, tensor in state.items() if name.startswith(OWN_PARTS)}
    source = str(weights)
    if not any(name.startswith("transformer.") for name in own):
        found, source = _part(state, "transformer", parts, weights, "SANA's folder (its `transformer` subfolder)")
        own |= {f"transformer.{name}": tensor for name, tensor in found.items()}
    _refuse_unknown(state, weights)
    vlm = _part(state, "vlm", parts, weights, "the folder of OpenGVLab/InternVL3-1B or -2B", prefix="lmm.")
    needs_autoencoder = config.autoencoder.kind == "dc_ae"
    name = "the folder of mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
    autoencoder = _part(state, "autoencoder", parts, weights, name, prefix="vae.") if needs_autoencoder else None
    return OfficialWeights((own, source), vlm, autoencoder)


def differing_parts(found: OpenUniConfig, wanted: OpenUniConfig) -> list[str]:
    """The entries in which two OpenUnis differ so that weights of one do not fit the other."""
    names = ("vision", "llm", "connector", "transformer", "autoencoder", "num_queries")
    return [name for name in names if getattr(found, name) != getattr(wanted, name)]


def rebuild(config: dict[str, Any], tokenizer: str, state: dict[str, Tensor]) -> OpenUni:
    """The model of a training checkpoint: its configuration, tokenizer and own (not official) parameter names."""
    model = build(OpenUniConfig.from_dict(config), tokenizer)
    model.load_state_dict(state)
    return model.eval()


def _part(
    state: State, part: str, parts: Mapping[str, Path], weights: Path, where: str, prefix: str = "\0"
) -> tuple[State, str]:
    """A part from inside the main file, or from its own."""
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if inside:
        return inside, str(weights)
    if part not in parts:
        raise SettingsError(f"{weights} holds no {part}: set `{part}` to {where}")
    return read_weights(parts[part]), str(parts[part])


def _refuse_unknown(state: State, weights: Path) -> None:
    unknown = sorted(name for name in state if not name.startswith((*OWN_PARTS, "lmm.", "vae.")))
    if unknown:
        raise CheckpointError(
            f"the weights in {weights} do not fit: {len(unknown)} unexpected: {', '.join(unknown[:5])}"
        )
