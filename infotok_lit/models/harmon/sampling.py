"""Everything that Harmon draws at random: the numbers of its training, the MAR loop over places, and their tokens.

So that runs can be replayed. Tokens are sampled from their diffusion in the official chain of many steps, or by a
solver in few; diffusers is imported when it is needed. Shapes: B batch, L places, n hidden places per row,
M = noise_draws * B * n hidden tokens, C token channels, E width of a condition vector.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from infotok_lit.models.common.language_model import take_rows
from infotok_lit.models.common.model_config import Grid
from infotok_lit.models.common.sampling import ImageNoise, guide, is_guided
from infotok_lit.models.harmon.diffusion import TRAINING_STEPS, Network, Schedule, make_schedule, step_distribution
from infotok_lit.models.harmon.family import MARConfig, SamplingConfig

if TYPE_CHECKING:
    from diffusers import DPMSolverMultistepScheduler

SOLVER_STEPS_FROM = 961
"""The first timestep of DPM-Solver++ is 960: on later ones the signal is a sixteenth and less, and so is lost in the
network's error."""

Draw = Callable[[int], Tensor]
"""n -> (n, M, C) standard normal: the noise of M tokens, n times, as n calls with 1 would draw it."""

Condition = Callable[[Tensor, Tensor], Tensor]
"""(tokens (B, L, C), visible places (B, K)) -> condition vectors (B, L, E), given the prompts; under guidance
(2 B, L, E), of the prompts and then of the unconditional ones, as both see the same tokens."""

TokenSampler = Callable[[Tensor, Draw, float], Tensor]
"""(z (M, E), under guidance (2 M, E); noise of M tokens; guidance scale) -> tokens (M, C)."""


@dataclass(frozen=True)
class RandomNumbers:
    """The randomness of one text-to-image loss."""

    hidden: Tensor
    """(B, L) bool: the places to predict; every row hides the same number."""
    timesteps: Tensor
    """(M,) int64, over hidden tokens: whole copies of the batch one after another, rows and places in raster order."""
    noise: Tensor
    """(M, C) standard normal, in the same order."""


def random_numbers(batch: int, places: int, channels: int, config: MARConfig, device: torch.device) -> RandomNumbers:
    """One mask ratio for the batch, a random set of that size per row, and independent noise per hidden token."""
    num_hidden = draw_num_hidden(places, config)
    order = torch.rand(batch, places, device=device).argsort(dim=1)
    hidden = order.argsort(dim=1) < num_hidden
    count = config.noise_draws * batch * num_hidden
    timesteps = torch.randint(TRAINING_STEPS, (count,), device=device)
    return RandomNumbers(hidden, timesteps, torch.randn(count, channels, device=device))


def draw_num_hidden(places: int, config: MARConfig, generator: torch.Generator | None = None) -> int:
    """How many places each row of a batch hides; drawn on the host."""
    return math.ceil(places * truncated_normal_ratio(config.mask_ratio_min, config.mask_ratio_std, generator))


def truncated_normal_ratio(minimum: float, std: float, generator: torch.Generator | None = None) -> float:
    """A sample of a normal with mean 1 truncated to [minimum, 1], by inversion of its distribution function."""
    lowest = 0.5 * (1 + math.erf((minimum - 1) / (std * math.sqrt(2))))
    level = lowest + float(torch.rand((), dtype=torch.float64, generator=generator)) * (0.5 - lowest)
    quantile = float(torch.special.ndtri(torch.tensor(level, dtype=torch.float64)))
    return min(1.0, max(minimum, 1 + std * quantile))


@torch.no_grad()
def sample_image_tokens(
    condition: Condition,
    sample: TokenSampler,
    noise: ImageNoise,
    grid: Grid,
    channels: int,
    config: SamplingConfig,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Fill the grid over `config.iterations` rounds, each predicting a growing share of the hidden places.

    Args:
        progress: called with (round, rounds) after each round.

    Returns:
        (B, L, C).
    """
    places = grid[0] * grid[1]
    copies = 2 if is_guided(config.scale) else 1
    # The places that are hidden longest come first; places are counted on the host, so that no mask is read back.
    orders = noise.orders(places)
    tokens = torch.zeros(len(orders), places, channels, device=orders.device)
    num_hidden = places
    for iteration in range(config.iterations):
        scheduled = hidden_after(iteration, config.iterations, places, num_hidden)
        num_hidden_next = 0 if iteration == config.iterations - 1 else scheduled
        count = num_hidden - num_hidden_next
        # With more iterations than places a round may have nothing to predict.
        if count > 0:
            predicted = orders[:, num_hidden_next:num_hidden].sort(dim=1).values
            z = condition(tokens, orders[:, num_hidden:].sort(dim=1).values)
            chosen = take_rows(z, predicted.repeat(copies, 1)).flatten(0, 1)

            def draw(times: int, count: int = count) -> Tensor:
                return noise.normals(times, count, channels).flatten(1, 2)

            sampled = sample(chosen, draw, _guidance_scale(config, places, scheduled))
            index = predicted.unsqueeze(-1).expand(-1, -1, channels)
            tokens = tokens.scatter(1, index, sampled.unflatten(0, predicted.shape))
        num_hidden = num_hidden_next
        if progress is not None:
            progress(iteration + 1, config.iterations)
    return tokens


def hidden_after(iteration: int, iterations: int, places: int, num_hidden: int) -> int:
    """How many places stay hidden after a round: a cosine that predicts at least one and leaves at least one."""
    scheduled = math.floor(places * math.cos(math.pi / 2 * (iteration + 1) / iterations))
    return max(1, min(num_hidden - 1, scheduled))


def _guidance_scale(config: SamplingConfig, places: int, num_hidden: int) -> float:
    if config.guidance_schedule == "constant":
        return config.scale
    return 1 + (config.scale - 1) * (places - num_hidden) / places


@torch.no_grad()
def sample_tokens(
    network: Network,
    draw: Draw,
    schedule: Schedule,
    temperature: float = 1.0,
    guidance: float = 1.0,
    watch: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Ancestral sampling of M tokens, with classifier-free guidance unless `guidance` is 1.

    Args:
        network: the denoiser, with its condition bound; under guidance it is given every token twice, and the second
            half of its conditions is unconditional.
        schedule: the respaced chain.
        temperature: factor on the noise of the steps.
        guidance: scale of classifier-free guidance.
        watch: called with x after every step.

    Returns:
        (M, C) float32.
    """
    x, *step_noise = draw(1 + len(schedule))
    for (timestep, coefficients), noise in zip(schedule.descend(x.device), step_noise, strict=True):
        output = network(torch.cat([x, x]) if is_guided(guidance) else x, timestep).float()
        predicted_noise, interpolation = output.chunk(2, dim=-1)
        guided = guide(predicted_noise, guidance)
        x, log_variance = step_distribution(x, guided, interpolation[: len(x)], coefficients)
        if noise is not step_noise[-1]:
            x = x + torch.exp(0.5 * log_variance) * noise * temperature
        if watch is not None:
            watch(x)
    return x


@torch.no_grad()
def solve_tokens(network: Network, draw: Draw, steps: int, guidance: float = 1.0) -> Tensor:
    """As `sample_tokens`, in few steps of DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), multistep of second order.

    Nothing is random but the first noise, and the learned variance is not used. Steps are even in the log of signal
    over noise.
    """
    (x,) = draw(1)
    solver = _solver(steps, x.device)
    for timestep in solver.timesteps:
        output = network(torch.cat([x, x]) if is_guided(guidance) else x, timestep.expand(1))
        predicted_noise = guide(output.float().chunk(2, dim=-1)[0], guidance)
        x = solver.step(predicted_noise, timestep, x, return_dict=False)[0]
    return x


def _solver(steps: int, device: torch.device) -> "DPMSolverMultistepScheduler":
    from diffusers import DPMSolverMultistepScheduler

    betas = make_schedule().betas[:SOLVER_STEPS_FROM].float().numpy()
    solver = DPMSolverMultistepScheduler(len(betas), trained_betas=betas, use_lu_lambdas=True)
    solver.set_timesteps(steps, device=device)
    # Otherwise the first step would look for its own index on the device.
    solver.set_begin_index(0)
    return solver
