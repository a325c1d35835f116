"""How long steps take, and what: in the logs and the bar of any run, and phase by phase for `bench`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from infotok_lit.batch import IMAGE_TOKEN_ID, Batch
from infotok_lit.modules.flops import FlopCount, most_flops
from infotok_lit.modules.run_callbacks import logs_now

IMAGES, TOKENS, MEMORY, RATE, MFU = (
    f"throughput/{name}" for name in ("images_per_second", "tokens_per_second", "peak_gib", "tflops", "mfu")
)
SHOWN = {IMAGES: "images/s", TOKENS: "tokens/s", MEMORY: "peak GiB", MFU: "MFU"}
"""What is logged -> how the bar calls it."""
PHASES = ("data", "forward", "backward", "optimiser")


class OperationCounter(pl.Callback):
    """Counts the floating-point operations of one batch; the others have as many, up to the length of texts."""

    _counting: FlopCount | None = None

    def begin_counting(self) -> None:
        """Count from now on."""
        self._counting = FlopCount()
        self._counting.__enter__()

    def counted(self) -> int | None:
        """Count no more; how many there were, or None if nothing was being counted."""
        counting, self._counting = self._counting, None
        if counting is None:
            return None
        counting.__exit__(None, None, None)
        return counting.total

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Count no more."""
        self.counted()


class Throughput(OperationCounter):
    """Logs images/s and tokens/s of all processes, and of this one its peak memory, its TFLOP/s and its MFU.

    A number is the mean since the last step that logged; time from a validation to the next batch is not counted, nor
    is what a callback does in `not_training`. A GPU is waited for only where a step logs. The MFU (model FLOPs
    utilisation, Chowdhery et al. 2022, appendix B) is the share of the device's dense peak that training reaches;
    unlike there, activations that are computed again count again.

    Args:
        peak_tflops: what a device can compute in a second, in 10^12 operations; default: by its maker's word, where it
            is known, else there is no MFU.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        self.peak_tflops = peak_tflops
        self._peak: float | None = None
        self._flops = 0
        """Of one batch."""
        self._slots: bool | None = None
        """Whether the prompts of generation have slots for the image's own tokens."""
        self._reset(0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Learn what the device can do, and begin; a second fit may be on another, with other batches."""
        self._peak = self.peak_tflops
        if self._peak is None:
            most = most_flops(pl_module.device, trainer.precision)
            self._peak = None if most is None else most / 1e12
        self._slots = None
        self._reset(trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the clock go on after a validation, and count the operations of the first batch."""
        if self._stopped is not None:
            self._start += perf_counter() - self._stopped
            self._stopped = None
        if self._slots is None:
            self._slots = bool((batch["generation"].input_ids == IMAGE_TOKEN_ID).any())
            self.begin_counting()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a batch, and log where the step does."""
        if (operations := self.counted()) is not None:
            self._flops = operations
            if pl_module.device.type == "cuda":
                # What is compiled ran uncompiled meanwhile, and that takes more.
                torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._batches += 1
        self._images += sum(len(part.names) for part in batch.values())
        self._tokens += sum(self._positions(part, pl_module) for part in batch.values())
        if trainer.global_step > self._since and logs_now(trainer):
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            pl_module.log_dict(self._found(trainer.world_size, pl_module.device))
            self._reset(trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock stands until the next batch is there: callbacks after this one may draw when validation ends."""
        self._stopped = perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Do not count so much of the time since the last step that logged."""
        self._start += seconds

    def _reset(self, step: int) -> None:
        self._since = step
        self._start, self._stopped = perf_counter(), None
        self._images = self._tokens = self._batches = 0

    def _positions(self, batch: Batch, pl_module: pl.LightningModule) -> int:
        """Positions of text and images, padding among them, by shapes alone."""
        drawn = hasattr(batch, "captions") and not self._slots
        rows, columns = pl_module.base.grid_of(*batch.pixel_values.shape[2:]) if drawn else (0, 0)
        return batch.input_ids.numel() + len(batch.names) * rows * columns

    def _found(self, processes: int, device: torch.device) -> dict[str, float]:
        seconds = perf_counter() - self._start
        rate = self._flops * self._batches / seconds / 1e12
        found = {
            IMAGES: processes * self._images / seconds,
            TOKENS: processes * self._tokens / seconds,
            RATE: rate,
        }
        if device.type == "cuda":
            found[MEMORY] = torch.cuda.max_memory_allocated(device) / 2**30
        if self._peak is not None:
            found[MFU] = rate / self._peak
        return found


@contextmanager
def not_training(trainer: pl.Trainer) -> Iterator[None]:
    """What a callback does inside is no training: Throughput does not count its time."""
    begin = perf_counter()
    yield
    for callback in trainer.callbacks:
        if isinstance(callback, Throughput):
            callback.leave_out(perf_counter() - begin)


@dataclass(frozen=True)
class StepTime:
    """One optimiser step, with all batches whose gradients it accumulates.

    Args:
        wall: Seconds by PHASES. On a GPU: of its own queue, so that watching does not hold it up.
        cpu: Seconds that all threads of this process computed, by PHASES; workers of the data are not counted.
        logs: Whether the step is one that logs, which takes longer.
    """

    wall: Mapping[str, float]
    cpu: Mapping[str, float]
    logs: bool = False


@dataclass(frozen=True)
class Moment:
    """A moment between two phases; `queued` is the same moment in the queue of a GPU."""

    phase: str
    wall: float
    cpu: float
    queued: torch.cuda.Event | None

    def seconds_after(self, other: "Moment") -> float:
        """Time since another moment; the GPU must have reached both."""
        if self.queued is not None and other.queued is not None:
            return other.queued.elapsed_time(self.queued) / 1000
        return self.wall - other.wall


class StepTiming(OperationCounter):
    """Measures, between the hooks of the Trainer, where the time of each step goes.

    `data` is waiting for a batch and moving it to the device; `forward` the model's losses and the objective;
    `optimiser` clipping, the step, and what callbacks and logging do at its end. For short fits: it keeps all moments.

    Args:
        warmup: How many steps are not counted.

    Attributes:
        steps: The times of the steps after the warm-up, when training has ended.
        samples_per_step: Samples of all branches in an optimiser step of this process.
        flops_per_step: Floating-point operations of such a step; None without a warm-up, in which they are counted.
        peak_bytes: GPU memory at the worst moment after the warm-up; None on other devices.
    """

    def __init__(self, warmup: int = 3) -> None:
        self.warmup = warmup
        self.steps: list[StepTime] = []
        self.samples_per_step = 0
        self.flops_per_step: int | None = None
        self.peak_bytes: int | None = None
        self._moments: list[list[Moment]] = [[]]
        self._samples = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first step begins with its data."""
        self._mark("start", pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch is there."""
        if self.warmup and batch_idx == 0:
            self.begin_counting()
        self._samples += sum(len(part.names) for part in batch.values())
        self._mark("data", pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """The loss is there."""
        self._mark("forward", pl_module)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The gradients are there."""
        self._mark("backward", pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The weights have moved, unless gradients go on accumulating."""
        self._mark("optimiser", pl_module)
        if (operations := self.counted()) is not None:
            self.flops_per_step = operations * trainer.accumulate_grad_batches
        if trainer.global_step == len(self._moments):
            self.samples_per_step, self._samples = self._samples, 0
            self._moments.append([self._moments[-1][-1]])
            if trainer.global_step == self.warmup and pl_module.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Work the times out, once the GPU has reached all moments."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(pl_module.device)
        # The last step is not followed by another, and so not begun.
        every = trainer.log_every_n_steps
        self.steps = [
            _step_time(moments, logs=every > 0 and number % every == 0)
            for number, moments in enumerate(self._moments[:-1], start=1)
        ][self.warmup :]

    def _mark(self, phase: str, pl_module: pl.LightningModule) -> None:
        queued = None
        if pl_module.device.type == "cuda":
            queued = torch.cuda.Event(enable_timing=True)
            queued.record()
        self._moments[-1].append(Moment(phase, perf_counter(), process_time(), queued))


def _step_time(moments: list[Moment], logs: bool) -> StepTime:
    wall, cpu = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
    for before, after in zip(moments, moments[1:], strict=False):
        wall[after.phase] += after.seconds_after(before)
        cpu[after.phase] += after.cpu - before.cpu
    return StepTime(wall, cpu, logs)
