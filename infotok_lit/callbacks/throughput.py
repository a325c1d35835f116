"""How fast a run is, and what it takes: in the logs and in the bar, wherever a step logs."""

from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch

from infotok_lit.batch import IMAGE_TOKEN_ID, Batch
from infotok_lit.modules.flops import FlopCount, most_flops

IMAGES, TOKENS, MEMORY, RATE, MFU = (
    f"throughput/{name}" for name in ("images_per_second", "tokens_per_second", "peak_gib", "tflops", "mfu")
)
SHOWN = {IMAGES: "images/s", TOKENS: "tokens/s", MEMORY: "peak GiB", MFU: "MFU"}
"""What is logged -> how the bar calls it."""


class Throughput(pl.Callback):
    """Logs images/s and tokens/s of all processes, and of this one its peak memory, its TFLOP/s and its MFU.

    A number is the mean since the last step that logged; time in validation is not counted. A GPU is waited for only
    where a step logs. The MFU (model FLOPs utilisation, Chowdhery et al. 2022, appendix B) is the share of the device's
    dense peak that training reaches; unlike there, activations that are computed again count again.

    Args:
        peak_tflops: what a device can compute in a second, in 10^12 operations; default: by its maker's word, where it
            is known, else there is no MFU.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        self.peak_tflops = peak_tflops
        self._counting: FlopCount | None = None
        self._flops = 0
        """Of one batch."""
        self._slots: bool | None = None
        """Whether the prompts of generation have slots for the image's own tokens."""
        self._reset(0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Learn what the device can do, and begin."""
        if self.peak_tflops is None:
            most = most_flops(pl_module.device, trainer.precision)
            self.peak_tflops = None if most is None else most / 1e12
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._reset(trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the operations of the first batch; the others have as many, up to the length of texts."""
        if self._slots is None:
            self._slots = bool((batch["generation"].input_ids == IMAGE_TOKEN_ID).any())
            self._counting = FlopCount()
            self._counting.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a batch, and log where the step does."""
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self._flops, self._counting = self._counting.total, None
        self._batches += 1
        self._images += sum(len(part.names) for part in batch.values())
        self._tokens += sum(self._positions(part, pl_module) for part in batch.values())
        if trainer.global_step > self._since and trainer.global_step % trainer.log_every_n_steps == 0:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            pl_module.log_dict(self._found(trainer.world_size, pl_module.device))
            self._reset(trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock stands."""
        self._stopped = perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock goes on."""
        self._start += perf_counter() - self._stopped

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop counting."""
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self._counting = None

    def _reset(self, step: int) -> None:
        self._since = step
        self._start = self._stopped = perf_counter()
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
        if self.peak_tflops is not None:
            found[MFU] = rate / self.peak_tflops
        return found
