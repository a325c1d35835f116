"""Harmon as a family: its sizes as plain numbers, and its official files."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from infotok_lit.assets import embedded_base
from infotok_lit.batch import BRANCHES
from infotok_lit.errors import SettingsError
from infotok_lit.models.common.model_config import (
    QWEN25,
    SCENES_LLM,
    KL16Config,
    LanguageModelConfig,
    ModelConfig,
    Sampling,
    check_heads,
    check_least,
    check_positive,
)
from infotok_lit.models.family import Family, Part


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

    def __post_init__(self) -> None:
        check_heads("mar.encoder_heads", self.encoder_heads, "mar.encoder_width", self.encoder_width)
        check_heads("mar.decoder_heads", self.decoder_heads, "mar.decoder_width", self.decoder_width)
        for name in ("encoder_width", "decoder_width", "diffusion_width", "patch_size", "num_buffers", "noise_draws"):
            check_least(f"mar.{name}", getattr(self, name), 1)
        for name in ("encoder_depth", "decoder_depth", "diffusion_depth", "num_classes"):
            check_least(f"mar.{name}", getattr(self, name), 0)
        for name in ("mlp_ratio", "mask_ratio_std"):
            check_positive(f"mar.{name}", getattr(self, name))
        for side in self.default_grid:
            check_least("a side of mar.default_grid", side, 1)
        if not 0 <= self.dropout < 1:
            raise SettingsError(f"mar.dropout is {self.dropout}; set it to 0 or more, and below 1")
        if not 0 <= self.mask_ratio_min <= 1:
            raise SettingsError(f"mar.mask_ratio_min is {self.mask_ratio_min}; set it to a share, 0 to 1")


@dataclass(frozen=True)
class SamplingConfig(Sampling):
    """How images are generated unless a call says otherwise: as in the official scripts."""

    iterations: int = 64
    guidance: float = 3.0
    guidance_schedule: Literal["constant", "linear"] = "constant"
    temperature: float = 1.0
    solver_steps: int = 0
    """Steps of DPM-Solver++ for each token; 0: ancestral sampling over the steps of `mar.sampling_steps`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("solver_steps", self.solver_steps, 0)
        if self.solver_steps and self.temperature != 1:
            raise SettingsError(
                f"temperature is {self.temperature}, but DPM-Solver++ has no noise to scale: set solver_steps to 0, or "
                "leave temperature at 1"
            )


@dataclass(frozen=True)
class HarmonConfig(ModelConfig):
    """A whole Harmon."""

    title: ClassVar[str] = "Harmon"

    autoencoder: KL16Config
    mar: MARConfig
    llm: LanguageModelConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    latent_scale: float = 0.2325
    """Latents are multiplied by this, so that they have about unit variance."""
    grad_scale: float | None = 0.1
    """Factor on the gradient that understanding sends into the visual encoder; None leaves it alone."""
    capacity_bits: float | None = None
    """The most bits that the shared tokens of an image may carry in training (`Channel`); None for no limit."""
    image_size: int = 512
    """Side of the square images that the processor makes, in pixels."""
    repetition_penalty: float = 1.0
    """Applied to already generated tokens when describing."""
    max_length: int = 2048
    """Longest sequence in tokens, image included: longer questions and captions lose their end."""

    def __post_init__(self) -> None:
        check_positive("latent_scale", self.latent_scale)
        check_positive("repetition_penalty", self.repetition_penalty)

    @property
    def token_pixels(self) -> int:
        """Pixels per side of a token."""
        return self.autoencoder.stride * self.mar.patch_size

    @property
    def num_image_tokens(self) -> int:
        """Language-model slots of one image: the grid, then MAR's buffers."""
        return super().num_image_tokens + self.mar.num_buffers


def _encoder_and_decoder(width: int, depth: int, heads: int) -> dict[str, int]:
    """MAR's encoder and decoder are alike in every size."""
    return {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in {"width": width, "depth": depth, "heads": heads}.items()
    }


SIZES: dict[str, HarmonConfig] = {
    "scenes32": HarmonConfig(
        # Half the frequencies per axis: every object is still recognised, and a token has 48 channels, not 192.
        autoencoder=KL16Config(kind="dct", block_size=8, kept=4),
        mar=MARConfig(
            **_encoder_and_decoder(width=128, depth=3, heads=4),
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
        # Sequences have some 60 positions: with 100 or more, generation read its prompt as a bag of words.
        llm=replace(SCENES_LLM, num_hidden_layers=3, rope_theta=10.0),
        sampling=SamplingConfig(iterations=16, guidance=2.0),
        # Objects reach about 1.5, so that their colour drowns in half of the noise levels and text is worth reading.
        latent_scale=0.3,
        grad_scale=None,
        image_size=32,
    ),
    "0.5b": HarmonConfig(
        autoencoder=KL16Config(),
        mar=MARConfig(**_encoder_and_decoder(width=768, depth=12, heads=12), diffusion_depth=6, diffusion_width=1024),
        llm=QWEN25["0.5b"],
        repetition_penalty=1.1,
    ),
    "1.5b": HarmonConfig(
        autoencoder=KL16Config(),
        mar=MARConfig(**_encoder_and_decoder(width=1280, depth=20, heads=16), diffusion_depth=12, diffusion_width=1536),
        llm=QWEN25["1.5b"],
        repetition_penalty=1.1,
    ),
}


class HarmonFamily(Family):
    """The two official sizes, and the embedded one for 32-pixel Scenes."""

    model_class = "Harmon"
    config_class = HarmonConfig
    sampling = SamplingConfig
    sizes = SIZES
    tokenizers: ClassVar[Mapping[str, str]] = {
        "scenes32": str(embedded_base("harmon", "scenes32")),
        "0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
        "1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    }
    parts: ClassVar[Mapping[str, Part]] = {
        "autoencoder": Part(
            missing="image autoencoder: set `autoencoder` to the official kl16.ckpt (wusize/harmon)",
            prefix="vae.",
            stem="kl16",
        )
    }
    weighted = ("autoencoder", "mar", "llm")
    encoded_branches = BRANCHES

    def differing_parts(self, found: HarmonConfig, wanted: HarmonConfig) -> list[str]:
        """As for all families, but no weights depend on how MAR is trained, nor on how tokens are sampled."""
        free = ("dropout", "mask_ratio_min", "mask_ratio_std", "noise_draws", "sampling_steps")
        mar = replace(found.mar, **{name: getattr(wanted.mar, name) for name in free})
        return super().differing_parts(replace(found, mar=mar), wanted)


FAMILY = HarmonFamily()
