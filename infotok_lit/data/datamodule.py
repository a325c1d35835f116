"""Both branches of a unified model, each step, from any sources; resumable to the sample."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch.utils.data import DataLoader

from infotok_lit.batch import BRANCHES, Branch, Encoding, Processor, Source
from infotok_lit.data.latents import Latents
from infotok_lit.data.stream import (
    BranchDataset,
    BrokenSampleTally,
    EndlessSampler,
    FixedSampler,
    StepLoader,
    branch_length,
    collate,
)
from infotok_lit.errors import SettingsError

_RESUMABLE = {
    "seed": "the samples come in another order from here on",
    "sizes": "a source has another number of samples, so they come in another order from here on",
    "batch_sizes": "the stream goes on where it was, in batches of another size",
    "processes": "the stream goes on where it was, shared out over another number of processes",
}
"""What a resumed run should find unchanged, and what follows if it does not."""


class UnifiedDataModule(LightningDataModule):
    """Yields {"understanding": batch, "generation": batch} for training, and one loader per branch for validation.

    It knows no model: `connect` hands it what it takes from one. The modules of this package do that by themselves.

    Args:
        train: Images with text to train on: infotok_lit.scenes.Scenes, or of infotok_lit.data ImageTextFolder,
            ImageTextShards or Mixture (docs/data.md).
        val: Images with text to validate on; default: what `val_share` says.
        generation_train: Images to draw, if not those of `train`.
        generation_val: Images to validate drawing on, if not those of `val`.
        understanding_batch_size: Samples to read per process and step.
        generation_batch_size: Samples to draw per process and step.
        val_batch_size: Samples per process and validation step.
        val_samples: How many samples of each branch validation uses: the first ones, always the same.
        val_share: Where no validation data is given, the share of the training images that is not trained on but
            validated on, always the same ones; 0 validates on the first of the training samples.
        num_workers: Worker processes per loader; training has two loaders.
        prompt_dropout: The share of drawn samples trained without a prompt, for classifier-free guidance.
        max_broken_share: Training stops when more than this share of the samples is broken.
        seed: Decides the order of samples and everything random about them.
        latents: A folder of latents that `cache` made of these images: the autoencoder then rests.
    """

    def __init__(
        self,
        train: Source,
        val: Source | None = None,
        generation_train: Source | None = None,
        generation_val: Source | None = None,
        understanding_batch_size: int = 32,
        generation_batch_size: int = 32,
        val_batch_size: int = 32,
        val_samples: int = 128,
        val_share: float = 0.0,
        num_workers: int = 0,
        prompt_dropout: float = 0.1,
        max_broken_share: float = 0.05,
        seed: int = 0,
        latents: str | None = None,
    ) -> None:
        super().__init__()
        if min(understanding_batch_size, generation_batch_size, val_batch_size, val_samples) < 1:
            raise SettingsError("batch sizes and val_samples must be at least 1")
        if not (0 <= prompt_dropout <= 1 and 0 <= max_broken_share <= 1 and 0 <= val_share < 1):
            raise SettingsError("prompt_dropout, max_broken_share and val_share are shares: give them between 0 and 1")
        if num_workers < 0 or seed < 0:
            raise SettingsError("num_workers and seed must not be negative")
        if val_share and val is None:
            train, val = train.split(val_share)
            if generation_train is not None and generation_val is None:
                generation_train, generation_val = generation_train.split(val_share)
        drawn = train if generation_train is None else generation_train
        self._train: dict[Branch, Source] = {"understanding": train, "generation": drawn}
        self._val: dict[Branch, Source] = {
            "understanding": train if val is None else val,
            "generation": next((source for source in (generation_val, val) if source is not None), drawn),
        }
        self._sizes = {branch: branch_length(source, branch) for branch, source in self._train.items()}
        sizes = (understanding_batch_size, generation_batch_size)
        self._batch_sizes: dict[Branch, int] = dict(zip(BRANCHES, sizes, strict=True))
        self._val_batch_size = val_batch_size
        self.val_samples = val_samples
        self._num_workers = num_workers
        self._prompt_dropout = prompt_dropout
        self.max_broken_share = max_broken_share
        self._seed = seed
        self._processor: Callable[[], Processor] | None = None
        self._wanted_negatives: Mapping[Branch, int] = {}
        self._latents_folder = None if latents is None else Path(latents)
        self._encoding: Callable[[], Encoding] | None = None
        self._latents: Latents | None = None
        self._forget()

    def connect(
        self,
        processor: Callable[[], Processor],
        hard_negatives: Mapping[Branch, int],
        encoding: Callable[[], Encoding] | None = None,
    ) -> None:
        """Say who turns samples into batches; to be called before the first loader is made.

        Args:
            processor: Gives the base model's processor; asked when a loader is made, so the model may be built later.
            hard_negatives: How many texts that are nearly true of its image a sample of each branch brings, at most;
                a branch that is left out has none.
            encoding: Says which autoencoder latents must be of; None for a module that has no use for latents.
        """
        self._processor = processor
        self._encoding = encoding
        self._wanted_negatives = dict(hard_negatives)

    def setup(self, stage: str) -> None:
        """Start anew; Lightning restores a checkpoint's state after this.

        Raises:
            SettingsError: for a fit that would not end, or would overfit a batch in Lightning's way.
        """
        self._forget()
        if stage == "fit" and self.trainer is not None:
            _refuse_other_ends(self.trainer)
        seen_in_training = [branch for branch in BRANCHES if self._val[branch] is self._train[branch]]
        if seen_in_training and stage in ("fit", "validate"):
            rank_zero_warn(
                f"No validation data for {' and '.join(seen_in_training)}: validating on the first "
                f"{self.val_samples} training samples, which says nothing about new images. Set val or val_share."
            )

    def train_dataloader(self) -> CombinedLoader:
        """Endless: training ends at `trainer.max_steps`."""
        self._warn_of_changes()
        return CombinedLoader({branch: self._train_loader(branch) for branch in BRANCHES}, mode="min_size")

    def val_dataloader(self) -> list[DataLoader]:
        """[understanding, generation]: the same samples each time, each on one process only."""
        return [self._val_loader(branch) for branch in BRANCHES]

    @property
    def validation_sources(self) -> dict[Branch, Source]:
        """What each branch is validated on."""
        return dict(self._val)

    @property
    def training_sources(self) -> dict[Branch, Source]:
        """What each branch is trained on."""
        return dict(self._train)

    @property
    def batch_sizes(self) -> dict[Branch, int]:
        """How many samples of each branch a process trains on in a step."""
        return dict(self._batch_sizes)

    @property
    def broken_samples(self) -> int:
        """How many broken samples training has skipped so far, in this process."""
        return self._tally.broken

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count and name the broken samples behind a batch; TooManyBrokenSamplesError if there are too many."""
        if self.trainer.training:
            for part in batch.values():
                self._tally.count(len(part.names), part.skipped)
        else:
            self._tally.report(batch.skipped)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the streams are, and what that depends on."""
        return {
            "batches": self._batches(),
            "positions": {branch: self._position(branch) for branch in BRANCHES},
            "broken": self._tally.state_dict(),
            **self._identity(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; called before the loaders are made."""
        self._resumed = state_dict
        self._tally.load_state_dict(state_dict["broken"])

    def _forget(self) -> None:
        self._resumed: dict[str, Any] = {}
        self._tally = BrokenSampleTally(self.max_broken_share, source_size=sum(self._sizes.values()))

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "sizes": dict(self._sizes),
            "batch_sizes": dict(self._batch_sizes),
            "processes": self.trainer.world_size,
        }

    def _warn_of_changes(self) -> None:
        for key, now in self._identity().items():
            if self._resumed and self._resumed[key] != now:
                rank_zero_warn(
                    f"The data's {key.replace('_', ' ')} changed from {self._resumed[key]} in the checkpoint to {now}: "
                    f"{_RESUMABLE[key]}."
                )

    def _batches(self) -> int:
        """Training batches that are done. `global_step` would not do: an epoch's last step may have fewer batches."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def _missing(self) -> Iterator[int]:
        """How many batches the next optimiser steps still need, the present one first; without an end."""
        size = self.trainer.accumulate_grad_batches
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed % size
        return itertools.chain([size - done], itertools.repeat(size))

    def _position(self, branch: Branch) -> int:
        """The first sample of the stream, over all processes, that was not trained on yet.

        It counts on from the position in the checkpoint, which may have been reached with another batch size.
        """
        position = self._resumed["positions"][branch] if self._resumed else 0
        batches = self._batches() - (self._resumed["batches"] if self._resumed else 0)
        return position + batches * self.trainer.world_size * self._batch_sizes[branch]

    def _train_loader(self, branch: Branch) -> DataLoader:
        source, batch_size = self._train[branch], self._batch_sizes[branch]
        sampler = EndlessSampler(
            self._sizes[branch],
            batch_size,
            seed=(self._seed, BRANCHES.index(branch)),
            start=partial(self._position, branch),
            num_replicas=self.trainer.world_size,
            rank=self.trainer.global_rank,
            permute=partial(source.order, branch, block=batch_size),
            lookahead=source.lookahead(branch, batch_size),
        )
        dataset = BranchDataset(source, branch, self._seed, self._prompt_dropout, self._hard_negatives(branch, source))
        return self._loader(dataset, branch, sampler, batch_size, training=True)

    def _val_loader(self, branch: Branch) -> DataLoader:
        source = self._val[branch]
        count = min(self.val_samples, branch_length(source, branch))
        sampler = FixedSampler(count, self.trainer.world_size, self.trainer.global_rank)
        dataset = BranchDataset(source, branch, self._seed, hard_negatives=self._hard_negatives(branch, source))
        return self._loader(dataset, branch, sampler, self._val_batch_size, training=False)

    def _hard_negatives(self, branch: Branch, source: Source) -> int:
        """How many texts per image are wanted that its source knows to be false of it."""
        wanted = self._wanted_negatives.get(branch, 0)
        if wanted and type(source).hard_negatives is Source.hard_negatives:
            rank_zero_warn(
                f"{type(source).__name__} knows no hard negatives for {branch}, so negatives.from_data changes nothing "
                "there; for free text use negatives.limit with negatives.kept nearest"
            )
        return wanted

    def _loader(
        self,
        dataset: BranchDataset,
        branch: Branch,
        sampler: EndlessSampler | FixedSampler,
        batch_size: int,
        training: bool,
    ) -> DataLoader:
        if self._processor is None:
            raise SettingsError(
                "the data does not know how to make batches: call UnifiedDataModule.connect(processor, hard_negatives) "
                "in the setup of the LightningModule, or of a callback that its configure_callbacks returns"
            )
        processor = self._processor()
        dataset.check = processor.check
        build = processor.understanding if branch == "understanding" else processor.generation
        ahead = training and branch == "understanding"
        # All batches of a step are asked for at once: workers should have them ready.
        prefetch = max(2, -(-self.trainer.accumulate_grad_batches // max(1, self._num_workers))) if ahead else 2
        return (partial(StepLoader, missing=self._missing) if ahead else DataLoader)(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self._num_workers,
            collate_fn=partial(collate, build, latents=self._latents_of(branch)),
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=training and self._num_workers > 0,
            prefetch_factor=prefetch if self._num_workers else None,
            # Of its own: a loader otherwise takes a number from the global generator each time it is iterated, and
            # the model's random numbers would depend on how often that was.
            generator=torch.Generator(),
        )

    def _latents_of(self, branch: Branch) -> Latents | None:
        if self._latents_folder is None:
            return None
        if self._latents is None:
            if self._encoding is None:
                raise SettingsError("data.latents: this model takes no latents from a cache; leave it out")
            self._latents = Latents(self._latents_folder, self._encoding())
        return self._latents if branch in self._latents.encoding.branches else None


def _refuse_other_ends(trainer: Trainer) -> None:
    if trainer.max_steps == -1:
        raise SettingsError("the training data has no end: say when to stop with trainer.max_steps")
    if trainer.overfit_batches:
        raise SettingsError(
            "trainer.overfit_batches would replace the endless stream: leave it out and train on a small source"
        )
