"""What a fit configuration describes, instantiated and connected but not run."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from infotok_lit.batch import BRANCHES
from infotok_lit.commands.fit import InfoTokCLI
from infotok_lit.commands.step_timing import StepBatch

DRAWN_STEPS = 8
"""How many steps' batches are drawn from the data; further rounds use them again."""


class FitSetup(InfoTokCLI):
    """The module, data and trainer of a fit configuration, in one process on one device, without anything to log to.

    Args:
        arguments: as for `fit`, without the subcommand; the quickstart's configuration if they name none.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        super().__init__(["fit", *arguments], run=False)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The configured trainer, but for what concerns other processes, logs and the terminal."""
        self.parser.callback_keys = []
        return super().instantiate_trainer(
            devices=1,
            num_nodes=1,
            strategy="auto",
            logger=False,
            callbacks=[],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **kwargs,
        )

    def connect(self) -> None:
        """Build the model, and let module, data and trainer know each other."""
        self.model.configure_model()
        self.model.trainer = self.trainer
        self.trainer.strategy.connect(self.model)
        self.datamodule.trainer = self.trainer
        negatives = {branch: self.model.hard_negatives(branch) for branch in BRANCHES}
        self.datamodule.connect(lambda: self.model.base.processor, negatives)

    def draw_steps(self, count: int) -> list[list[StepBatch]]:
        """The batches of the first steps, at most DRAWN_STEPS: for each step, those whose gradients accumulate."""
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        loader = iter(self.datamodule.train_dataloader())
        accumulated = range(self.trainer.accumulate_grad_batches)
        # Not a for loop over the loader: CombinedLoader would begin anew.
        return [[next(loader)[0] for _ in accumulated] for _ in range(min(count, DRAWN_STEPS))]

    def to_device(self, batches: Sequence[StepBatch]) -> list[StepBatch]:
        """Batches where and as precise as the trainer would give them to the module."""
        device, convert = self.trainer.strategy.root_device, self.trainer.precision_plugin.convert_input
        return [self.model.transfer_batch_to_device(convert(batch), device, 0) for batch in batches]
