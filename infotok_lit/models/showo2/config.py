"""The sizes of Show-o2: everything that is needed to build the network, as plain numbers."""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from infotok_lit.models.common.language_model_config import LanguageModelConfig
from infotok_lit.models.common.model_config import ModelConfig
from infotok_lit.models.common.token_grid import token_grid

PATCH_SIZE = 2
"""Latent pixels per side of a token."""


@dataclass(frozen=True)
class AutoencoderConfig:
    """How pixels become latents: the Wan2.1 VAE of the official model, or a fixed block transform."""

    kind: Literal["wan", "dct"] = "wan"
    base_width: int = 96
    latent_channels: int = 16
    """Channels of the Wan latent (the block transform has 3 x kept^2)."""
    width_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks_per_level: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    """Which levels would also halve the frames of a video; an image passes by them."""
    posterior: Literal["sample", "mean"] = "sample"
    """Whether a latent is a draw from the Wan posterior, as in the official code, or its mean."""
    block_size: int = 4
    """Block transform: pixels per side of a block."""
    kept: int = 2
    """Block transform: how many of the lowest frequencies per axis are kept."""

    @property
    def stride(self) -> int:
        """Pixels per latent pixel, per axis."""
        return self.block_size if self.kind == "dct" else 2 ** (len(self.width_multipliers) - 1)

    @property
    def channels(self) -> int:
        """Channels of the latent."""
        return 3 * self.kept**2 if self.kind == "dct" else self.latent_channels


@dataclass(frozen=True)
class SemanticConfig:
    """The SigLIP layers that give latents their meaning."""

    width: int
    mlp_width: int
    depth: int
    heads: int
    table_side: int = 27
    """Side of the square position table; other grids are interpolated from it."""
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True)
class QuantiserConfig:
    """An optional quantiser of the shared tokens; the official model has none."""

    kind: Literal["none", "fsq", "lfq", "vq"] = "none"
    """Finite scalar, lookup-free or vector quantisation."""
    levels: tuple[int, ...] = (8, 8, 8, 5, 5)
    """Finite scalar quantisation: how many values each of its few channels has."""
    codebook_size: int = 4096
    """Lookup-free (a power of 2) and vector quantisation: how many codes there are."""
    codebook_width: int = 32
    """Vector quantisation: the width in which distances are measured."""
    commitment_weight: float = 0.25
    entropy_weight: float = 0.1
    """Lookup-free quantisation: how strongly sure but different choices are asked for."""

    @property
    def num_codes(self) -> int:
        """How many codes there are."""
        return math.prod(self.levels) if self.kind == "fsq" else self.codebook_size


@dataclass(frozen=True)
class DiffusionHeadConfig:
    """The modulated transformer that turns hidden states into a velocity."""

    width: int
    mlp_width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class DrawingConfig:
    """How images are drawn unless a call says otherwise."""

    iterations: int = 50
    """Points of the time grid; the network is called once for each but the last."""
    guidance: float = 5.0
    time_shift: float = 3.0
    """Above 1, more of the grid lies near pure noise."""


@dataclass(frozen=True)
class TrainingTimeConfig:
    """Which noise levels training visits."""

    shifted: bool = True
    """Shift the times towards noise, the more the more tokens an image has."""
    understanding_min: float = 1.0
    """The earliest time of images to read; 1 reads clean images, and only these take no flow loss."""


@dataclass(frozen=True)
class PromptConfig:
    """Which of the official layouts of text and image are used."""

    reading: Literal["chat", "pretraining", "caption"] = "chat"
    """Training to read: the layout of stage 2c with its system prompt, of stage 2a/b, or of stage 1."""
    describing: Literal["official", "training"] = "official"
    """Inference: as the official script, which differs from all training layouts, or as `reading`."""
    system: str = "You are a helpful assistant."
    max_text: int = 512
    """Longest question and longest answer, in tokens."""
    max_caption: int = 290
    """Longest caption to draw, in tokens."""


@dataclass(frozen=True)
class Showo2Config(ModelConfig):
    """A whole Show-o2."""

    title: ClassVar[str] = "Show-o2"

    autoencoder: AutoencoderConfig
    semantic: SemanticConfig
    llm: LanguageModelConfig
    diffusion_head: DiffusionHeadConfig
    drawing: DrawingConfig = field(default_factory=DrawingConfig)
    training_time: TrainingTimeConfig = field(default_factory=TrainingTimeConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    quantiser: QuantiserConfig = field(default_factory=QuantiserConfig)
    latent_scale: float = 1.0
    """Latents are multiplied by this; Wan latents are already normalised."""
    grad_scale: float | None = None
    """Factor on the gradient that understanding sends into the visual encoder; None leaves it alone."""
    image_size: int = 432
    """Side of the square images that the processor makes, in pixels."""

    @property
    def token_pixels(self) -> int:
        """Pixels per side of a token."""
        return self.autoencoder.stride * PATCH_SIZE

    @property
    def num_image_tokens(self) -> int:
        """Language-model slots of one image: the time, then the grid."""
        rows, columns = token_grid(self.image_size, self.image_size, self.token_pixels)
        return 1 + rows * columns


Size = Literal["scenes32", "1.5b", "1.5b-hq", "7b"]

PARTS = {"autoencoder": "the Wan2.1 VAE of Show-o2 (Wan2.1_VAE.pth)"}


def config_of_size(size: Size) -> Showo2Config:
    """The official sizes, and the embedded one for 32-pixel Scenes.

    Raises:
        ValueError: for a size that does not exist.
    """
    if size not in _SIZES:
        raise ValueError(f"no Show-o2 of size {size!r}; choose one of {', '.join(_SIZES)}")
    return _SIZES[size]


_BASE = Showo2Config(
    autoencoder=AutoencoderConfig(),
    semantic=SemanticConfig(width=1152, mlp_width=4304, depth=26, heads=16),
    llm=LanguageModelConfig(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151669,
    ),
    diffusion_head=DiffusionHeadConfig(width=2048, mlp_width=8192, depth=10, heads=32, kv_heads=8, head_dim=64),
)

_SIZES: dict[str, Showo2Config] = {
    "scenes32": Showo2Config(
        # A token sees 8x8 pixels through 48 numbers, as in the embedded Harmon.
        autoencoder=AutoencoderConfig(kind="dct", block_size=4, kept=2),
        semantic=SemanticConfig(width=128, mlp_width=384, depth=2, heads=4, table_side=4),
        llm=LanguageModelConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=448,
            max_position_embeddings=4096,
            # Sequences have some 40 positions. With 1e6, drawing alone had a loss of 0.29 after 600 steps,
            # with 100 of 0.22.
            rope_theta=100.0,
            # About 1 / sqrt(width), as in the embedded Harmon.
            initializer_range=0.09,
        ),
        diffusion_head=DiffusionHeadConfig(width=128, mlp_width=384, depth=4, heads=4, kv_heads=4, head_dim=32),
        drawing=DrawingConfig(iterations=20, guidance=2.0),
        # The Scenes tokenizer knows no English beyond its grammar, so a system prompt would be long and empty.
        prompts=PromptConfig(describing="training", system=""),
        latent_scale=0.5,
        image_size=32,
    ),
    "1.5b": _BASE,
    "1.5b-hq": replace(_BASE, image_size=512),
    "7b": replace(
        _BASE,
        llm=replace(
            _BASE.llm,
            hidden_size=3584,
            intermediate_size=18944,
            num_attention_heads=28,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        ),
    ),
}
