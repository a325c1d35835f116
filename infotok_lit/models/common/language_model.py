"""What the families do with a Qwen2 language model, and with stacks of transformer layers in general.

Shapes: B batch, T text length, H width, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
)
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from infotok_lit.batch import IGNORE_INDEX, IMAGE_TOKEN_ID, Processor
from infotok_lit.errors import SettingsError
from infotok_lit.models.common.model_config import LanguageModelConfig


def qwen2_config(config: LanguageModelConfig, attention: str | None = None, **rope: float | str) -> Qwen2Config:
    """transformers' configuration of a Qwen2.

    Args:
        attention: the name of an attention function that transformers knows.
        rope: how rotary positions are stretched; by default not at all.
    """
    values = asdict(config)
    rope = {"rope_type": "default", **rope, "rope_theta": values.pop("rope_theta")}
    special_ids = {"bos_token_id": None, "eos_token_id": None}
    return Qwen2Config(**values, **special_ids, rope_parameters=rope, attn_implementation=attention)


def build_language_model(config: LanguageModelConfig, attention: str = "sdpa") -> Qwen2ForCausalLM:
    """A Qwen2 with fresh weights."""
    return Qwen2ForCausalLM(qwen2_config(config, attention))


def embed_with_images(embedding: nn.Embedding, input_ids: Tensor, visual: Tensor) -> Tensor:
    """Embeddings (B, T, H) of ids (B, T) whose image slots are filled with visual tokens (n, N, H), in order.

    Raises:
        SettingsError: if there are not as many slots as tokens.
    """
    slots = input_ids == IMAGE_TOKEN_ID
    num_slots, num_visual = int(slots.sum()), visual.shape[0] * visual.shape[1]
    if num_slots != num_visual:
        raise SettingsError(
            f"the text has {num_slots} image slots for {num_visual} visual tokens: the image size and the "
            "processor's disagree"
        )
    embeds = embedding(input_ids.masked_fill(slots, 0))
    return embeds.masked_scatter(slots.unsqueeze(-1), visual.to(embeds.dtype))


def text_loss(head: nn.Module, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token cross entropy (nats) summed over labelled tokens, and their number; the head runs on these alone.

    Args:
        head: (..., H) -> (..., V) logits.
        hidden: (B, T, H).
        labels: (B, T) int64; negative where no loss is taken.
    """
    wanted = next_labels(labels)
    labelled = wanted >= 0
    return summed_loss(head(hidden[labelled]), wanted[labelled])


def summed_loss(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy (nats) of logits (M, V) for ids (M,), summed, and M."""
    loss = F.cross_entropy(logits.float(), wanted, reduction="sum")
    return loss, torch.tensor(len(wanted), device=loss.device)


def next_labels(labels: Tensor) -> Tensor:
    """(B, T) int64 -> (B, T): what each position has to predict; nothing follows the last."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], dim=1)


def compact_positions(mask: Tensor) -> Tensor:
    """(B, T) int64: positions that count real tokens only, so that what follows padding goes on after the text."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def followed_by_ones(mask: Tensor, count: int) -> Tensor:
    """A mask (B, T), continued by `count` visible positions: (B, T + count) bool."""
    return torch.cat([mask.bool(), mask.new_ones(mask.shape[0], count, dtype=torch.bool)], dim=1)


@torch.no_grad()
def answer_greedily(
    llm: PreTrainedModel,
    embeds: Tensor,
    mask: Tensor,
    processor: Processor,
    max_new_tokens: int,
    use_cache: bool = True,
    adjust: LogitsProcessor | None = None,
) -> Tensor:
    """Continuation ids (B, at most max_new_tokens) of left-padded embeddings (B, T, H), the likeliest each time."""
    return llm.generate(
        inputs_embeds=embeds,
        attention_mask=mask.long(),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=use_cache,
        logits_processor=LogitsProcessorList([] if adjust is None else [adjust]),
        eos_token_id=processor.end_id,
        pad_token_id=processor.pad_id,
    )


def run_layers(layers: Iterable[nn.Module], x: Tensor, *others: object, recompute: bool) -> Tensor:
    """x through layers, each called with `others` too.

    Args:
        recompute: save memory by computing activations again in the backward pass.
    """
    for layer in layers:
        recomputed = recompute and torch.is_grad_enabled()
        x = checkpoint(layer, x, *others, use_reentrant=False) if recomputed else layer(x, *others)
    return x


class SiglipLayers(SiglipEncoder):
    """SigLIP's bidirectional layers with fresh weights, without positions or a final norm."""

    def __init__(self, width: int, mlp_width: int, depth: int, heads: int, norm_eps: float = 1e-6) -> None:
        super().__init__(
            SiglipVisionConfig(
                hidden_size=width,
                intermediate_size=mlp_width,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                layer_norm_eps=norm_eps,
                attn_implementation="sdpa",
            )
        )
        self.activation_checkpointing = False

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        return run_layers(self.layers, tokens, None, recompute=self.activation_checkpointing)
