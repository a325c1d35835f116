"""An endless stream of samples that is a pure function of (seed, position), and so resumes exactly.

Knowing how many samples were drawn is enough to go on with the next one, on any number of processes and workers.
Broken samples are replaced by others, counted and named.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from infotok_lit.batch import (
    BRANCHES,
    Branch,
    BrokenSampleError,
    GenerationSample,
    Sample,
    Source,
    TooManyBrokenSamplesError,
)
from infotok_lit.data.latents import Latents
from infotok_lit.errors import SettingsError

MAX_ATTEMPTS = 100
_NAMED = 5
_ENOUGH = 50
"""Draws after which the share of broken ones is judged."""

log = logging.getLogger(__name__)


class Request(NamedTuple):
    """Which sample to draw."""

    index: int
    epoch: int
    """How many whole passes over the source came before: the same index draws other random numbers in each."""
    ahead: int | None = None
    """The index of a sample that will soon be drawn, for the source to get ready."""


def branch_length(source: Source, branch: Branch) -> int:
    """How many samples a source has for a branch; SettingsError if none."""
    length = source.branch_length(branch)
    if length < 1:
        raise SettingsError(f"{type(source).__name__} has no samples for {branch}")
    return length


class EndlessSampler(DistributedSampler):
    """Pass after pass over a source, each in a new order, shared out over processes; it has no length.

    Global batch k is the positions [k W B, (k + 1) W B) of the stream for W processes with B samples each; process r
    takes the r-th B of them. A DistributedSampler, because Lightning replaces any other sampler under DDP.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: Sequence[int],
        start: Callable[[], int],
        num_replicas: int = 1,
        rank: int = 0,
        permute: Callable[[np.random.Generator], np.ndarray] | None = None,
        lookahead: int = 0,
    ) -> None:
        """
        Args:
            length: The number of samples in the source.
            batch_size: B, the samples per process and batch.
            seed: Non-negative integers that name the stream.
            start: Gives the position to begin at; asked at each iteration.
            num_replicas: W, the number of processes.
            rank: Which of them this is.
            permute: Gives the order (length,) of a pass; default: any is equally likely.
            lookahead: How many positions later the sample is that a request speaks of as ahead; 0 for none.
        """
        super().__init__(range(length), num_replicas=num_replicas, rank=rank, shuffle=True)
        self._length = length
        self._batch_size = batch_size
        self._stream = tuple(seed)
        self._start = start
        self._permute = permute
        self._lookahead = lookahead

    def __iter__(self) -> Iterator[Request]:
        size, orders = self._batch_size, {}
        for first in itertools.count(self._start() + self.rank * size, self.num_replicas * size):
            for position in range(first, first + size):
                index, epoch = self._at(position, orders)
                ahead = self._at(position + self._lookahead, orders)[0] if self._lookahead else None
                yield Request(index, epoch, ahead)

    def order(self, epoch: int) -> np.ndarray:
        """The permutation (length,) of one pass."""
        rng = np.random.default_rng([*self._stream, epoch])
        return rng.permutation(self._length) if self._permute is None else self._permute(rng)

    def _at(self, position: int, orders: dict[int, np.ndarray]) -> tuple[int, int]:
        """(index, epoch) at a position of the stream; `orders` keeps those of the last two epochs."""
        epoch, place = divmod(position, self._length)
        if epoch not in orders:
            orders.pop(epoch - 2, None)
            orders[epoch] = self.order(epoch)
        return int(orders[epoch][place]), epoch

    def __len__(self) -> int:
        raise TypeError("the stream is endless")


class FixedSampler(DistributedSampler):
    """The first samples of a source, always in the same order and with the same random numbers: for validation.

    Every process gets the same number, so that none waits for another; up to W - 1 samples are left out for it.
    """

    def __init__(self, count: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(range(count), num_replicas=num_replicas, rank=rank, shuffle=False, drop_last=True)
        if count < num_replicas:
            raise SettingsError(f"{count} validation samples cannot be shared by {num_replicas} processes: use more")
        self._shared = count - count % num_replicas

    def __iter__(self) -> Iterator[Request]:
        return (Request(index, epoch=0) for index in range(self.rank, self._shared, self.num_replicas))

    def __len__(self) -> int:
        return self._shared // self.num_replicas


class Draw(NamedTuple):
    """A sample, and one message per broken sample met on the way to it."""

    sample: Any
    skipped: list[str]


def first_whole(
    draw: Callable[[int, np.random.Generator], Any],
    replacement: Callable[[int, int, np.random.Generator], int],
    seed: Sequence[int],
    index: int,
    what: str,
) -> Draw:
    """What `draw` makes of an index and random numbers; a broken sample is replaced by another, drawn at random.

    At random rather than by its neighbour, so that the share of broken draws estimates the share of broken samples
    also where they lie together, and no sample is drawn more often for lying behind them.

    Args:
        draw: raises BrokenSampleError, or OSError, for a sample that cannot be used.
        replacement: gives the sample to draw in the place of one, by the number of the attempt and random numbers.
        seed: decides the random numbers, together with the number of the attempt.
        what: what a sample is called in messages.

    Raises:
        TooManyBrokenSamplesError: if MAX_ATTEMPTS in a row are broken.
    """
    skipped: list[str] = []
    for attempt in range(MAX_ATTEMPTS):
        rng = np.random.default_rng([*seed, attempt])
        chosen = replacement(index, attempt, rng) if attempt else index
        try:
            return Draw(draw(chosen, rng), skipped)
        except BrokenSampleError as error:
            skipped.append(str(error))
        except OSError as error:
            skipped.append(f"{what} {chosen}: {error}")
    raise TooManyBrokenSamplesError(
        f"{MAX_ATTEMPTS} {what}s in a row cannot be used; check the paths and files. Among them: "
        + "; ".join(list(dict.fromkeys(skipped))[:3])
    )


class BranchDataset(Dataset):
    """The samples of one branch of a source, by request."""

    check: Callable[[Sample], None] | None = None
    """The base model's, once it is known: BrokenSampleError for a sample that the model cannot take."""

    def __init__(
        self, source: Source, branch: Branch, seed: int, prompt_dropout: float = 0.0, hard_negatives: int = 0
    ) -> None:
        """
        Args:
            source: Where the samples come from.
            branch: What they are for.
            seed: Non-negative; decides all random numbers together with the request.
            prompt_dropout: The share of generation samples that train without their prompt.
            hard_negatives: How many of the texts that the source knows to be nearly true a sample brings, at most.
        """
        self._source = source
        self._branch = branch
        self._seed = seed
        self._prompt_dropout = prompt_dropout
        self._hard_negatives = hard_negatives
        self._length = branch_length(source, branch)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, request: Request) -> Draw:
        index, epoch, ahead = Request(*request)
        if ahead is not None:
            self._source.prefetch(self._branch, ahead)
        # The branch is part of every seed, so that the two draw independently from one source.
        seed = (self._seed, epoch, index, BRANCHES.index(self._branch))
        replacement = partial(self._source.replacement, self._branch)
        return first_whole(self._draw, replacement, seed, index, f"{self._branch} sample")

    def _draw(self, index: int, rng: np.random.Generator) -> Sample:
        sample = self._finish(self._source.sample(self._branch, index, rng), index, rng)
        if self.check is not None:
            self.check(sample)
        return sample

    def _finish(self, sample: Sample, index: int, rng: np.random.Generator) -> Sample:
        if rng.random() < self._prompt_dropout and isinstance(sample, GenerationSample):
            sample = replace(sample, drop_prompt=True)
        if not self._hard_negatives:
            return sample
        texts = self._source.hard_negatives(self._branch, index)
        chosen = rng.permutation(len(texts))[: self._hard_negatives]
        return replace(sample, negatives=tuple(texts[i] for i in chosen))


def collate(
    build: Callable[[Sequence[Any], Sequence[str]], Any], draws: Sequence[Draw], latents: Latents | None = None
) -> Any:
    """A batch from draws.

    Args:
        build: the method of the base model's processor for the branch.
        latents: what the batch's latents are looked up in, if they are known.
    """
    batch = build([draw.sample for draw in draws], [message for draw in draws for message in draw.skipped])
    return batch if latents is None else batch._replace(encoded=latents.look_up(batch.pixel_values, batch.names))


class StepLoader(DataLoader):
    """A loader that reads all batches to read of an optimiser step before it gives the first one.

    So each batch knows how many labels the step has, by which the gradients that are accumulated become those of one
    large batch. The step's batches lie on the host meanwhile.
    """

    def __init__(self, *arguments: Any, missing: Callable[[], Iterator[int]], **options: Any) -> None:
        """
        Args:
            arguments: With `options`, what a DataLoader takes.
            missing: Gives how many batches each step still needs, one step after another; asked at each iteration.
        """
        super().__init__(*arguments, **options)
        self._missing = missing

    def __iter__(self) -> Iterator[Any]:
        return self._by_step(super().__iter__())

    def _by_step(self, batches: Iterator[Any]) -> Iterator[Any]:
        for count in self._missing():
            step = list(itertools.islice(batches, count))
            if not step:
                return
            labels = sum(batch.count_labels() for batch in step) / len(step)
            yield from (batch._replace(step_labels=labels) for batch in step)


class BrokenSampleTally:
    """How many training draws were broken, in the process that trains."""

    def __init__(self, max_share: float, source_size: int) -> None:
        """
        Args:
            max_share: The share of broken draws above which training stops.
            source_size: The number of samples there are; the share is judged after 50 draws, or this many if fewer.
        """
        self.good = 0
        self.broken = 0
        self._max_share = max_share
        self._enough = min(_ENOUGH, source_size)
        self._first: list[str] = []
        self._reported: set[str] = set()

    def report(self, messages: Sequence[str]) -> None:
        """Log each message that was not logged before."""
        for message in messages:
            if message not in self._reported:
                self._reported.add(message)
                log.warning("skipped a broken sample: %s", message)

    def count(self, good: int, messages: Sequence[str]) -> None:
        """Count the draws of one batch; TooManyBrokenSamplesError if too many so far were broken."""
        self.report(messages)
        self.good += good
        self.broken += len(messages)
        self._first = list(dict.fromkeys([*self._first, *messages]))[:_NAMED]
        total = self.good + self.broken
        if total >= self._enough and self.broken > self._max_share * total:
            raise TooManyBrokenSamplesError(
                f"{self.broken} of {total} samples drawn so far are broken ({self.broken / total:.1%}, the limit is "
                f"{self._max_share:.1%}): {'; '.join(self._first)}. Mend or remove them, or raise max_broken_share."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"good": self.good, "broken": self.broken, "first": list(self._first)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.good, self.broken, self._first = state["good"], state["broken"], list(state["first"])
