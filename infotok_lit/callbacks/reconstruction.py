"""Table 1, left, within a run: the images that a light decoder rebuilds from the understanding tokens of its model."""

from functools import partial
from itertools import islice

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from infotok_lit.batch import Processor, Source, UnderstandingBatch
from infotok_lit.callbacks.last_validation import LastValidation
from infotok_lit.data.datamodule import UnifiedDataModule
from infotok_lit.data.stream import BranchDataset, EndlessSampler, FixedSampler, branch_length, collate
from infotok_lit.errors import SettingsError
from infotok_lit.modules.decoder_probe import (
    Reconstructions,
    decoder_for,
    decoder_options,
    frechet_distance,
    optimiser_for,
)
from infotok_lit.modules.optimiser import SHARDING_STRATEGIES, OptimiserConfig
from infotok_lit.seeding import isolated_rng


class Reconstruction(LastValidation):
    """When training has reached its last step, and in `validate`, probes how well images come back from the tokens.

    The model is frozen; a fresh light decoder learns to draw images from its understanding tokens, and is measured on
    others, as `configs/probe/decoder.yaml` does in a run of its own. Logged: `val/probe/frechet_distance`, `psnr` (dB),
    `ssim`, `loss` and the number of `images`. The first process measures while the others wait. Training is not
    disturbed. With it, a study has the paper's Table 1 as rows: `configs/ablation/paper_table1.yaml`.

    Args:
        steps: the decoder's optimiser steps.
        batch_size: images per step.
        samples: how many images measure it: the first ones of `val`.
        width: of the decoder; depth and heads likewise.
        optimiser: AdamW and its schedule; `lr` is the decoder's.
        feature_network: maps images (B, 3, H, W) uint8 to features (B, d), with d as its `num_features`; None for the
            Inception of torch-fidelity (an optional package), with the weights of `inception`.
        inception: weights file of that Inception; None looks where torch-fidelity keeps its own.
        antialias: how that Inception's input is resized; False for numbers like those that are published.
        train: images for the decoder; default: those of the run. val likewise.
        seed: decides the decoder's first weights, and the images of each step.
    """

    def __init__(
        self,
        steps: int = 1000,
        batch_size: int = 64,
        samples: int = 1000,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        optimiser: OptimiserConfig = OptimiserConfig(lr=1e-3, warmup_steps=50),  # noqa: B008 - frozen
        feature_network: nn.Module | None = None,
        inception: str | None = None,
        antialias: bool = False,
        train: Source | None = None,
        val: Source | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(steps, batch_size) < 1 or samples < 2:
            raise SettingsError("Reconstruction: steps and batch_size must be 1 or more, and samples 2 or more")
        self.steps, self.batch_size, self.samples, self.seed = steps, batch_size, samples, seed
        self.decoder_options = decoder_options(width, depth, heads)
        self.optimiser_config, self.train, self.val = optimiser, train, val
        self._frechet = partial(frechet_distance, feature_network, inception, antialias)
        self._frechet()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the run's images where no others are given.

        Raises:
            SettingsError: for data that has none, and a strategy under which no process has the whole model.
        """
        if isinstance(trainer.strategy, (*SHARDING_STRATEGIES, ModelParallelStrategy)):
            raise SettingsError("Reconstruction: one process measures, which a sharded model does not allow: use DDP")
        data = trainer.datamodule
        if isinstance(data, UnifiedDataModule):
            self.train = self.train if self.train is not None else data.training_sources["understanding"]
            self.val = self.val if self.val is not None else data.validation_sources["understanding"]
        if self.train is None or self.val is None:
            raise SettingsError("Reconstruction: needs a UnifiedDataModule, or train and val of its own")

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first process measures; all log."""
        values = self._measure(trainer, pl_module) if trainer.is_global_zero else {}
        pl_module.log_dict(trainer.strategy.broadcast(values))

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        device = pl_module.device
        # Validation runs without gradients, which the decoder needs; the model is still called without.
        with (
            isolated_rng(self.seed, device),
            torch.inference_mode(False),
            torch.enable_grad(),
            pl_module.plain_base() as base,
        ):

            def tokens(batch: UnderstandingBatch) -> Tensor:
                with torch.no_grad(), trainer.precision_plugin.val_step_context():
                    return base.understood_tokens(batch.pixel_values).float()

            decoder = decoder_for(base, **self.decoder_options).to(device)
            optimiser, schedule = optimiser_for(decoder, self.optimiser_config, self.steps)
            for batch in islice(self._batches(self.train, base.processor, endless=True), self.steps):
                batch = move_data_to_device(batch, device)
                optimiser.zero_grad()
                F.mse_loss(decoder(tokens(batch)), batch.pixel_values).backward()
                optimiser.step()
                schedule.step()
            measures = Reconstructions(self._frechet, device, alone=True)
            with torch.no_grad():
                for batch in self._batches(self.val, base.processor, endless=False):
                    batch = move_data_to_device(batch, device)
                    measures.update(batch.pixel_values, decoder(tokens(batch)))
            return {name: float(value) for name, value in measures.compute().items()}

    def _batches(self, source: Source, processor: Processor, endless: bool) -> DataLoader:
        """Batches of a source: for ever in an order of the seed, or its first samples."""
        length, sampler = branch_length(source, "understanding"), None
        if endless:
            sampler = EndlessSampler(length, self.batch_size, seed=(self.seed,), start=lambda: 0)
        else:
            sampler = FixedSampler(min(self.samples, length))
        return DataLoader(
            BranchDataset(source, "understanding", self.seed),
            self.batch_size,
            sampler=sampler,
            collate_fn=partial(collate, processor.understanding),
            generator=torch.Generator(),
        )
