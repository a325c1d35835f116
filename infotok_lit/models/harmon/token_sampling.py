"""How tokens are sampled from their diffusion: in the official chain of many steps, or by a solver in few.

diffusers is imported when it is needed. Shapes: M tokens, C channels.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from infotok_lit.models.common.sampling import guide, is_guided
from infotok_lit.models.harmon.diffusion import Network, Schedule, make_schedule, step_distribution

if TYPE_CHECKING:
    from diffusers import DPMSolverMultistepScheduler

SOLVER_STEPS_FROM = 961
"""The first timestep of DPM-Solver++ is 960: on later ones the signal is a sixteenth and less, and so is lost in the
network's error."""

Draw = Callable[[int], Tensor]
"""n -> (n, M, C) standard normal: the noise of M tokens, n times, as n calls with 1 would draw it."""


@torch.no_grad()
def sample_tokens(
    network: Network,
    draw: Draw,
    schedule: Schedule,
    temperature: float = 1.0,
    guidance: float = 1.0,
    watch: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Ancestral sampling of M tokens, with classifier-free guidance if `guidance` is above 1.

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
