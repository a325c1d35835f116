"""The sizes of OpenUni: everything that is needed to build the network, as plain numbers."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from infotok_lit.models.common.language_model_config import LanguageModelConfig
from infotok_lit.models.common.model_config import ModelConfig


@dataclass(frozen=True)
class VisionConfig:
    """InternViT, which reads images for the language model."""

    width: int = 1024
    mlp_width: int = 4096
    depth: int = 24
    heads: int = 16
    image_size: int = 448
    """Side of the square that it sees, in pixels; images are stretched to it."""
    patch_size: int = 14
    downsample: int = 2
    """Patches per side that become one token."""

    @property
    def grid_side(self) -> int:
        """Tokens per side of an image."""
        return self.image_size // self.patch_size // self.downsample


@dataclass(frozen=True)
class ConnectorConfig:
    """The transformer between the language model's queries and the diffusion transformer."""

    width: int
    mlp_width: int
    depth: int
    heads: int
    order: Literal["connector_first", "projector_first", "projector_on_both_sides"] = "connector_first"
    """Where linear maps stand: after the connector (all released models), before it, or both."""


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


@dataclass(frozen=True)
class AutoencoderConfig:
    """How pixels become latents: the deep-compression autoencoder of SANA, or a fixed block transform."""

    kind: Literal["dc_ae", "dct"] = "dc_ae"
    latent_channels: int = 32
    """Channels of the DC-AE latent (the block transform has 3 x kept^2)."""
    widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    attention_stages: int = 3
    """How many of the last stages attend."""
    attention_head_dim: int = 32
    block_size: int = 8
    """Block transform: pixels per side of a block."""
    kept: int = 4
    """Block transform: how many of the lowest frequencies per axis are kept."""

    @property
    def stride(self) -> int:
        """Pixels per latent position, per axis."""
        return self.block_size if self.kind == "dct" else 2 ** (len(self.widths) - 1)

    @property
    def channels(self) -> int:
        """Channels of the latent."""
        return 3 * self.kept**2 if self.kind == "dct" else self.latent_channels


@dataclass(frozen=True)
class DrawingConfig:
    """How images are drawn unless a call says otherwise: as in the official scripts."""

    iterations: int = 20
    guidance: float = 4.5
    time_shift: float = 3.0
    """Above 1, more of the iterations are near pure noise."""
    negative_prompt: str = ""
    """What guidance leads away from; "" for the unconditional prompt."""


@dataclass(frozen=True)
class OpenUniConfig(ModelConfig):
    """A whole OpenUni."""

    title: ClassVar[str] = "OpenUni"

    vision: VisionConfig
    llm: LanguageModelConfig
    connector: ConnectorConfig
    transformer: DiffusionTransformerConfig
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    drawing: DrawingConfig = field(default_factory=DrawingConfig)
    num_queries: int = 256
    latent_scale: float = 0.41407
    """Latents are multiplied by this, so that they have about unit variance."""
    grad_scale: float | None = None
    """Factor on the gradient that understanding sends into the vision tower; None leaves it alone."""
    image_size: int = 512
    """Side of the square images that are drawn, in pixels."""
    max_caption: int = 128
    """Training prompts are cut here, in tokens, after the end of the turn is appended, as in the official code."""
    system: str = (
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    )
    """System prompt of conversations about images: InternVL3's own."""


Size = Literal["scenes32", "b-512", "l-512", "l-1024"]

PARTS = {
    "vlm": "the folder of OpenUni's InternVL3",
    "transformer": "SANA's folder, for OpenUni checkpoints without it",
    "autoencoder": "the folder of SANA's DC-AE",
}


def config_of_size(size: Size) -> OpenUniConfig:
    """The official sizes, and the embedded one for 32-pixel Scenes.

    Raises:
        ValueError: for a size that does not exist.
    """
    if size not in _SIZES:
        raise ValueError(f"no OpenUni of size {size!r}; choose one of {', '.join(_SIZES)}")
    return _SIZES[size]


_L_512 = OpenUniConfig(
    vision=VisionConfig(),
    llm=LanguageModelConfig(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151674,
        tie_word_embeddings=False,
    ),
    connector=ConnectorConfig(width=1536, mlp_width=8960, depth=6, heads=24),
    transformer=DiffusionTransformerConfig(heads=70, head_dim=32, depth=20, cross_heads=20, cross_head_dim=112),
)

_SIZES: dict[str, OpenUniConfig] = {
    "scenes32": OpenUniConfig(
        vision=VisionConfig(width=96, mlp_width=256, depth=2, heads=4, image_size=32, patch_size=4),
        llm=LanguageModelConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=448,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            # As in the embedded Show-o2.
            rope_theta=100.0,
            # About 1 / sqrt(width), as in the other embedded models.
            initializer_range=0.09,
        ),
        connector=ConnectorConfig(width=128, mlp_width=384, depth=2, heads=4),
        transformer=DiffusionTransformerConfig(
            heads=4, head_dim=32, depth=4, cross_heads=4, cross_head_dim=32, caption_width=128, sample_size=4
        ),
        autoencoder=AutoencoderConfig(kind="dct", block_size=8, kept=4),
        drawing=DrawingConfig(iterations=20, guidance=3.0),
        num_queries=16,
        # About unit variance in the lowest frequencies, where objects are. With less, most times are all noise.
        latent_scale=1.0,
        image_size=32,
        # The Scenes tokenizer knows no Chinese, so the prompt would be long and empty.
        system="",
    ),
    "b-512": replace(
        _L_512,
        llm=replace(_L_512.llm, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
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
