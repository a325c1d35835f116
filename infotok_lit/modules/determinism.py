"""Random numbers that neither interruptions nor validation can shift."""

from typing import Any

import lightning.pytorch as pl
import torch

from infotok_lit.seeding import seed_of


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
