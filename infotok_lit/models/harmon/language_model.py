"""The language model of Harmon: transformers' Qwen2, and how text and image share its positions."""

from dataclasses import asdict

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from infotok_lit.models.harmon.config import LanguageModelConfig


def build_projection(width_in: int, width_hidden: int, width_out: int) -> nn.Sequential:
    """The maps between visual tokens and the language model."""
    return nn.Sequential(nn.Linear(width_in, width_hidden), nn.SiLU(), nn.Linear(width_hidden, width_out))


def build_language_model(config: LanguageModelConfig) -> Qwen2ForCausalLM:
    """A Qwen2 with fresh weights."""
    values = asdict(config)
    rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    special_ids = {"bos_token_id": None, "eos_token_id": None}
    return Qwen2ForCausalLM(Qwen2Config(**values, **special_ids, rope_parameters=rope, attn_implementation="sdpa"))


def followed_by_ones(mask: Tensor, count: int) -> Tensor:
    """A mask (B, T) of text, continued by `count` visible tokens: (B, T + count)."""
    return torch.cat([mask, mask.new_ones(mask.shape[0], count)], dim=1)


def compact_positions(mask: Tensor) -> Tensor:
    """Positions that count real tokens only: an image continues right after the last word, not after the padding."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
