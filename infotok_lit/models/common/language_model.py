"""What the families do with a Qwen2 language model, and with stacks of transformer layers in general.

Shapes: B batch, T text length, H width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from infotok_lit.batch import IGNORE_INDEX
from infotok_lit.errors import SettingsError
from infotok_lit.models.common.model_config import LanguageModelConfig
from infotok_lit.models.common.text import label_places

Model = TypeVar("Model", bound=nn.Module)

CAUSAL = {"full_attention": None}
"""The attention mask of transformers' Qwen2 for causal attention alone, which needs no mask. With None it would look
for texts packed into one row, and so wait for the device."""


def qwen2_config(config: LanguageModelConfig, attention: str | None = None) -> Qwen2Config:
    """transformers' configuration of a Qwen2.

    Args:
        attention: the name of an attention function that transformers knows.
    """
    values = asdict(config)
    rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    special_ids = {"bos_token_id": None, "eos_token_id": None}
    return Qwen2Config(**values, **special_ids, rope_parameters=rope, attn_implementation=attention)


def build_language_model(config: LanguageModelConfig, attention: str = "sdpa") -> Qwen2ForCausalLM:
    """A Qwen2 with fresh weights."""
    return with_fused_norms(Qwen2ForCausalLM(qwen2_config(config, attention)))


class RMSNorm(nn.RMSNorm):
    """The norm of transformers' Qwen models as one operation of torch, which on a card is one kernel instead of six.

    Only where input and weight are of one type, so the narrower is widened; under autocast they often are not.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H) in the wider of the types of x and weight."""
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps)


def with_fused_norms(model: Model) -> Model:
    """The model, whose norms by transformers have become `RMSNorm` around the same weights."""
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, (Qwen2RMSNorm, Qwen3RMSNorm)):
                fused = RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, device=norm.weight.device)
                fused.weight = norm.weight
                setattr(parent, name, fused)
    return model


def required(values: Tensor, holds: Tensor, message: Callable[[], str]) -> Tensor:
    """The values, if a condition (a bool scalar) holds; training does not wait for a device to say so.

    Raises:
        SettingsError: with the message, if it does not. But where training on a device would wait to know, the values
            become NaN instead, which stops it when it next logs, with the names of the samples.
    """
    if not read_at_once(holds):
        return values.masked_fill(~holds, torch.nan)
    if not holds:
        raise SettingsError(message())
    return values


def read_at_once(tensor: Tensor) -> bool:
    """Whether a tensor may be read: it lies on the host, or no training is going on that would wait for it."""
    return tensor.is_cpu or not torch.is_grad_enabled()


def text_loss(head: nn.Module, hidden: Tensor, labels: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Next-token cross entropy (nats) summed over labelled tokens, and their number; the head runs on these alone.

    Args:
        head: (..., H) -> (..., V) logits.
        hidden: (B, T, H).
        labels: (B, T) int64; negative where no loss is taken.
        places: those of `label_places`; found here if not given.
    """
    if places is None:
        places = label_places(labels)
    # The state before a label predicts it.
    logits = head(hidden.flatten(0, 1)[places - 1])
    loss = F.cross_entropy(logits.float(), labels.flatten()[places], reduction="sum")
    return loss, labels.new_full((), len(places))


def text_nats(head: nn.Module, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """As `text_loss` for each text by itself: nats (B,) float32, and the number of labelled tokens (B,)."""
    places = label_places(labels)
    logits = head(hidden.flatten(0, 1)[places - 1])
    nats = F.cross_entropy(logits.float(), labels.flatten()[places], reduction="none")
    rows, none = places // labels.shape[1], nats.new_zeros(len(labels))
    return none.index_add(0, rows, nats), none.long().index_add(0, rows, torch.ones_like(rows))


def next_labels(labels: Tensor) -> Tensor:
    """(B, T) int64 -> (B, T): what each position has to predict; nothing follows the last."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], dim=1)


def compact_positions(mask: Tensor) -> Tensor:
    """(B, T) int64: positions that count real tokens only, so that what follows padding goes on after the text."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def followed_by_ones(mask: Tensor, count: int) -> Tensor:
    """A mask (B, T), continued by `count` visible positions: (B, T + count) bool."""
    return torch.cat([mask.bool(), mask.new_ones(mask.shape[0], count, dtype=torch.bool)], dim=1)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, K) of x (B, N, ...): (B, K, ...)."""
    return torch.take_along_dim(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), dim=1)


def places_where(mask: Tensor, count: int) -> Tensor:
    """`count` places (B, K) of a mask (B, N) in order: those where it is true, then the others."""
    return mask.byte().argsort(dim=1, descending=True, stable=True)[:, :count]


def read_after_text(body: nn.Module, text: Tensor, text_mask: Tensor, visual: Tensor) -> Tensor:
    """Last hidden states (B, N, H) of visual embeddings (B, N, H) that follow padded texts (B, T, H), causally.

    Padding is moved behind the visual positions, where none of them sees it: so attention needs no mask.
    """
    count = visual.shape[1]
    real = followed_by_ones(text_mask, count)
    embeds = take_rows(torch.cat([text, visual.to(text.dtype)], dim=1), places_where(real, real.shape[1]))
    hidden = body(inputs_embeds=embeds, attention_mask=CAUSAL, use_cache=False).last_hidden_state
    places = text_mask.sum(dim=1, keepdim=True) + torch.arange(count, device=hidden.device)
    return take_rows(hidden, places)


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Inside, scaled_dot_product_attention takes its other kernels: cuDNN's are planned anew for every length."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def run_layers(layers: Iterable[nn.Module], x: Tensor, *others: object, recompute: bool) -> Tensor:
    """x through layers, each called with `others` too.

    Args:
        recompute: save memory by computing activations again in the backward pass.
    """
    for layer in layers:
        recomputed = recompute and torch.is_grad_enabled()
        x = checkpoint(layer, x, *others, use_reentrant=False) if recomputed else layer(x, *others)
    return x


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """From now on, run the layers of a model's stacks compiled, but for its autoencoder's; numbers change by rounding.

    Args:
        backend: of torch.compile.
    """
    # A step that logs goes back through layers more than once: compiled ones must not use what they saved as scratch.
    functorch_config.donated_buffer = False
    for name, child in model.named_children():
        for block in () if name == "autoencoder" else _stacked(child):
            block.compile(backend=backend)


def _stacked(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of all stacks in a module; what is inside of a layer is compiled with it."""
    if isinstance(module, nn.ModuleList):
        yield from module
    else:
        for child in module.children():
            yield from _stacked(child)


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
