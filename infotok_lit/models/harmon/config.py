"""The sizes of Harmon: everything that is needed to build the network, as plain numbers."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from infotok_lit.models.common.language_model_config import LanguageModelConfig
from infotok_lit.models.common.model_config import ModelConfig


@dataclass(frozen=True)
class AutoencoderConfig:
    """How pixels become latents: the KL-16 autoencoder of the official model, or a fixed block transform."""

    kind: Literal["kl16", "dct"] = "kl16"
    latent_channels: int = 16
    """Channels of the KL-16 latent (the block transform has 3 x kept^2)."""
    base_width: int = 128
    width_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks_per_level: int = 2
    num_groups: int = 32
    """Groups of every GroupNorm."""
    attention_resolution: int = 16
    """Levels of this nominal resolution have self-attention; the nominal input is 256 pixels."""
    block_size: int = 8
    """Block transform: pixels per side of a block."""
    kept: int = 8
    """Block transform: how many of the lowest frequencies per axis are kept; block_size keeps everything."""

    @property
    def stride(self) -> int:
        """Pixels per latent position, per axis."""
        return self.block_size if self.kind == "dct" else 2 ** (len(self.width_multipliers) - 1)

    @property
    def channels(self) -> int:
        """Channels of the latent."""
        return 3 * self.kept**2 if self.kind == "dct" else self.latent_channels


@dataclass(frozen=True)
class MARConfig:
    """The masked autoregressive encoder and decoder and the token diffusion network."""

    encoder_width: int
    encoder_depth: int
    encoder_heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    diffusion_depth: int
    diffusion_width: int
    default_grid: tuple[int, int] = (16, 16)
    """The grid of the stored position tables; other grids are interpolated."""
    patch_size: int = 1
    mlp_ratio: float = 4.0
    num_buffers: int = 64
    """Extra tokens that carry image content without a place of their own."""
    dropout: float = 0.1
    mask_ratio_min: float = 0.7
    mask_ratio_std: float = 0.25
    """Spread of the normal that mask ratios come from, around 1 and truncated to [mask_ratio_min, 1]."""
    noise_draws: int = 4
    """How many (timestep, noise) pairs each token is trained on per step."""
    sampling_steps: str = "100"
    """Timesteps of the diffusion sampler, in the respacing notation of the official code."""
    num_classes: int = 1000
    """Rows of the class table that official checkpoints carry and nothing uses."""


@dataclass(frozen=True)
class DrawingConfig:
    """How images are drawn unless a call says otherwise: as in the official scripts."""

    iterations: int = 64
    guidance: float = 3.0
    guidance_schedule: Literal["constant", "linear"] = "constant"
    temperature: float = 1.0


@dataclass(frozen=True)
class HarmonConfig(ModelConfig):
    """A whole Harmon."""

    title: ClassVar[str] = "Harmon"

    autoencoder: AutoencoderConfig
    mar: MARConfig
    llm: LanguageModelConfig
    drawing: DrawingConfig = field(default_factory=DrawingConfig)
    latent_scale: float = 0.2325
    """Latents are multiplied by this, so that they have about unit variance."""
    grad_scale: float | None = 0.1
    """Factor on the gradient that understanding sends into the visual encoder; None leaves it alone."""
    image_size: int = 512
    """Side of the square images that the processor makes, in pixels."""
    repetition_penalty: float = 1.0
    """Applied to already generated tokens when describing."""

    @property
    def token_pixels(self) -> int:
        """Pixels per side of a token."""
        return self.autoencoder.stride * self.mar.patch_size


Size = Literal["scenes32", "0.5b", "1.5b"]

PARTS = {"autoencoder": "Harmon's KL-16 (kl16.ckpt)"}


def config_of_size(size: Size) -> HarmonConfig:
    """The two official sizes, and the embedded one for 32-pixel Scenes.

    Raises:
        ValueError: for a size that does not exist.
    """
    if size not in _SIZES:
        raise ValueError(f"no Harmon of size {size!r}; choose one of {', '.join(_SIZES)}")
    return _SIZES[size]


_SIZES: dict[str, HarmonConfig] = {
    "scenes32": HarmonConfig(
        # Half the frequencies per axis: every object is still recognised, and a token has 48 channels, not 192.
        autoencoder=AutoencoderConfig(kind="dct", block_size=8, kept=4),
        mar=MARConfig(
            encoder_width=128,
            encoder_depth=3,
            encoder_heads=4,
            decoder_width=128,
            decoder_depth=3,
            decoder_heads=4,
            diffusion_depth=2,
            diffusion_width=256,
            default_grid=(4, 4),
            num_buffers=4,
            dropout=0.0,
            mask_ratio_min=0.05,
            # Where most places are visible, they say more than the text, and word order is not learnt.
            mask_ratio_std=0.2,
            # Never visits the last timesteps, where a small network's error is multiplied by up to 20,000.
            sampling_steps="ddim25",
            num_classes=1,
        ),
        llm=LanguageModelConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=440,
            max_position_embeddings=4096,
            # About 1 / sqrt(width): at 0.02 so narrow a network hardly lets the prompt reach the image at first.
            initializer_range=0.09,
            # Sequences have some 60 positions: with 100 or more, drawing read its prompt as a bag of words.
            rope_theta=10.0,
        ),
        drawing=DrawingConfig(iterations=16, guidance=2.0),
        # Objects reach about 1.5, so that their colour drowns in half of the noise levels and text is worth reading.
        latent_scale=0.3,
        grad_scale=None,
        image_size=32,
    ),
    "0.5b": HarmonConfig(
        autoencoder=AutoencoderConfig(),
        mar=MARConfig(
            encoder_width=768,
            encoder_depth=12,
            encoder_heads=12,
            decoder_width=768,
            decoder_depth=12,
            decoder_heads=12,
            diffusion_depth=6,
            diffusion_width=1024,
        ),
        llm=LanguageModelConfig(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
        ),
        repetition_penalty=1.1,
    ),
    "1.5b": HarmonConfig(
        autoencoder=AutoencoderConfig(),
        mar=MARConfig(
            encoder_width=1280,
            encoder_depth=20,
            encoder_heads=16,
            decoder_width=1280,
            decoder_depth=20,
            decoder_heads=16,
            diffusion_depth=12,
            diffusion_width=1536,
        ),
        llm=LanguageModelConfig(
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
        ),
        repetition_penalty=1.1,
    ),
}
