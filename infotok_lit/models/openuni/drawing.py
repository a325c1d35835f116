"""Drawing with SANA: DPM-Solver++ on the flow, with classifier-free guidance (the settings of the official scripts)."""

from collections.abc import Callable

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from infotok_lit.models.openuni.config import DrawingConfig

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(latents (b, C, h, w), timestep) -> velocities (B, C, h, w) under each condition."""


def build_scheduler(drawing: DrawingConfig) -> DPMSolverMultistepScheduler:
    """The sampler with its timesteps set."""
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=drawing.time_shift
    )
    scheduler.set_timesteps(drawing.iterations)
    return scheduler


def walk(
    velocity: Velocity, start: Tensor, drawing: DrawingConfig, progress: Callable[[int, int], None] | None = None
) -> list[Tensor]:
    """The latents after every iteration, noise first.

    Under guidance the conditional velocities come first and the unconditional ones second.
    """
    scheduler = build_scheduler(drawing)
    path = [start]
    for i, timestep in enumerate(scheduler.timesteps):
        step = guided(velocity(path[-1], timestep), drawing.guidance)
        path.append(scheduler.step(step, timestep, path[-1], return_dict=False)[0])
        if progress is not None:
            progress(i + 1, len(scheduler.timesteps))
    return path


def guided(velocities: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance in float32; at a guidance of at most 1 all velocities are conditional."""
    if guidance <= 1.0:
        return velocities.float()
    conditional, unconditional = velocities.float().chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def sana_timestep(timestep: Tensor, count: int, device: torch.device) -> Tensor:
    """(count,) float32: what the network is told."""
    return timestep.to(device=device, dtype=torch.float32).expand(count)
