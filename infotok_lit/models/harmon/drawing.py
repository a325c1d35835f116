"""Drawing with Harmon: the MAR loop around the language model and the token diffusion network."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from infotok_lit.models.common.token_grid import Grid
from infotok_lit.models.harmon.config import DrawingConfig
from infotok_lit.models.harmon.mar import places_where

Condition = Callable[[Tensor, Tensor], Tensor]
"""(tokens (B, L, C), visible places (B, K)) -> condition vectors (B, L, E), given the prompts."""

TokenSampler = Callable[[Tensor, Tensor, Callable[[int], Tensor], float], Tensor]
"""(z (M, E), initial noise (M, C), step -> noise (M, C), guidance scale) -> tokens (M, C)."""


class Noise(Protocol):
    """Where the sampler gets its random numbers."""

    def orders(self, places: int) -> Tensor: ...

    def token_normal(self, per_image: int, channels: int) -> Tensor: ...


@torch.no_grad()
def draw_tokens(
    condition: Condition,
    sample: TokenSampler,
    noise: Noise,
    grid: Grid,
    channels: int,
    config: DrawingConfig,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Fill the grid over `config.iterations` rounds, each predicting a growing share of the hidden places.

    Under guidance (`config.guidance` != 1) the conditions are those of the prompts followed by those of the
    unconditional prompt, and both halves always hold the same tokens.

    Args:
        progress: called with (round, rounds) after each round.

    Returns:
        (B, L, C), the prompts' images only.
    """
    places = grid[0] * grid[1]
    guided = config.guidance != 1.0
    orders = noise.orders(places)
    rank = orders.argsort(dim=1)
    tokens = torch.zeros(len(orders), places, channels, device=orders.device)
    num_hidden = places
    for iteration in range(config.iterations):
        scheduled = hidden_after(iteration, config.iterations, places, num_hidden)
        num_hidden_next = 0 if iteration == config.iterations - 1 else scheduled
        predicted = (rank < num_hidden) & (rank >= num_hidden_next)
        count = num_hidden - num_hidden_next
        # With more iterations than places a round may have nothing to predict.
        if count > 0:
            hidden = rank < num_hidden
            z = condition(_doubled(tokens, guided), _doubled(places_where(~hidden), guided))
            chosen = z[_doubled(predicted, guided)]
            scale = _guidance_scale(config, places, scheduled)

            def draw_noise(step: int | None = None, count: int = count) -> Tensor:
                return _doubled(noise.token_normal(count, channels), guided)

            drawn = sample(chosen, draw_noise(), draw_noise, scale)
            tokens[predicted] = drawn[: len(drawn) // 2] if guided else drawn
        num_hidden = num_hidden_next
        if progress is not None:
            progress(iteration + 1, config.iterations)
    return tokens


def hidden_after(iteration: int, iterations: int, places: int, num_hidden: int) -> int:
    """How many places stay hidden after a round: a cosine that predicts at least one and leaves at least one."""
    scheduled = math.floor(places * math.cos(math.pi / 2 * (iteration + 1) / iterations))
    return max(1, min(num_hidden - 1, scheduled))


def _guidance_scale(config: DrawingConfig, places: int, num_hidden: int) -> float:
    if config.guidance_schedule == "constant":
        return config.guidance
    return 1 + (config.guidance - 1) * (places - num_hidden) / places


def _doubled(x: Tensor, guided: bool) -> Tensor:
    return torch.cat([x, x]) if guided else x
