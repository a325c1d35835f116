"""The sizes of a Qwen2 language model; light, so that a family's config.py can use it."""

from dataclasses import dataclass


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
