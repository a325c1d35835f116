"""Random numbers that neither interruptions nor validation can shift."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
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


class StepSeed(pl.Callback):
    """Reseeds torch before every training batch, by a pure function of the seed, the batches so far and the rank.

    Nothing has to be saved but the seed, so a run that is killed at any moment and resumed draws what it would have
    drawn. InfoTokModule adds it to every run.
    """

    def __init__(self) -> None:
        self.seed: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the seed of `seed_everything`; a resumed run then gets its own back."""
        if self.seed is None:
            self.seed = torch.initial_seed()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed from (seed, batches so far, rank)."""
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        torch.manual_seed(seed_of(self.seed, done, trainer.global_rank))

    def state_dict(self) -> dict[str, Any]:
        """The seed."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the seed of the run."""
        self.seed = state_dict["seed"]
