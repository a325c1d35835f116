"""Inference with Show-o2: greedy answers, and images by an Euler walk along the velocity, with and without caches.

Text attends causally, so nothing of a prompt depends on the image that is generated after it: its keys and values, in
the language model and in the diffusion head, are the same at every iteration. Shapes: B prompts (unconditional ones
included), b images, T positions of the longest prompt, P positions before its image, N positions of an image, A new
tokens, C latent channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache

from infotok_lit.batch import IMAGE_TOKEN_ID
from infotok_lit.models.common.answering import all_ended
from infotok_lit.models.common.language_model import compact_positions, followed_by_ones
from infotok_lit.models.common.sampling import guide
from infotok_lit.models.showo2.diffusion import from_runs, sampling_times
from infotok_lit.models.showo2.family import SamplingConfig
from infotok_lit.models.showo2.network import Showo2Network
from infotok_lit.models.showo2.sequence import dense_mask, find_regions

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(latents (b, C, h, w), time (b,)) -> velocities (B, C, h, w) under each prompt."""


def continue_greedily(
    model: Showo2Network,
    embeds: Tensor,
    attention_mask: Tensor,
    regions: Tensor,
    max_new_tokens: int,
    use_cache: bool,
) -> Tensor:
    """New ids (B, A).

    Args:
        embeds: (B, T, D), left-padded.
        attention_mask: (B, T) bool.
        regions: (B, M, 2): the positions that see each other. The official inference script counts them from one
            position further right than training does.
        use_cache: without it, everything is computed again for every token, as the official code does.
    """
    prompt_length = attention_mask.shape[1]
    mask, places = _mask_and_positions(attention_mask, regions, max_new_tokens)
    cache = DynamicCache(config=model.llm.config) if use_cache else None
    inputs, first = embeds, 0
    ended = torch.zeros(len(embeds), dtype=torch.bool, device=embeds.device)
    ids = []
    for length in range(prompt_length, prompt_length + max_new_tokens):
        states = model.llm.model(
            inputs_embeds=inputs,
            attention_mask=mask[:, :, first:length, :length],
            position_ids=places[:, first:length],
            past_key_values=cache,
            use_cache=use_cache,
        ).last_hidden_state
        chosen = model.llm.lm_head(states[:, -1]).argmax(dim=-1).masked_fill(ended, model.processor.pad_id)
        ids.append(chosen)
        ended = ended | (chosen == model.processor.end_id)
        if all_ended(ended, model.in_step):
            break
        new = model.text_embedding(chosen).unsqueeze(1).to(embeds.dtype)
        inputs = new if use_cache else torch.cat([inputs, new], dim=1)
        first = length if use_cache else 0
    return torch.stack(ids, dim=1)


def _mask_and_positions(attention_mask: Tensor, regions: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """The mask (B, 1, T + A, T + A) and positions (B, T + A) of prompts and of all tokens that may follow."""
    length = attention_mask.shape[1]
    real = followed_by_ones(attention_mask, new)
    mask = dense_mask(regions, length + new) & real[:, None, None]
    # A padded row sees itself, so that no softmax is over nothing.
    mask |= torch.eye(length + new, dtype=torch.bool, device=mask.device)
    return mask, compact_positions(real)


def walk(
    velocity: Velocity, start: Tensor, sampling: SamplingConfig, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Where noise (b, C, h, w) leads: one step less than there are points of the time grid."""
    times, latents = sampling_times(sampling.iterations, sampling.time_shift).to(start.device), start
    for i in range(len(times) - 1):
        step = guide(velocity(latents, times[i].expand(len(start))), sampling.scale)
        latents = latents + (times[i + 1] - times[i]) * step
        if progress is not None:
            progress(i + 1, len(times) - 1)
    return latents


def full_velocity(model: Showo2Network, input_ids: Tensor) -> Velocity:
    """Runs the whole sequences (B, T) every time."""
    regions = find_regions(input_ids)

    def velocity(latents: Tensor, time: Tensor) -> Tensor:
        copies = len(input_ids) // len(latents)
        repeated = latents.repeat(copies, 1, 1, 1)
        hidden = model.run_sequence(input_ids, repeated, time.repeat(copies), regions=regions)
        return from_runs(model.image_velocities(hidden), *latents.shape[1:])

    return velocity


def cached_velocity(model: Showo2Network, input_ids: Tensor) -> Velocity:
    """Runs the prompts (B, T) once, and then only the images' own positions."""
    llm, head, lengths = cache_prompts(model, input_ids)
    visible = torch.arange(llm.get_seq_length(), device=lengths.device) < lengths.unsqueeze(1)
    padded = not bool(visible.all())

    def velocity(latents: Tensor, time: Tensor) -> Tensor:
        copies = len(input_ids) // len(latents)
        embedded_time = model.time_embed(time).repeat(copies, 1)
        # All copies of an image hold the same latents, so the encoder sees each once.
        tokens = model.encoder(latents).tokens.repeat(copies, 1, 1)
        embeds = torch.cat([model.time_to_token(embedded_time).unsqueeze(1), tokens], dim=1)
        count = embeds.shape[1]
        places = lengths.unsqueeze(1) + torch.arange(count, device=embeds.device)
        # Every position of an image sees the whole prompt and the whole image: one row, seen as if it were `count`.
        mask = followed_by_ones(visible, count)[:, None, None].expand(-1, 1, count, -1) if padded else None
        states = model.llm.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=places,
            past_key_values=llm,
            use_cache=True,
        ).last_hidden_state
        image = torch.arange(len(input_ids), device=embeds.device).unsqueeze(1).expand(-1, count)
        x = model.to_diffusion(states)
        runs = model.diffusion_head(x, embedded_time, image, mask, places, head)[:, 1:]
        llm.crop(-count)
        head.crop(-count)
        return from_runs(runs, *latents.shape[1:])

    return velocity


def cache_prompts(model: Showo2Network, input_ids: Tensor) -> tuple[DynamicCache, DynamicCache, Tensor]:
    """Keys and values, in the language model and in the head, of prompts (B, T) up to their image; its places (B,)."""
    lengths = (input_ids == IMAGE_TOKEN_ID).long().argmax(dim=1)
    longest = int(lengths.max())
    ids = input_ids[:, :longest]
    llm, head = DynamicCache(config=model.llm.config), DynamicCache()
    # Causal alone: what lies past a prompt's end is computed and never looked at.
    embeds = model.embed_text(ids)
    states = model.llm.model(inputs_embeds=embeds, past_key_values=llm, use_cache=True).last_hidden_state
    places = torch.arange(longest, device=ids.device).unsqueeze(0)
    nothing = model.time_embed(lengths.new_zeros(1))
    model.diffusion_head(model.to_diffusion(states), nothing, torch.full_like(ids, -1), None, places, head)
    return llm, head, lengths
