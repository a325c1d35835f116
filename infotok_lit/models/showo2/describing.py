"""Answering with Show-o2: greedy continuation of prompts with images, with or without a cache.

Shapes: B prompts, T positions of the longest, A new tokens.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from infotok_lit.batch import IMAGE_TOKEN_ID
from infotok_lit.models.showo2.attention import dense_mask
from infotok_lit.models.showo2.sequence import find_regions, insert_images

if TYPE_CHECKING:
    from infotok_lit.models.showo2.model import Showo2


def answer(
    model: "Showo2", input_ids: Tensor, attention_mask: Tensor, latents: Tensor, max_new_tokens: int, use_cache: bool
) -> Tensor:
    """Answer ids (B, at most max_new_tokens) to right-padded prompts (B, T), padded after their end."""
    regions = find_regions(input_ids)
    if model.config.prompts.describing == "official":
        regions = regions + regions.new_tensor([1, 0])
    embeds = embed_prompts(model, input_ids, latents)
    return continue_greedily(model, embeds, attention_mask, regions, max_new_tokens, use_cache)[0]


def embed_prompts(model: "Showo2", input_ids: Tensor, latents: Tensor) -> Tensor:
    """(B, T, D): prompts with clean images."""
    time = model.time_to_token(model.time_embed(latents.new_ones(len(latents))))
    embeds = model.llm.get_input_embeddings()(input_ids.masked_fill(input_ids == IMAGE_TOKEN_ID, 0))
    return insert_images(embeds, find_regions(input_ids), time, model.encoder(latents).tokens)


def continue_greedily(
    model: "Showo2",
    embeds: Tensor,
    attention_mask: Tensor,
    regions: Tensor,
    max_new_tokens: int,
    use_cache: bool,
) -> tuple[Tensor, Tensor]:
    """New ids (B, A) and the logits they were chosen by (B, A, vocabulary).

    Args:
        embeds: (B, T, D), right-padded.
        attention_mask: (B, T) bool.
        regions: (B, M, 2): the positions that see each other. The official inference script counts them from one
            position further right than training does.
        use_cache: without it, everything is computed again for every token, as the official code does.
    """
    batch, prompt_length = attention_mask.shape
    mask, places = _mask_and_places(attention_mask, regions, max_new_tokens)
    cache = DynamicCache(config=model.llm.config) if use_cache else None
    inputs, first = embeds, 0
    ended = torch.zeros(batch, dtype=torch.bool, device=embeds.device)
    last = attention_mask.sum(dim=1) - 1
    ids, all_logits = [], []
    for step in range(max_new_tokens):
        length = prompt_length + step
        states = model.llm.model(
            inputs_embeds=inputs,
            attention_mask=mask[:, :, first:length, :length],
            position_ids=places[:, first:length],
            past_key_values=cache,
            use_cache=use_cache,
        ).last_hidden_state
        # The first new token follows each prompt's own last one; later ones follow the padding.
        row = last if step == 0 else torch.full_like(last, states.shape[1] - 1)
        logits = model.llm.lm_head(states[torch.arange(batch, device=row.device), row])
        chosen = logits.argmax(dim=-1).masked_fill(ended, model.processor.pad_id)
        ids.append(chosen)
        all_logits.append(logits)
        ended = ended | (chosen == model.processor.end_id)
        if bool(ended.all()):
            break
        new = model.llm.get_input_embeddings()(chosen).unsqueeze(1).to(embeds.dtype)
        inputs = new if use_cache else torch.cat([inputs, new], dim=1)
        first = length if use_cache else 0
    return torch.stack(ids, dim=1), torch.stack(all_logits, dim=1)


def _mask_and_places(attention_mask: Tensor, regions: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """The mask (B, 1, T + A, T + A) and positions (B, T + A) of prompts and of all tokens that may follow.

    New tokens lie after the padding, which nobody sees, and count on from their prompt's end.
    """
    batch, length = attention_mask.shape
    real = torch.cat([attention_mask.bool(), attention_mask.new_ones(batch, new, dtype=torch.bool)], dim=1)
    mask = dense_mask(regions, length + new) & real[:, None, None]
    # A padded row sees itself, so that no softmax is over nothing.
    mask |= torch.eye(length + new, dtype=torch.bool, device=mask.device)
    return mask, (real.long().cumsum(dim=1) - 1).clamp(min=0)
