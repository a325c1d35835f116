"""Clips for training and validation, resumable to the clip."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from infotok_lit.data.stream import BrokenSampleTally, Draw, EndlessSampler, FixedSampler, Request, first_whole
from infotok_lit.errors import SettingsError
from infotok_lit.video.clips import Augmentation, Clip, ClipSource, central


class ClipBatch(NamedTuple):
    """Some clips."""

    clips: Tensor
    """uint8 (B, T, H, W, 3)."""
    names: list[str]
    skipped: list[str]
    """One message per broken video that was met."""


class ClipDataset(Dataset):
    """Clips of one size by request; a broken one is replaced by another, drawn at random."""

    def __init__(
        self, source: ClipSource, frames: int, side: int, seed: int, augmentation: Augmentation | None
    ) -> None:
        self._source, self._frames, self._side, self._seed = source, frames, side, seed
        self._augmentation = augmentation

    def __getitem__(self, request: Request) -> Draw:
        seed = (self._seed, request.epoch, request.index)
        return first_whole(self._clip, self._any, seed, request.index, "video")

    def _any(self, index: int, attempt: int, rng: np.random.Generator) -> int:
        return int(rng.integers(len(self._source)))

    def _clip(self, index: int, rng: np.random.Generator) -> Clip:
        clip = self._source.clip(index, self._frames, rng)
        if self._augmentation is None:
            return replace(clip, frames=central(clip.frames, self._side))
        return replace(clip, frames=self._augmentation.apply(clip.frames, self._side, rng))


def collate(draws: Sequence[Draw]) -> ClipBatch:
    """A batch of clips of one size."""
    clips = torch.from_numpy(np.stack([draw.sample.frames for draw in draws]))
    names = [draw.sample.name for draw in draws]
    return ClipBatch(clips, names, [message for draw in draws for message in draw.skipped])


class ClipDataModule(LightningDataModule):
    """An endless, resumable stream of training clips, and always the same clips for validation."""

    def __init__(
        self,
        train: ClipSource,
        val: ClipSource | None = None,
        frames: int = 33,
        side: int = 256,
        batch_size: int = 1,
        val_batch_size: int = 1,
        val_clips: int = 64,
        num_workers: int = 0,
        augmentation: Augmentation = Augmentation(),  # noqa: B008 - frozen
        max_broken_share: float = 0.05,
        seed: int = 0,
    ) -> None:
        """
        Args:
            train: Videos to train on.
            val: Videos to validate on; default: the first of the training videos.
            frames: Frames per clip: a multiple of the tokenizer's temporal compression, and one.
            side: Height and width in pixels: a multiple of its spatial compression.
            batch_size: Clips per process and step.
            val_batch_size: Clips per process and validation step.
            val_clips: How many clips validation uses: the first ones, always the same, and cropped in the middle.
            num_workers: Worker processes per loader.
            augmentation: What training clips go through.
            max_broken_share: Training stops when more than this share of the videos is broken.
            seed: Decides the order of the clips and everything random about them.
        """
        super().__init__()
        if min(frames, side, batch_size, val_batch_size, val_clips) < 1 or num_workers < 0 or seed < 0:
            raise SettingsError("frames, side, batch sizes and val_clips must be 1 or more; workers and seed 0 or more")
        if not 0 <= max_broken_share <= 1:
            raise SettingsError("max_broken_share is a share: give it between 0 and 1")
        self._train, self._val = train, train if val is None else val
        self._frames, self._side = frames, side
        self._batch_size, self._val_batch_size, self._val_clips = batch_size, val_batch_size, val_clips
        self._num_workers, self._augmentation, self._seed = num_workers, augmentation, seed
        self._max_broken_share = max_broken_share
        self._forget()

    def setup(self, stage: str) -> None:
        """Start anew; Lightning restores a checkpoint's state after this. SettingsError for a fit without end."""
        self._forget()
        if stage == "fit" and self.trainer.max_steps == -1:
            raise SettingsError("the training clips have no end: say when to stop with trainer.max_steps")
        if self._val is self._train:
            rank_zero_warn("No validation videos: validating on the first training ones. Set data.val.")

    def train_dataloader(self) -> DataLoader:
        """Endless: training ends at `trainer.max_steps`."""
        sampler = EndlessSampler(
            len(self._train),
            self._batch_size,
            seed=(self._seed,),
            start=self._position,
            num_replicas=self.trainer.world_size,
            rank=self.trainer.global_rank,
        )
        return self._loader(self._train, sampler, self._batch_size, self._augmentation)

    def val_dataloader(self) -> DataLoader:
        """The same clips each time, each on one process only."""
        count = min(self._val_clips, len(self._val))
        sampler = FixedSampler(count, self.trainer.world_size, self.trainer.global_rank)
        return self._loader(self._val, sampler, self._val_batch_size, None)

    def on_after_batch_transfer(self, batch: ClipBatch, dataloader_idx: int) -> ClipBatch:
        """Count and name the broken videos behind a batch; TooManyBrokenSamplesError if there are too many."""
        if self.trainer.training:
            self._tally.count(len(batch.names), batch.skipped)
        else:
            self._tally.report(batch.skipped)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return {
            "position": self._position(),
            "batches": self._batches(),
            "broken": self._tally.state_dict(),
            "seed": self._seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; called before the loaders are made."""
        self._resumed = state_dict
        self._tally.load_state_dict(state_dict["broken"])
        if state_dict["seed"] != self._seed:
            rank_zero_warn(
                f"data.seed is {self._seed}, in the checkpoint {state_dict['seed']}: the clips come in another order "
                "from here on"
            )

    def _forget(self) -> None:
        self._resumed: dict[str, Any] = {"position": 0, "batches": 0}
        self._tally = BrokenSampleTally(self._max_broken_share, source_size=len(self._train))

    def _batches(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def _position(self) -> int:
        """The first clip of the stream, over all processes, that was not trained on yet."""
        batches = self._batches() - self._resumed["batches"]
        return self._resumed["position"] + batches * self.trainer.world_size * self._batch_size

    def _loader(
        self,
        source: ClipSource,
        sampler: EndlessSampler | FixedSampler,
        batch_size: int,
        augmentation: Augmentation | None,
    ) -> DataLoader:
        return DataLoader(
            ClipDataset(source, self._frames, self._side, self._seed, augmentation),
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self._num_workers,
            collate_fn=collate,
            pin_memory=False,
            # Of its own, so that the model's random numbers do not depend on how often it is iterated.
            generator=torch.Generator(),
        )
