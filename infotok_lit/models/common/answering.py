"""Greedy answers to many questions about few images: what comes before the question is computed once per image.

Shapes: I images, P positions up to the end of the image, B questions, S positions of the longest question, H width,
A new tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from infotok_lit.batch import IMAGE_TOKEN_ID, Processor
from infotok_lit.models.common.language_model import compact_positions, followed_by_ones
from infotok_lit.models.common.processor import pad


class LanguageParts(NamedTuple):
    """A causal language model, in the parts that decoding needs."""

    body: nn.Module
    """transformers' decoder: embeddings -> last hidden states."""
    head: nn.Module
    """(..., H) -> (..., V) logits."""
    embedding: nn.Embedding
    processor: Processor
    """Which ids end an answer and pad it."""
    adjust: Callable[[Tensor, Tensor], Tensor] | None = None
    """(new ids (B, a), logits (B, V)) -> logits to choose by."""


class SharedPrompts(NamedTuple):
    """Prompts that are equal up to the end of their image."""

    prefix: Tensor
    """(P,) int64 ids."""
    questions: list[list[int]]
    """The rest of each."""


def split_after_image(ids: Tensor, mask: Tensor, extra: int = 0) -> SharedPrompts | None:
    """Padded prompts (B, T) with one image each, cut `extra` positions after it; None if they differ before that."""
    rows = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
    length = len(rows[0]) - rows[0][::-1].index(IMAGE_TOKEN_ID) + extra
    if any(row[:length] != rows[0][:length] or len(row) <= length for row in rows):
        return None
    return SharedPrompts(ids.new_tensor(rows[0][:length]), [row[length:] for row in rows])


def answer_after_prefix(
    language: LanguageParts,
    prefix: Tensor,
    image_of: Sequence[int],
    questions: Sequence[list[int]],
    max_new_tokens: int,
    prefix_mask: Tensor | None = None,
) -> Tensor:
    """Answer ids (B, at most max_new_tokens).

    Args:
        prefix: (I, P, H) embeddings of what comes before the questions.
        image_of: for each question, which prefix it follows.
        questions: ids of the rest of each prompt.
        prefix_mask: (I, 1, P, P) bool: which positions of a prefix see which; default: earlier ones.
    """
    device, length = prefix.device, prefix.shape[1]
    ids, real = (part.to(device) for part in pad(questions, language.processor.pad_id))
    cache = DynamicCache(config=language.body.config)
    language.body(inputs_embeds=prefix, attention_mask=prefix_mask, past_key_values=cache, use_cache=True)
    cache.batch_select_indices(torch.tensor(image_of, device=device))
    real = followed_by_ones(torch.cat([real.new_ones(len(ids), length), real], dim=1), max_new_tokens)
    mask = real[:, None, None] & real.new_ones(real.shape[1], real.shape[1]).tril()
    # A padded row sees itself, so that no softmax is over nothing.
    mask |= torch.eye(real.shape[1], dtype=torch.bool, device=device)
    places = compact_positions(real)
    last = torch.tensor([len(question) - 1 for question in questions], device=device)
    inputs, first, end = language.embedding(ids), length, length + ids.shape[1]
    new: list[Tensor] = []
    ended = torch.zeros(len(ids), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        states = language.body(
            inputs_embeds=inputs,
            attention_mask=mask[:, :, first:end, :end],
            position_ids=places[:, first:end],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        # The first new token follows each question's own last one; later ones follow the padding.
        row = last if step == 0 else torch.zeros_like(last)
        logits = language.head(states[torch.arange(len(row), device=device), row])
        if language.adjust is not None:
            logits = language.adjust(torch.stack(new, dim=1) if new else ids[:, :0], logits)
        new.append(logits.argmax(dim=-1).masked_fill(ended, language.processor.pad_id))
        ended = ended | (new[-1] == language.processor.end_id)
        if bool(ended.all()):
            break
        inputs, first, end = language.embedding(new[-1]).unsqueeze(1).to(prefix.dtype), end, end + 1
    return torch.stack(new, dim=1)
