"""What takes long enough to be measured once only, by the model that a run leaves."""

from abc import ABC, abstractmethod
from typing import ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn


class LastValidation(pl.Callback, ABC):
    """Measures when training has reached its last step, and in `validate`."""

    done: ClassVar[str] = "measured"
    """What is said not to have been done, where no validation came at the last step."""

    def __init__(self) -> None:
        self._measured = False

    @abstractmethod
    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and log; a collective call, at the end of a validation."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing is measured yet."""
        self._measured = False

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and log, if this is the last validation."""
        # Without max_steps (-1) no validation is known to be the last one.
        last = trainer.state.fn == "validate" or 0 <= trainer.max_steps <= trainer.global_step
        if last and not trainer.sanity_checking:
            self.measure(trainer, pl_module)
            self._measured = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if nothing was measured."""
        if not self._measured:
            rank_zero_warn(
                f"{type(self).__name__}: nothing was {self.done}, because no validation came at the last step. Let "
                "trainer.val_check_interval divide trainer.max_steps, or use `validate` with this run's checkpoint"
            )
