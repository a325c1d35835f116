"""Toy as a family: one size as plain numbers, and one official file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.models.common.model_config import LanguageModelConfig, ModelConfig
from infotok_lit.models.family import Family


@dataclass(frozen=True)
class SamplingConfig:
    """How images are generated unless a call says otherwise."""

    iterations: int = 4


@dataclass(frozen=True)
class ToyConfig(ModelConfig):
    """A whole Toy."""

    title: ClassVar[str] = "Toy"

    llm: LanguageModelConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    image_size: int = 32
    token_pixels: int = 8
    kept: int = 4
    """How many of the lowest frequencies of a token's pixels it sees, per axis."""
    grad_scale: float | None = None
    """Factor on the gradient that understanding sends into the encoder; None leaves it alone."""
    max_length: int = 256


class ToyFamily(Family):
    """One size, for 32-pixel Scenes."""

    model_class = "Toy"
    config_class = ToyConfig
    sampling = SamplingConfig
    tokenizers: ClassVar[Mapping[str, str]] = {"scenes32": str(SCENES_TOKENIZER)}
    weighted = ("llm", "kept", "image_size")
    sizes: ClassVar[Mapping[str, ToyConfig]] = {
        "scenes32": ToyConfig(
            llm=LanguageModelConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                vocab_size=440,
                max_position_embeddings=512,
            )
        )
    }


FAMILY = ToyFamily()
