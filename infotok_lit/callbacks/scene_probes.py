"""Logs what the tokens of a trained model hold about Scenes: bits of structure and bits of texture."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor

from infotok_lit.batch import Batch, Branch, BranchOutput
from infotok_lit.callbacks.last_validation import LastValidation
from infotok_lit.data.datamodule import UnifiedDataModule
from infotok_lit.errors import SettingsError
from infotok_lit.models.unified import UnifiedModel
from infotok_lit.modules.sharding import is_sharded
from infotok_lit.objective.infotok import InfoTok
from infotok_lit.scenes import Scenes
from infotok_lit.scenes.probe import (
    POSTERIOR_MEAN,
    POSTERIOR_SAMPLE,
    TOKENS,
    Posterior,
    ProbedModel,
    ProbeOptions,
    ProbeRow,
    measure,
)
from infotok_lit.seeding import isolated_rng

PREFIXES = {TOKENS: "probe", POSTERIOR_MEAN: "probe/posterior_mean", POSTERIOR_SAMPLE: "probe/posterior_sample"}
"""Features that are probed -> under which name."""


class SceneProbes(LastValidation):
    """When training has reached its last step, and in `validate`, probes what the tokens hold about unseen Scenes.

    Logged under `val/<branch>/probe/`: `structure_bits` and `texture_bits` per image, both lower bounds, with their
    standard errors `structure_error` and `texture_error`; and where the heads have a posterior, the same for its mean
    and a sample, under `posterior_mean/` and `posterior_sample/`. The scenes are of the family that validation shows,
    with its texture and jitter, but always of the split `val`, as the probes need to know their distribution.

    The first process measures while the others wait. Training is not disturbed.

    Args:
        train: How many scenes fit the probes.
        test: How many other scenes measure them.
        hidden: Width of the hidden layer of the probes of the objects; 0 for linear ones.
        batch_size: Scenes that the model sees at a time. Harmon hides the same share of all images of a batch, so few
            large batches would see few shares.
        seed: Decides the scenes and all random numbers.
    """

    done = "probed"

    def __init__(
        self, train: int = 1000, test: int = 500, hidden: int = 0, batch_size: int = 10, seed: int = 0
    ) -> None:
        super().__init__()
        self.options = ProbeOptions(train=train, test=test, hidden=hidden, batch_size=batch_size, seed=seed)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the family, texture and jitter of the validation data; SettingsError for data that has none."""
        if not isinstance(trainer.datamodule, UnifiedDataModule):
            raise SettingsError("SceneProbes: needs a UnifiedDataModule that validates on Scenes")
        specs = {}
        for branch, source in trainer.datamodule.validation_sources.items():
            if not isinstance(source, Scenes):
                raise SettingsError(
                    f"SceneProbes: {branch} is validated on {type(source).__name__}, of which no structure and texture "
                    "are known: take the callback out of trainer.callbacks, or validate on infotok_lit.scenes.Scenes"
                )
            specs[branch] = (source.name, source.spec)
        if len(set(specs.values())) > 1:
            raise SettingsError(
                "SceneProbes: both branches are probed on the same scenes, but data.val and data.generation_val differ "
                "in spec, texture or jitter: make them equal"
            )
        name, spec = next(iter(specs.values()))
        self.options = replace(self.options, scenes=name, texture=spec.texture, jitter=spec.jitter)

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first process measures, and the others where processes share the model out: none computes alone there."""
        rows = self._measure(pl_module) if trainer.is_global_zero or is_sharded(pl_module) else []
        for row in trainer.strategy.broadcast(rows):
            for name, bits in (("structure", row.information.structure), ("texture", row.information.texture)):
                prefix = f"val/{row.branch}/{PREFIXES[row.features]}/{name}"
                pl_module.log_dict({f"{prefix}_bits": bits.mean, f"{prefix}_error": bits.error})

    def _measure(self, pl_module: pl.LightningModule) -> list[ProbeRow]:
        # Validation runs without gradients, which the probes need; the model is still called without.
        with isolated_rng(self.options.seed, pl_module.device), torch.inference_mode(False), torch.enable_grad():
            model = probed_model(pl_module.base, pl_module.infotok)
            return measure(model, self.options, kinds=tuple(PREFIXES))


def probed_model(
    base: UnifiedModel,
    heads: InfoTok | None = None,
    running: Callable[[], AbstractContextManager[Any]] = torch.inference_mode,
) -> ProbedModel:
    """A model as the probes see it.

    Args:
        heads: those of a run, for its posteriors; None for its tokens alone.
        running: makes the context that the model is called in.
    """
    device = next(base.parameters()).device

    def forward(branch: Branch, batch: Batch) -> BranchOutput:
        with running():
            return getattr(base, branch)(move_data_to_device(batch, device))

    def posterior(branch: Branch, tokens: Tensor) -> Posterior | None:
        with running():
            return None if heads is None else heads.posterior(branch, tokens)

    return ProbedModel(base.processor, device, forward, posterior)
