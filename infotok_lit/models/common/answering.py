"""Greedy answers to many questions about few images: what comes before the questions is computed once per image.

All questions about an image lie in one sequence after it, hidden from one another; where they begin with the same
words, these are there once. Of an image, positions may be dropped; the others keep theirs.

Shapes: I images, P positions up to the end of the image, M the most questions about one image, S the most positions
that the questions about one take, H width, A new tokens, V vocabulary; B rows of T positions, T' of them not dropped.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from infotok_lit.batch import IMAGE_TOKEN_ID
from infotok_lit.models.common.language_model import places_where, take_rows

if TYPE_CHECKING:
    from infotok_lit.models.reading import ImageReader


def all_ended(ended: Tensor, in_step: bool) -> bool:
    """Whether all answers have ended, (B,) bool; with `in_step` those of all processes, a collective call."""
    done = ended.all()
    if in_step:
        done = done.int()
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
    return bool(done)


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


class Shortened(NamedTuple):
    """Rows that hold some of their positions only: these first and in their order, then padding."""

    source: Tensor
    """(B, T') int64: which position of the whole row each one was."""
    real: Tensor
    """(B, T') bool, False at padding."""

    def seen(self, mask: Tensor) -> Tensor:
        """(B, 1, T', T') bool of a mask (B, 1, T, T): which positions see which of those that are left."""
        rows = take_rows(mask[:, 0], self.source)
        return (take_rows(rows.mT, self.source).mT & self.real[:, None])[:, None]


def shorten(left: Tensor) -> Shortened:
    """Rows of which the positions (B, T) bool are left."""
    order = places_where(left, int(left.sum(1).max()))
    return Shortened(order, left.gather(1, order))


def answer_after_prefix(
    model: "ImageReader",
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
        prefix_left: (I, P) bool: the positions that are read; the others are not computed, and what follows them keeps
            its position. Default: all.
    """
    images, length, processor = *prefix.shape[:2], model.processor
    cache = DynamicCache(config=model.text_body.config)
    read = _read_prefix(model.text_body, prefix, cache, prefix_mask, prefix_left)
    trees, slots = _grow(images, image_of, questions, processor.pad_id, prefix.device)
    most = trees.ends.shape[1]
    inputs, places, rows = model.text_embedding(trees.ids), length + trees.places, trees.ends.clamp(min=0)
    seen = torch.cat([read[:, None].expand(-1, trees.ids.shape[1], -1), trees.sees], dim=2)
    ended = trees.ends.flatten() < 0
    new = trees.ids.new_empty(len(ended), 0)
    for _ in range(max_new_tokens):
        states = model.text_body(
            inputs_embeds=inputs,
            attention_mask=seen[:, None],
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = model.adjust_logits(new, model.language_model.lm_head(take_rows(states, rows).flatten(0, 1)))
        chosen = logits.argmax(dim=-1).masked_fill(ended, processor.pad_id)
        new = torch.cat([new, chosen[:, None]], dim=1)
        ended = ended | (chosen == processor.end_id)
        if all_ended(ended, model.in_step):
            break
        # What follows a position sees what that sees, and itself.
        inputs = model.text_embedding(chosen.view(images, most)).to(prefix.dtype)
        itself = torch.eye(most, dtype=torch.bool, device=prefix.device).expand(images, -1, -1)
        seen = torch.cat([take_rows(seen, rows), itself], dim=2)
        places = places.gather(1, rows) + 1
        rows = torch.arange(most, device=prefix.device).expand(images, -1)
    return new[slots]


def _read_prefix(body: nn.Module, prefix: Tensor, cache: Cache, mask: Tensor | None, left: Tensor | None) -> Tensor:
    """Fill a cache with what comes before questions; returns which of its positions are real, (B, T') bool.

    Args:
        prefix: (B, T, H) embeddings without padding.
        mask: (B, 1, T, T) bool: which positions see which; default: earlier ones.
        left: (B, T) bool: the positions that are read; default: all.
    """
    real, places = torch.ones_like(prefix[..., 0], dtype=torch.bool), None
    if left is not None:
        rows = shorten(left)
        earlier = real.new_ones(left.shape[1], left.shape[1]).tril().expand(len(left), 1, -1, -1)
        mask = rows.seen(earlier if mask is None else mask)
        prefix, real, places = take_rows(prefix, rows.source), rows.real, rows.source
    body(inputs_embeds=prefix, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
    return real


class _Trees(NamedTuple):
    """The questions about each image, of which what begins alike is there once."""

    ids: Tensor
    """(I, S) int64."""
    places: Tensor
    """(I, S) int64: how many positions of its question come before it."""
    sees: Tensor
    """(I, S, S) bool: which positions each one sees: those of its question up to itself; padding none."""
    ends: Tensor
    """(I, M) int64: where each question ends; -1 for none."""


def _grow(
    images: int, image_of: Sequence[int], questions: Sequence[list[int]], pad_id: int, device: torch.device
) -> tuple[_Trees, Tensor]:
    """The trees, and where in (I M) each question is."""
    known: list[dict[tuple[int, int], int]] = [{} for _ in range(images)]
    paths: list[list[list[int]]] = [[] for _ in range(images)]
    slots = []
    for image, question in zip(image_of, questions, strict=True):
        path, last = [], -1
        for token in question:
            last = known[image].setdefault((last, token), len(known[image]))
            path.append(last)
        slots.append((image, len(paths[image])))
        paths[image].append(path)
    most, longest = max(map(len, paths)), max(map(len, known))
    lower = np.tri(longest, dtype=bool)
    ids, places = np.full((images, longest), pad_id), np.zeros((images, longest), np.int64)
    sees, ends = np.zeros((images, longest, longest), bool), np.full((images, most), -1)
    for (image, slot), question in zip(slots, questions, strict=True):
        path = np.array(paths[image][slot])
        ids[image, path] = question
        places[image, path] = np.arange(len(path))
        sees[image, path[:, None], path] = lower[: len(path), : len(path)]
        ends[image, slot] = path[-1]
    trees = _Trees(*(torch.from_numpy(part).to(device) for part in (ids, places, sees, ends)))
    return trees, torch.tensor([image * most + slot for image, slot in slots], device=device)
