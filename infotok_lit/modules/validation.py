"""What a validation adds up over its batches and processes, and what it says of it."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from infotok_lit.batch import Branch
from infotok_lit.modules.losses import BranchResult
from infotok_lit.objective.report import inert_message
from infotok_lit.scenes.metrics import QAExactMatch


class MeanWithError(Metric):
    """The mean of numbers and its standard error; NaN is no number."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "total", "squares"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Any shape."""
        there = values.isfinite()
        values = values.double().where(there, 0.0)
        self.count += there.sum()
        self.total += values.sum()
        self.squares += values.square().sum()

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and standard error; NaN where there are too few numbers."""
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()).clamp(min=0) * self.count / (self.count - 1)
        return mean.float(), (variance / self.count).sqrt().float()


class Validation:
    """Means of one validation, whose batches count by their images.

    Args:
        device: where the numbers are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.means: dict[str, MeanMetric] = {}
        self.gaps: dict[Branch, MeanWithError] = {}
        self.answers = QAExactMatch().to(device)

    def add(self, branch: Branch, result: BranchResult, others: Mapping[str, Tensor], images: int) -> None:
        """A batch: its losses and report, and numbers under other names."""
        values = {f"{branch}/loss": result.task_loss} | {f"{branch}/{k}": v for k, v in result.report().items()}
        for name, value in {**values, **others}.items():
            mean = self.means.setdefault(f"val/{name}", MeanMetric(nan_strategy="ignore").to(self.device))
            mean.update(value, weight=images)
        if result.objective.sufficiency_gaps is not None:
            self.gaps.setdefault(branch, MeanWithError().to(self.device)).update(result.objective.sufficiency_gaps)

    def add_answers(self, answers: list[str], truths: list[str], questions: list[str]) -> None:
        """The model's answers beside the true ones."""
        self.answers.update(answers, truths, questions)

    def finish(self) -> tuple[dict[str, Tensor], list[str]]:
        """What to log, over all processes, and what to warn of; a collective call."""
        values = {name: mean.compute() for name, mean in self.means.items()}
        values |= {f"val/understanding/answers/{name}": value for name, value in self.answers.compute().items()}
        warnings = []
        for branch, gap in self.gaps.items():
            mean, error = gap.compute()
            values |= {f"val/{branch}/sufficiency_gap": mean, f"val/{branch}/sufficiency_gap_error": error}
            message = inert_message(branch, float(mean), float(error))
            warnings += [] if message is None else [message]
        return finite_only(values), warnings


def finite_only(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what is NaN because nothing was there to measure; reads from the device."""
    return {name: value for name, value in values.items() if not torch.isnan(value)}
