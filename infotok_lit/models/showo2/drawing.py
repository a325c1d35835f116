"""Drawing with Show-o2: an Euler walk along the velocity, with classifier-free guidance.

Text attends causally, so nothing of a prompt depends on the image that follows: its keys and values, in the language
model and in the diffusion head, are the same at every iteration. Shapes: B prompts (unconditional ones included), b
images, P positions of the longest prompt, N positions of an image, C latent channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from infotok_lit.batch import IMAGE_TOKEN_ID
from infotok_lit.models.showo2.attention import dense_mask
from infotok_lit.models.showo2.config import DrawingConfig
from infotok_lit.models.showo2.flow import from_runs, sampling_times
from infotok_lit.models.showo2.sequence import find_regions

if TYPE_CHECKING:
    from infotok_lit.models.showo2.model import Showo2

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(latents (b, C, h, w), time (b,)) -> velocities (B, C, h, w) under each prompt."""


def draw_latents(
    model: "Showo2",
    input_ids: Tensor,
    start: Tensor,
    drawing: DrawingConfig,
    use_cache: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Noise (b, C, h, w) -> latents; under guidance the second half of the prompts (B, T) is unconditional."""
    velocity = cached_velocity(model, input_ids) if use_cache else full_velocity(model, input_ids)
    return walk(velocity, start, drawing, progress)[-1]


def walk(
    velocity: Velocity, start: Tensor, drawing: DrawingConfig, progress: Callable[[int, int], None] | None = None
) -> list[Tensor]:
    """The latents at every point of the time grid, the noise included: one call less than there are points."""
    times = sampling_times(drawing.iterations, drawing.time_shift).to(start.device)
    path = [start]
    for i in range(len(times) - 1):
        step = guided(velocity(path[-1], times[i].expand(len(start))), drawing.guidance)
        path.append(path[-1] + (times[i + 1] - times[i]) * step)
        if progress is not None:
            progress(i + 1, len(times) - 1)
    return path


def guided(velocities: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: conditional velocities followed by unconditional ones -> one each.

    At a guidance of 1 all velocities are conditional.
    """
    if guidance == 1.0:
        return velocities
    conditional, unconditional = velocities.float().chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def full_velocity(model: "Showo2", input_ids: Tensor) -> Velocity:
    """Runs the whole sequences (B, T) every time."""
    regions = find_regions(input_ids)

    def velocity(latents: Tensor, time: Tensor) -> Tensor:
        copies = len(input_ids) // len(latents)
        repeated = latents.repeat(copies, 1, 1, 1)
        hidden = model.read_sequence(input_ids, repeated, time.repeat(copies), regions=regions)
        runs = model.velocities(hidden)[model.token_positions(hidden)]
        return from_runs(runs.unflatten(0, (len(input_ids), -1)), *latents.shape[1:])

    return velocity


def cached_velocity(model: "Showo2", input_ids: Tensor) -> Velocity:
    """Runs the prompts (B, T) once, and then only the images' own positions."""
    prompts = read_prompts(model, input_ids)

    def velocity(latents: Tensor, time: Tensor) -> Tensor:
        copies = len(input_ids) // len(latents)
        embedded_time = model.time_embed(time).repeat(copies, 1)
        # All copies of an image hold the same latents, so the encoder sees each once.
        tokens = model.encoder(latents).tokens.repeat(copies, 1, 1)
        embeds = torch.cat([model.time_to_token(embedded_time).unsqueeze(1), tokens], dim=1)
        count = embeds.shape[1]
        places = prompts.lengths.unsqueeze(1) + torch.arange(count, device=embeds.device)
        mask = torch.cat([prompts.visible, prompts.visible.new_ones(len(input_ids), count)], dim=1)
        mask = mask[:, None, None].expand(-1, 1, count, -1)
        states = model.llm.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=places,
            past_key_values=prompts.llm,
            use_cache=True,
        ).last_hidden_state
        image = torch.arange(len(input_ids), device=embeds.device).unsqueeze(1).expand(-1, count)
        x = model.to_diffusion(states)
        runs = model.diffusion_head(x, embedded_time, image, mask, places, prompts.head)[:, 1:]
        prompts.llm.crop(-count)
        prompts.head.crop(-count)
        return from_runs(runs, *latents.shape[1:])

    return velocity


@dataclass(frozen=True)
class ReadPrompts:
    """Keys and values of prompts up to where their image starts."""

    llm: DynamicCache
    head: DynamicCache
    lengths: Tensor
    """(B,) int64."""
    visible: Tensor
    """(B, P) bool, False past a prompt's end."""


def read_prompts(model: "Showo2", input_ids: Tensor) -> ReadPrompts:
    """Run the prompts (B, T), each holding one image, up to their image."""
    lengths = (input_ids == IMAGE_TOKEN_ID).long().argmax(dim=1)
    longest = int(lengths.max())
    ids = input_ids[:, :longest]
    ids = ids.masked_fill(ids == IMAGE_TOKEN_ID, 0)
    llm, head = DynamicCache(config=model.llm.config), DynamicCache()
    # Causal alone: what lies past a prompt's end is computed and never looked at.
    mask = dense_mask(lengths.new_zeros(len(ids), 1, 2), longest)
    states = model.llm.model(input_ids=ids, attention_mask=mask, past_key_values=llm, use_cache=True).last_hidden_state
    places = torch.arange(longest, device=ids.device).unsqueeze(0)
    nothing = model.time_embed(lengths.new_zeros(1))
    model.diffusion_head(model.to_diffusion(states), nothing, torch.full_like(ids, -1), mask, places, head)
    return ReadPrompts(llm, head, lengths, places < lengths.unsqueeze(1))
