"""The sizes of Toy; imports nothing heavy, because the command line reads it."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from infotok_lit.models.common.language_model_config import LanguageModelConfig
from infotok_lit.models.common.model_config import ModelConfig

Size = Literal["scenes32"]
PARTS: dict[str, str] = {}
"""Toy's official checkpoint needs no file beside its main one."""


@dataclass(frozen=True)
class DrawingConfig:
    """How images are drawn unless a call says otherwise."""

    iterations: int = 5


@dataclass(frozen=True)
class ToyConfig(ModelConfig):
    """A whole Toy."""

    title: ClassVar[str] = "Toy"

    llm: LanguageModelConfig
    drawing: DrawingConfig = field(default_factory=DrawingConfig)
    block_size: int = 8
    """Pixels per side of a token."""
    kept: int = 4
    """Frequencies per axis and block that a latent keeps."""
    image_size: int = 32
    """Side of the square images, in pixels."""


def config_of_size(size: Size) -> ToyConfig:
    """The configuration of a size; ValueError if there is none."""
    if size != "scenes32":
        raise ValueError(f"no Toy of size {size!r}; choose scenes32")
    llm = LanguageModelConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=448,
        max_position_embeddings=512,
    )
    return ToyConfig(llm)
