"""Reading an image with fewer tokens: some are dropped before the language model, and the others keep their positions.

Shapes: B sequences, T positions, T' positions of the longest sequence when tokens are dropped, N tokens of an image,
H width of the language model, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache

from infotok_lit.batch import IGNORE_INDEX, IMAGE_TOKEN_ID, UnderstandingBatch
from infotok_lit.models.common.language_model import CAUSAL, next_labels


class Shortened(NamedTuple):
    """Rows that hold some of their positions only: these first and in their order, then padding."""

    source: Tensor
    """(B, T') int64: which position of the whole row each one was."""
    real: Tensor
    """(B, T') bool, False at padding."""

    def take(self, rows: Tensor) -> Tensor:
        """(B, T, ...) -> (B, T', ...)."""
        index = self.source.reshape(*self.source.shape, *[1] * (rows.ndim - 2)).expand(-1, -1, *rows.shape[2:])
        return rows.gather(1, index)


def shorten(left: Tensor) -> Shortened:
    """Rows of which the positions (B, T) bool are left."""
    order = left.long().argsort(dim=1, descending=True, stable=True)[:, : int(left.sum(1).max())]
    return Shortened(order, left.gather(1, order))


def left_of(input_ids: Tensor, real: Tensor, kept: Tensor) -> Tensor:
    """(B, T) bool: what is left of ids that are `real` (B, T) where only those image slots are `kept` (B, N)."""
    slots = input_ids == IMAGE_TOKEN_ID
    return real.bool() & ~slots.masked_scatter(slots, ~kept)


def answer_logits(
    body: nn.Module, head: nn.Module, batch: UnderstandingBatch, embeds: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Logits (M, V) of a batch's label tokens, and what these are, (M,) int64; the head runs on these alone.

    Args:
        body: embeddings -> last hidden states.
        embeds: (B, T, H), those of the batch with its images in their slots.
        kept: (B, N) bool: the slots of each image that are read; None for all.
    """
    wanted, places = next_labels(batch.labels), None
    if kept is not None:
        rows = shorten(left_of(batch.input_ids, batch.attention_mask, kept))
        embeds, places = rows.take(embeds), rows.source
        wanted = rows.take(wanted).masked_fill(~rows.real, IGNORE_INDEX)
    # Padding is on the right, so that causal attention alone hides it from every answer.
    hidden = body(inputs_embeds=embeds, attention_mask=CAUSAL, position_ids=places, use_cache=False).last_hidden_state
    labelled = wanted >= 0
    return head(hidden[labelled]), wanted[labelled]


def read_prefix(
    body: nn.Module, prefix: Tensor, cache: Cache, mask: Tensor | None = None, left: Tensor | None = None
) -> Shortened:
    """Fill a cache with what comes before questions; returns which positions are in it.

    Args:
        prefix: (B, T, H) embeddings without padding.
        mask: (B, 1, T, T) bool: which positions see which; default: earlier ones.
        left: (B, T) bool, under the default mask: the positions that are read; default: all.
    """
    rows = shorten(torch.ones_like(prefix[..., 0], dtype=torch.bool) if left is None else left)
    places = None
    if left is not None:
        prefix, places = rows.take(prefix), rows.source
        earlier = places.new_ones(places.shape[1], places.shape[1], dtype=torch.bool).tril()
        mask = (earlier & rows.real[:, None])[:, None]
    body(inputs_embeds=prefix, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
    return rows
