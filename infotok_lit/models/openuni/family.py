"""OpenUni as a family: its sizes as plain numbers, and its official files."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from infotok_lit.assets import embedded_base
from infotok_lit.errors import SettingsError
from infotok_lit.models.common.model_config import (
    QWEN25,
    SCENES_LLM,
    DCAEConfig,
    FlowSampling,
    LanguageModelConfig,
    ModelConfig,
    check_heads,
    check_least,
    check_positive,
)
from infotok_lit.models.family import Family, Part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOWNSAMPLE = 2
"""Patches per side that become one token of InternVL3."""
IMAGE_START, IMAGE_END = "<img>", "</img>"
IMAGE_TOKENS = (IMAGE_START, IMAGE_END, "<IMG_CONTEXT>")


@dataclass(frozen=True)
class VisionConfig:
    """InternViT, which reads images for the language model."""

    width: int = 1024
    mlp_width: int = 4096
    depth: int = 24
    heads: int = 16
    image_size: int = 448
    """Side of the square that its position table is for, in pixels."""
    patch_size: int = 14
    input_size: int | None = None
    """Side of the square that images are stretched to; null for `image_size`. Positions are interpolated."""

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("image_size", 1), ("patch_size", 1), ("mlp_width", 0), ("depth", 0)):
            check_least(f"vision.{name}", getattr(self, name), least)
        check_heads("vision.heads", self.heads, "vision.width", self.width)
        check_least("vision.input_size", self.input_side, 1)
        if self.input_side % (self.patch_size * DOWNSAMPLE):
            raise SettingsError(
                f"vision.input_size: {self.input_side} is not a multiple of {self.patch_size * DOWNSAMPLE} pixels, "
                "the size of a token"
            )

    @property
    def input_side(self) -> int:
        """Side of the square that images are stretched to, in pixels."""
        return self.image_size if self.input_size is None else self.input_size

    @property
    def grid_side(self) -> int:
        """Tokens per side of an image."""
        return self.input_side // (self.patch_size * DOWNSAMPLE)


@dataclass(frozen=True)
class ConnectorConfig:
    """The transformer between the language model's queries and the diffusion transformer."""

    width: int
    mlp_width: int
    depth: int
    heads: int
    order: Literal["connector_first", "projector_first", "projector_on_both_sides"] = "connector_first"
    """Where linear maps stand: after the connector (all released models), before it, or both."""

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("mlp_width", 0), ("depth", 0)):
            check_least(f"connector.{name}", getattr(self, name), least)
        check_heads("connector.heads", self.heads, "connector.width", self.width)


@dataclass(frozen=True)
class DiffusionTransformerConfig:
    """SANA."""

    heads: int
    head_dim: int
    depth: int
    cross_heads: int
    cross_head_dim: int
    caption_width: int = 2304
    mlp_ratio: float = 2.5
    sample_size: int = 16
    """Side of the latents that it was trained on; only a record."""
    qk_norm: Literal["rms_norm_across_heads"] | None = None

    def __post_init__(self) -> None:
        width = self.heads * self.head_dim
        if width < 1 or width != self.cross_heads * self.cross_head_dim:
            raise SettingsError(
                f"transformer.heads x head_dim is {self.heads} x {self.head_dim}, which must be cross_heads x "
                f"cross_head_dim, {self.cross_heads} x {self.cross_head_dim}"
            )


@dataclass(frozen=True)
class SamplingConfig(FlowSampling):
    """How images are generated unless a call says otherwise: as in the official scripts."""

    iterations: int = 20
    guidance: float = 4.5
    negative_prompt: str = ""
    """What guidance leads away from; "" for the unconditional prompt."""

    @property
    def scale(self) -> float:
        """As for all families, but what is below 1 is without guidance."""
        return max(self.guidance, 1.0)


@dataclass(frozen=True)
class OpenUniConfig(ModelConfig):
    """A whole OpenUni."""

    title: ClassVar[str] = "OpenUni"
    dropped: ClassVar[Mapping[str, str]] = {"vision.downsample": "it is 2 in every InternVL3"}

    vision: VisionConfig
    llm: LanguageModelConfig
    connector: ConnectorConfig
    transformer: DiffusionTransformerConfig
    autoencoder: DCAEConfig = field(default_factory=DCAEConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    num_queries: int = 256
    latent_scale: float = 0.41407
    """Latents are multiplied by this, so that they have about unit variance."""
    training_time_shift: float = 1.0
    """Above 1, more of the training times are near pure noise, where it is decided what stands where."""
    noise_draws: int = 1
    """At how many noise levels, spread evenly, an image is trained in a step. Its caption is read once for all of them,
    so where the diffusion transformer is small beside the language model, more cost little and say more."""
    grad_scale: float | None = None
    """Factor on the gradient that understanding sends into the vision tower; None leaves it alone."""
    capacity_bits: float | None = None
    """The most bits that the shared tokens of an image may carry in training (`Channel`); None for no limit."""
    image_size: int = 512
    """Side of the square images that are generated, in pixels."""
    max_length: int = 2048
    """Longest sequence in tokens, image included: longer questions and captions lose their end."""
    max_caption: int = 128
    """Longest request to generate an image in training, in tokens; prompts at inference may be as long as `max_length`
    says. The official code cuts behind the end of the turn instead, so that a long caption loses the marker that tells
    the model to answer."""
    system: str = (
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    )
    """System prompt of conversations about images: InternVL3's own."""

    def __post_init__(self) -> None:
        """SettingsError for numbers out of bounds."""
        if not self.training_time_shift > 0:
            raise SettingsError(f"training_time_shift must be positive, not {self.training_time_shift} (1 for none)")
        check_positive("latent_scale", self.latent_scale)
        for name in ("num_queries", "noise_draws", "max_caption"):
            check_least(name, getattr(self, name), 1)

    @property
    def token_pixels(self) -> int:
        """Pixels per side of a latent position, which is what the grid of a generated image counts."""
        return self.autoencoder.stride

    @property
    def num_image_tokens(self) -> int:
        """Language-model slots of one image to understand."""
        return self.vision.grid_side**2


_L_512 = OpenUniConfig(
    vision=VisionConfig(),
    llm=replace(QWEN25["1.5b"], vocab_size=151674, tie_word_embeddings=False),
    connector=ConnectorConfig(width=1536, mlp_width=8960, depth=6, heads=24),
    transformer=DiffusionTransformerConfig(heads=70, head_dim=32, depth=20, cross_heads=20, cross_head_dim=112),
)

SIZES: dict[str, OpenUniConfig] = {
    "scenes32": OpenUniConfig(
        vision=VisionConfig(width=96, mlp_width=256, depth=2, heads=4, image_size=32, patch_size=4),
        llm=replace(SCENES_LLM, tie_word_embeddings=False),
        connector=ConnectorConfig(width=128, mlp_width=384, depth=2, heads=4),
        transformer=DiffusionTransformerConfig(
            heads=4, head_dim=32, depth=4, cross_heads=4, cross_head_dim=32, caption_width=128, sample_size=4
        ),
        autoencoder=DCAEConfig(kind="dct", block_size=8, kept=4),
        sampling=SamplingConfig(iterations=20, guidance=3.0),
        num_queries=16,
        # About unit variance in the lowest frequencies, where objects are. With less, most times are all noise.
        latent_scale=1.0,
        image_size=32,
        # The Scenes tokenizer knows no Chinese, so the prompt would be long and empty.
        system="",
    ),
    "b-512": replace(
        _L_512,
        llm=replace(QWEN25["0.5b"], vocab_size=151674, tie_word_embeddings=False),
        connector=ConnectorConfig(width=896, mlp_width=3072, depth=6, heads=14),
        transformer=DiffusionTransformerConfig(heads=36, head_dim=32, depth=28, cross_heads=16, cross_head_dim=72),
    ),
    "l-512": _L_512,
    "l-1024": replace(
        _L_512,
        transformer=replace(_L_512.transformer, sample_size=32, qk_norm="rms_norm_across_heads"),
        image_size=1024,
    ),
}


class OpenUniFamily(Family):
    """The official sizes, and the embedded one for 32-pixel Scenes."""

    model_class = "OpenUni"
    config_class = OpenUniConfig
    sampling = SamplingConfig
    sizes = SIZES
    tokenizers: ClassVar[Mapping[str, str]] = {
        "scenes32": str(embedded_base("openuni", "scenes32")),
        "b-512": "OpenGVLab/InternVL3-1B",
        "l-512": "OpenGVLab/InternVL3-2B",
        "l-1024": "OpenGVLab/InternVL3-2B",
    }
    parts: ClassVar[Mapping[str, Part]] = {
        "vlm": Part(
            missing="vlm: set `vlm` to the folder of OpenGVLab/InternVL3-1B or -2B",
            prefix="lmm.",
            stem="internvl3",
        ),
        "transformer": Part(
            missing="transformer: set `transformer` to SANA's folder (its `transformer` subfolder)",
            prefix="transformer.",
            stem=None,
        ),
        "autoencoder": Part(
            missing="autoencoder: set `autoencoder` to the folder of mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
            prefix="vae.",
            stem="dc_ae",
        ),
    }
    weighted = ("vision", "llm", "connector", "transformer", "autoencoder", "num_queries")
    encoded_branches = ("generation",)
    essential = ("meta_queries", "connector.", "projector.")

    def load_tokenizer(self, source: str) -> "PreTrainedTokenizerBase":
        """With the image tokens of InternVL3 where they are missing."""
        tokenizer = super().load_tokenizer(source)
        known = tokenizer.get_vocab()
        tokenizer.add_tokens([token for token in IMAGE_TOKENS if token not in known], special_tokens=True)
        return tokenizer

    def tokenizer_folder(self, weights: Path, parts: Mapping[str, Path]) -> Path | None:
        """That of InternVL3."""
        return parts.get("vlm")

    def differing_parts(self, found: OpenUniConfig, wanted: OpenUniConfig) -> list[str]:
        """As for all families, but one position table serves every input size, and SANA has none."""
        same_input = replace(found.vision, input_size=wanted.vision.input_size)
        same_size = replace(found.transformer, sample_size=wanted.transformer.sample_size)
        return super().differing_parts(replace(found, vision=same_input, transformer=same_size), wanted)


FAMILY = OpenUniFamily()
