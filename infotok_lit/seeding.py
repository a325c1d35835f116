"""Random numbers that depend on what they are for, and on nothing else that draws."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*parts: int) -> int:
    """A 32-bit seed that depends on every part and mixes neighbouring values well."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@contextmanager
def isolated_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch draws from `seed`; outside, as if nothing had been drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
