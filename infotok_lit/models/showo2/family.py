"""Show-o2 as a family: its sizes as plain numbers, and its official files."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from infotok_lit.assets import embedded_base
from infotok_lit.batch import BRANCHES
from infotok_lit.checkpoints import first_existing, read_weights
from infotok_lit.errors import SettingsError
from infotok_lit.models.common.model_config import (
    QWEN25,
    SCENES_LLM,
    FlowSampling,
    LanguageModelConfig,
    ModelConfig,
    WanConfig,
    check_heads,
    check_least,
    check_positive,
    check_rotary,
)
from infotok_lit.models.family import Family, OfficialWeights, Part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LM_HEAD, EMBEDDINGS = "showo.lm_head.weight", "showo.model.embed_tokens.weight"
"""Official names of the language model's output head and embedding table."""
PATCH_SIZE = 2
"""Latent pixels per side of a token."""
MAX_CODES = 1 << 24
"""Finite scalar quantisation computes the number of a code in float32, which is exact up to here."""
IMAGE_START, IMAGE_END = "<|vision_start|>", "<|vision_end|>"
PAD = "[PAD]"
ADDED_TOKENS = ("<image>", "<|vid_start|>", "<|vid_end|>")
"""What the official code adds to Qwen2.5's tokenizer after [PAD]; only their rows in the vocabulary matter."""


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

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("table_side", 1), ("mlp_width", 0), ("depth", 0), ("layer_norm_eps", 0)):
            check_least(f"semantic.{name}", getattr(self, name), least)
        check_heads("semantic.heads", self.heads, "semantic.width", self.width)


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

    def __post_init__(self) -> None:
        """SettingsError for codes that the kind cannot have."""
        if self.kind == "fsq" and (not self.levels or min(self.levels) < 3 or self.num_codes > MAX_CODES):
            raise SettingsError(
                f"quantiser.levels is {list(self.levels)}; set it to 3 or more each, and {MAX_CODES} codes at most"
            )
        if self.kind in ("lfq", "vq"):
            check_least("quantiser.codebook_size", self.codebook_size, 2)
        if self.kind == "lfq" and self.codebook_size.bit_count() != 1:
            raise SettingsError(f"quantiser.codebook_size is {self.codebook_size}; set it to a power of 2")
        if self.kind == "vq":
            check_least("quantiser.codebook_width", self.codebook_width, 1)

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

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("mlp_width", 0), ("depth", 0)):
            check_least(f"diffusion_head.{name}", getattr(self, name), least)
        check_heads("diffusion_head.heads", self.heads, "diffusion_head.width", self.width)
        check_heads("diffusion_head.kv_heads", self.kv_heads, "diffusion_head.heads", self.heads)
        check_rotary("diffusion_head.head_dim", self.head_dim)


@dataclass(frozen=True)
class SamplingConfig(FlowSampling):
    """How images are generated unless a call says otherwise."""

    # From one point to itself there is no way: the image would be the noise.
    fewest_iterations: ClassVar[int] = 2

    iterations: int = 50
    """Points of the time grid; the network is called once for each but the last."""
    guidance: float = 5.0

    @property
    def scale(self) -> float:
        """As for all families, but 0 is without guidance."""
        return self.guidance if self.guidance > 0 else 1.0


@dataclass(frozen=True)
class TrainingTimeConfig:
    """Which noise levels training visits."""

    shifted: bool = True
    """Shift the times towards noise, the more the more tokens an image has."""


@dataclass(frozen=True)
class PromptConfig:
    """Which of the official layouts of text and image are used."""

    reading: Literal["chat", "pretraining", "caption"] = "chat"
    """Training to read: the layout of stage 2c with its system prompt, of stage 2a/b, or of stage 1."""
    describing: Literal["official", "training"] = "official"
    """Inference: as the official script, which differs from all training layouts, or as `reading`."""
    system: str = "You are a helpful assistant."
    max_caption: int = 290
    """Longest caption to generate from, in tokens, in training and at inference."""

    def __post_init__(self) -> None:
        check_least("prompts.max_caption", self.max_caption, 1)


@dataclass(frozen=True)
class Showo2Config(ModelConfig):
    """A whole Show-o2."""

    title: ClassVar[str] = "Show-o2"
    dropped: ClassVar[Mapping[str, str]] = {
        "prompts.max_text": "`max_length` limits the whole sequence",
        "quantiser.commitment_weight": "it is a constant",
        "quantiser.entropy_weight": "it is a constant",
        "training_time.understanding_min": "images to understand are clean",
    }

    autoencoder: WanConfig
    semantic: SemanticConfig
    llm: LanguageModelConfig
    diffusion_head: DiffusionHeadConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    training_time: TrainingTimeConfig = field(default_factory=TrainingTimeConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    quantiser: QuantiserConfig = field(default_factory=QuantiserConfig)
    latent_scale: float = 1.0
    """Latents are multiplied by this; Wan latents are already normalised."""
    grad_scale: float | None = None
    """Factor on the gradient that understanding sends into the visual encoder; None leaves it alone."""
    capacity_bits: float | None = None
    """The most bits that the shared tokens of an image may carry in training (`Channel`); None for no limit."""
    image_size: int = 432
    """Side of the square images that the processor makes, in pixels."""
    max_length: int = 2048
    """Longest sequence in tokens, image included: longer questions and captions lose their end."""

    def __post_init__(self) -> None:
        check_positive("latent_scale", self.latent_scale)

    @property
    def token_pixels(self) -> int:
        """Pixels per side of a token."""
        return self.autoencoder.stride * PATCH_SIZE

    @property
    def num_image_tokens(self) -> int:
        """Language-model slots of one image: the time, then the grid."""
        return 1 + super().num_image_tokens


_BASE = Showo2Config(
    autoencoder=WanConfig(),
    semantic=SemanticConfig(width=1152, mlp_width=4304, depth=26, heads=16),
    llm=replace(QWEN25["1.5b"], vocab_size=151669),
    diffusion_head=DiffusionHeadConfig(width=2048, mlp_width=8192, depth=10, heads=32, kv_heads=8, head_dim=64),
)

SIZES: dict[str, Showo2Config] = {
    "scenes32": Showo2Config(
        # A token sees 8x8 pixels through 48 numbers, as in the embedded Harmon.
        autoencoder=WanConfig(kind="dct", block_size=4, kept=2),
        semantic=SemanticConfig(width=128, mlp_width=384, depth=2, heads=4, table_side=4),
        llm=SCENES_LLM,
        diffusion_head=DiffusionHeadConfig(width=128, mlp_width=384, depth=4, heads=4, kv_heads=4, head_dim=32),
        sampling=SamplingConfig(iterations=20, guidance=2.0),
        # The Scenes tokenizer knows no English beyond its grammar, so a system prompt would be long and empty.
        prompts=PromptConfig(describing="training", system=""),
        latent_scale=0.5,
        image_size=32,
    ),
    "1.5b": _BASE,
    "1.5b-hq": replace(_BASE, image_size=512, prompts=replace(_BASE.prompts, max_caption=251)),
    "7b": replace(_BASE, llm=replace(QWEN25["7b"], vocab_size=_BASE.llm.vocab_size)),
}


class Showo2Family(Family):
    """The official sizes, and the embedded one for 32-pixel Scenes."""

    model_class = "Showo2"
    config_class = Showo2Config
    sampling = SamplingConfig
    sizes = SIZES
    tokenizers: ClassVar[Mapping[str, str]] = {
        "scenes32": str(embedded_base("showo2", "scenes32")),
        "1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
        "1.5b-hq": "Qwen/Qwen2.5-1.5B-Instruct",
        "7b": "Qwen/Qwen2.5-7B-Instruct",
    }
    parts: ClassVar[Mapping[str, Part]] = {
        "autoencoder": Part(
            missing="image autoencoder: set `autoencoder` to Wan2.1_VAE.pth (Wan-AI/Wan2.1-T2V-14B)",
            prefix="vae.",
            stem="wan_vae",
        )
    }
    weighted = ("autoencoder", "semantic", "llm", "diffusion_head", "quantiser")
    encoded_branches = BRANCHES

    @property
    def stems(self) -> set[str]:
        """As for all families, with the quantiser, which no official file has."""
        return super().stems | {"quantiser"}

    def load_tokenizer(self, source: str) -> "PreTrainedTokenizerBase":
        """With the tokens of Show-o2 that Qwen2.5's tokenizer lacks, in the official order."""
        tokenizer = super().load_tokenizer(source)
        known = tokenizer.get_vocab()
        vision = [token for token in (IMAGE_START, IMAGE_END, "<|image_pad|>") if token not in known]
        tokenizer.add_tokens(vision, special_tokens=True)
        if PAD not in known:
            tokenizer.add_special_tokens({"pad_token": PAD})
        tokenizer.add_tokens([token for token in ADDED_TOKENS if token not in known])
        return tokenizer

    def differing_parts(self, found: Showo2Config, wanted: Showo2Config) -> list[str]:
        """As for all families, but a quantiser may be added to a model without one, and a posterior be read anyhow."""
        autoencoder = replace(found.autoencoder, posterior=wanted.autoencoder.posterior)
        quantiser = wanted.quantiser if found.quantiser.kind == "none" else found.quantiser
        return super().differing_parts(replace(found, autoencoder=autoencoder, quantiser=quantiser), wanted)

    def read_exported(self, folder: Path) -> tuple[Showo2Config, OfficialWeights]:
        """As for all families, with the quantiser, which no official file has."""
        config, official = super().read_exported(folder)
        if config.quantiser.kind == "none":
            return config, official
        path = first_existing(folder, "quantiser.safetensors", "quantiser.ckpt")
        return config, replace(official, files={**official.files, "quantiser": (read_weights(path), str(path))})

    def read_official(self, weights: Path, parts: Mapping[str, Path], config: Any) -> OfficialWeights:
        """As for all families, with a warning where fine-tuning by the official code has untied the output head."""
        import torch

        official = super().read_official(weights, parts, config)
        state, _ = official.files[self.name]
        head, table = state.get(LM_HEAD), state.get(EMBEDDINGS)
        if config.llm.tie_word_embeddings and head is not None and table is not None and not torch.equal(head, table):
            warnings.warn(
                f"{weights} holds an output head that differs from its embedding table, but this size ties them: the "
                "embedding table is used for both. To keep them apart, set settings.llm.tie_word_embeddings to false",
                stacklevel=2,
            )
        return official


FAMILY = Showo2Family()
