"""What the configurations of all families share: plain numbers, and their way to config.json and back. Light."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from infotok_lit.errors import SettingsError, did_you_mean

Grid = tuple[int, int]
"""(rows, columns)."""
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
"""What the types of entries are called in messages."""


class ModelConfig:
    """A family's configuration, a frozen dataclass of primitives, tuples, and dataclasses of these; each family has
    `sampling`, `llm`, and what is named here."""

    image_size: int
    """Side of the square images that are generated, in pixels."""
    token_pixels: int
    """Pixels per side of what the grid of a generated image counts."""
    max_length: int
    """Longest sequence in tokens, image included: longer questions and captions lose their end."""
    title: ClassVar[str]
    """The family's name in messages."""
    renamed: ClassVar[Mapping[str, str]] = {"drawing": "sampling"}
    """Entries of older versions -> what they are called now."""
    dropped: ClassVar[Mapping[str, str]] = {}
    """Entries of older versions that nothing reads any more, with a dot where they are nested -> what to do."""

    @property
    def num_image_tokens(self) -> int:
        """Language-model slots of one image; here the places of its grid."""
        return math.prod(token_grid(self.image_size, self.image_size, self.token_pixels))

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, for config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of to_dict; reads what older versions wrote, too.

        Raises:
            SettingsError: for an unknown or missing entry, or a value of another type; the message names it.
        """
        values = {cls.renamed.get(name, name): value for name, value in values.items()}
        for dropped in cls.dropped:
            group, _, entry = dropped.rpartition(".")
            inner = values.get(group) if group else values
            if isinstance(inner, Mapping) and entry in inner:
                kept = {name: value for name, value in inner.items() if name != entry}
                values = values | {group: kept} if group else kept
        try:
            return _build(cls, values)
        except TypeError as error:
            raise SettingsError(f"this does not describe a model of {cls.title}: {error}") from error

    def with_settings(self, settings: Mapping[str, Any]) -> Self:
        """The same with the entries of `settings`, nested as in an exported config.json.

        Raises:
            SettingsError: for an entry that there is not, or not any more, or a value of another type, by its name.
        """
        for old in settings.keys() & self.renamed.keys():
            raise SettingsError(f"model.settings: `{old}` is now called `{self.renamed[old]}`")
        for old, mend in self.dropped.items():
            group, _, entry = old.rpartition(".")
            inner = settings.get(group) if group else settings
            if isinstance(inner, Mapping) and entry in inner:
                raise SettingsError(f"model.settings: there is no `{old}` any more: {mend}")
        return self.from_dict(_merged(self.to_dict(), settings))


def check_least(name: str, value: float, least: int) -> None:
    """SettingsError for a number below the least that makes sense."""
    if not value >= least:
        raise SettingsError(f"{name} is {value}; set it to {least} or more")


def check_positive(name: str, value: float) -> None:
    """SettingsError for a number that is not above 0."""
    if not value > 0:
        raise SettingsError(f"{name} is {value}; set it above 0")


def check_heads(name: str, heads: int, shared: str, number: int) -> None:
    """SettingsError unless heads of attention divide what they share out, such as a width."""
    if heads < 1 or number % heads:
        raise SettingsError(f"{name} is {heads}; set it to a divisor of {shared}, {number}")


def check_rotary(name: str, width: int) -> None:
    """SettingsError unless positions can turn the numbers of a head of attention two by two."""
    if width < 2 or width % 2:
        raise SettingsError(f"{name} is {width}; set it to an even number, as positions turn a head's numbers in pairs")


@dataclass(frozen=True)
class LanguageModelConfig:
    """The Qwen2 language model."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 151936
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    """Standard deviation of fresh weights."""

    def __post_init__(self) -> None:
        check_least("llm.num_hidden_layers", self.num_hidden_layers, 1)
        for name in ("intermediate_size", "rms_norm_eps", "initializer_range"):
            check_least(f"llm.{name}", getattr(self, name), 0)
        check_positive("llm.rope_theta", self.rope_theta)
        check_heads("llm.num_attention_heads", self.num_attention_heads, "llm.hidden_size", self.hidden_size)
        check_heads(
            "llm.num_key_value_heads", self.num_key_value_heads, "llm.num_attention_heads", self.num_attention_heads
        )
        check_rotary("llm.hidden_size / llm.num_attention_heads", self.hidden_size // self.num_attention_heads)


QWEN25 = {
    "0.5b": LanguageModelConfig(896, 4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2),
    "1.5b": LanguageModelConfig(1536, 8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2),
    "7b": LanguageModelConfig(
        3584, 18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False
    ),
}
"""Qwen2.5, as the official models take it."""
SCENES_LLM = LanguageModelConfig(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    # The words of Scenes and of garments, and the special tokens of a family.
    vocab_size=512,
    max_position_embeddings=4096,
    # Sequences have some 40 positions. With 1e6, Show-o2's generation alone had a loss of 0.29 after 600 steps, with
    # 100 of 0.22.
    rope_theta=100.0,
    # About 1 / sqrt(width): at 0.02 so narrow a network hardly lets the prompt reach the image at first.
    initializer_range=0.09,
)
"""That of the embedded sizes."""


@dataclass(frozen=True)
class Sampling:
    """What the families' options of generation have in common."""

    fewest_iterations: ClassVar[int] = 1

    iterations: int
    guidance: float

    def __post_init__(self) -> None:
        check_least("iterations", self.iterations, self.fewest_iterations)

    @property
    def scale(self) -> float:
        """The scale of guidance that the official code follows; 1 where it draws from the prompts alone."""
        return self.guidance


@dataclass(frozen=True)
class FlowSampling(Sampling):
    """Those of a model that follows a flow from noise to images."""

    time_shift: float = 3.0
    """Above 1, more of the iterations are near pure noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.time_shift > 0:
            raise SettingsError(f"time_shift is {self.time_shift}; set it above 0 (1 for none)")


@dataclass(frozen=True)
class AutoencoderConfig:
    """How pixels become latents: by a family's official autoencoder, or by a fixed block transform ("dct")."""

    kind: str
    latent_channels: int
    """Channels of the official latent (the block transform has 3 x kept^2)."""
    block_size: int
    """Block transform: pixels per side of a block."""
    kept: int
    """Block transform: how many of the lowest frequencies per axis are kept; block_size keeps everything."""

    def __post_init__(self) -> None:
        check_least("autoencoder.block_size", self.block_size, 1)

    @property
    def num_levels(self) -> int:
        """Resolutions of the official autoencoder, each half of the one before."""
        return len(self.width_multipliers)

    @property
    def stride(self) -> int:
        """Pixels per latent position, per axis."""
        return self.block_size if self.kind == "dct" else 2 ** (self.num_levels - 1)

    @property
    def channels(self) -> int:
        """Channels of the latent."""
        return 3 * self.kept**2 if self.kind == "dct" else self.latent_channels


@dataclass(frozen=True)
class KL16Config(AutoencoderConfig):
    """Harmon's KL autoencoder."""

    kind: Literal["kl16", "dct"] = "kl16"
    latent_channels: int = 16
    block_size: int = 8
    kept: int = 8
    base_width: int = 128
    width_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks_per_level: int = 2
    num_groups: int = 32
    """Groups of every GroupNorm."""
    attention_resolution: int = 16
    """Levels of this nominal resolution have self-attention; the nominal input is 256 pixels."""


@dataclass(frozen=True)
class WanConfig(AutoencoderConfig):
    """Show-o2's Wan2.1 VAE."""

    kind: Literal["wan", "dct"] = "wan"
    latent_channels: int = 16
    block_size: int = 4
    kept: int = 2
    base_width: int = 96
    width_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks_per_level: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    """Which levels would also halve the frames of a video; an image passes by them."""
    posterior: Literal["sample", "mean"] = "sample"
    """Whether a latent is a sample of the Wan posterior, as in the official code, or its mean."""


@dataclass(frozen=True)
class DCAEConfig(AutoencoderConfig):
    """OpenUni's deep-compression autoencoder, that of SANA."""

    kind: Literal["dc_ae", "dct"] = "dc_ae"
    latent_channels: int = 32
    block_size: int = 8
    kept: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    attention_stages: int = 3
    """How many of the last stages attend."""
    attention_head_dim: int = 32

    @property
    def num_levels(self) -> int:
        return len(self.widths)


def token_grid(height: int, width: int, token_pixels: int) -> Grid:
    """The grid of an image size in pixels; SettingsError if a side is not a whole number of tokens."""
    if min(height, width) < 1:
        raise SettingsError(f"image size {height} x {width} has no pixels; set both sides to {token_pixels} or more")
    if height % token_pixels or width % token_pixels:
        raise SettingsError(f"image size {height} x {width} is not a multiple of {token_pixels} pixels, the token size")
    return height // token_pixels, width // token_pixels


def _build(kind: type, values: Mapping[str, Any], group: str = "") -> Any:
    """A dataclass from primitives; TypeError for what it does not have, SettingsError for what does not suit.

    Args:
        group: where its entries lie, for messages.
    """
    hints, built = entry_types(kind), {}
    for name, value in values.items():
        if name not in hints:
            where = f"{group[:-1]} has" if group else "there is"
            raise TypeError(f"{where} no entry {name!r}{did_you_mean(name, hints)}")
        hint = hints[name]
        if is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise TypeError(f"{group}{name} is {value!r}, where entries with values are expected")
            built[name] = _build(hint, value, f"{group}{name}.")
        else:
            built[name] = tuple(value) if isinstance(value, list) else value
            check_type(f"{group}{name}", built[name], hint)
            if type(value) is int and float in (hint, *get_args(hint)) and int not in get_args(hint):
                # Libraries that are handed it tell 1 from 1.0.
                built[name] = float(value)
    return kind(**built)


def entry_types(kind: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def check_type(name: str, value: Any, hint: Any) -> None:
    """SettingsError if a primitive, or a tuple, is not of the type that its entry has; or is a number without end."""
    if not _is_of(value, hint):
        raise SettingsError(f"{name} is {value!r}; set it to {_in_words(hint)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"{name} is {value}; set it to a finite number")


def _is_of(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inner
    if origin in (Union, UnionType):
        return any(_is_of(value, one) for one in inner)
    if origin is tuple:
        each = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is Ellipsis else inner
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_is_of, value, each))
    if isinstance(value, bool):
        return hint in (bool, Any)
    return hint is Any or isinstance(value, (int, float) if hint is float else hint)


def _in_words(hint: Any) -> str:
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, inner))
    if get_origin(hint) is tuple:
        return f"a list of {', '.join('...' if one is Ellipsis else _in_words(one) for one in inner)}"
    return " or ".join(map(_in_words, inner)) if inner else WORDS.get(hint, str(hint))


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, change in changes.items():
        nested = isinstance(change, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], change) if nested else change
    return merged
