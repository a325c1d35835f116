"""Greedy answers to many questions about few images: what comes before the questions is computed once per image.

All questions about an image lie in one sequence after it, each hidden from the others. Shapes: I images, P positions
up to the end of the image, M the most questions about one image, S positions of the longest, H width, A new tokens,
V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from infotok_lit.batch import IMAGE_TOKEN_ID, Processor
from infotok_lit.models.common.fewer_tokens import Shortened, read_prefix

SHARED = -1
"""The segment of what all questions see."""


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

    def logits(self, states: Tensor, new: Sequence[Tensor]) -> Tensor:
        """Last states (B, H), and the ids that were chosen so far, (B,) each -> the logits to choose by (B, V)."""
        logits = self.head(states)
        if self.adjust is None:
            return logits
        nothing = torch.empty(len(states), 0, dtype=torch.int64, device=states.device)
        return self.adjust(torch.stack(list(new), dim=1) if new else nothing, logits)


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
    prefix_left: Tensor | None = None,
) -> Tensor:
    """Answer ids (B, at most max_new_tokens) of B questions.

    Args:
        prefix: (I, P, H) embeddings of what comes before the questions.
        image_of: for each question, which prefix it follows.
        questions: ids of the rest of each prompt.
        prefix_mask: (I, 1, P, P) bool: which positions of a prefix see which; default: earlier ones.
        prefix_left: (I, P) bool, under the default mask: the positions that are read; the others are not computed, and
            what follows them keeps its position. Default: all.
    """
    images, length, processor = *prefix.shape[:2], language.processor
    cache = DynamicCache(config=language.body.config)
    prefix_read = read_prefix(language.body, prefix, cache, prefix_mask, prefix_left)
    ids, real, slots = _laid_out(images, image_of, questions, processor.pad_id, prefix.device)
    most, longest = ids.shape[1:]
    lengths = real.sum(2)
    sequence = _Sequence.after(prefix_read)
    sequence.add(
        torch.arange(most, device=prefix.device).repeat_interleave(longest).expand(images, -1),
        length + torch.arange(longest, device=prefix.device).repeat(most).expand(images, -1),
        real.flatten(1),
    )
    inputs = language.embedding(ids.flatten(1))
    # Each question's last position; a slot without a question reads any.
    rows = (torch.arange(most, device=prefix.device) * longest + lengths - 1).clamp(min=0)
    new: list[Tensor] = []
    ended = lengths.flatten() == 0
    for step in range(max_new_tokens):
        states = language.body(
            inputs_embeds=inputs,
            attention_mask=sequence.mask(inputs.shape[1]),
            position_ids=sequence.places[:, -inputs.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        last = states.gather(1, rows[..., None].expand(-1, -1, states.shape[2])).flatten(0, 1)
        new.append(language.logits(last, new).argmax(dim=-1).masked_fill(ended, processor.pad_id))
        ended = ended | (new[-1] == processor.end_id)
        if bool(ended.all()):
            break
        inputs = language.embedding(new[-1].view(images, most)).to(prefix.dtype)
        rows = torch.arange(most, device=prefix.device).expand(images, -1)
        sequence.add(rows, length + lengths + step, torch.ones_like(rows, dtype=torch.bool))
    return torch.stack(new, dim=1)[slots]


@dataclass
class _Sequence:
    """What lies where in each image's sequence; all (I, positions so far)."""

    segments: Tensor
    """Which question a position belongs to; SHARED for the prefix."""
    places: Tensor
    """How many positions of its own prompt come before it."""
    real: Tensor
    """False at padding."""

    @classmethod
    def after(cls, prefix: Shortened) -> "_Sequence":
        """Of prefixes alone."""
        return cls(torch.full_like(prefix.source, SHARED), prefix.source, prefix.real)

    def add(self, segments: Tensor, places: Tensor, real: Tensor) -> None:
        """Append positions."""
        added = zip((self.segments, self.places, self.real), (segments, places, real), strict=True)
        self.segments, self.places, self.real = (torch.cat(pair, dim=1) for pair in added)

    def mask(self, count: int) -> Tensor:
        """(I, 1, count, positions) bool: what each of the last `count` positions sees: the prefix, and what comes no
        later in its own question."""
        own = self.segments[:, -count:, None] == self.segments[:, None]
        earlier = self.places[:, None] <= self.places[:, -count:, None]
        return (((self.segments == SHARED)[:, None] | own) & earlier & self.real[:, None])[:, None]


def _laid_out(
    images: int, image_of: Sequence[int], questions: Sequence[list[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (I, M, S) and what of them is real, image by image; and where in (I M) each question is."""
    counts = [0] * images
    slots = []
    for image in image_of:
        slots.append((image, counts[image]))
        counts[image] += 1
    most, longest = max(counts), max(map(len, questions))
    ids = torch.full((images, most, longest), pad_id)
    real = torch.zeros(images, most, longest, dtype=torch.bool)
    for (image, slot), question in zip(slots, questions, strict=True):
        ids[image, slot, : len(question)] = torch.tensor(question)
        real[image, slot, : len(question)] = True
    flat = torch.tensor([image * most + slot for image, slot in slots], device=device)
    return ids.to(device), real.to(device), flat
