"""Numbers over the steps of a run, small enough to live in its checkpoints."""

from collections.abc import Iterable, Mapping

import lightning.pytorch as pl
from torch import Tensor

MOST_ROWS = 2000
"""When there are more, every second one is forgotten."""


class MetricHistory:
    """Rows of metrics by step, in primitives."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def record(self, step: int, metrics: Mapping[str, Tensor], names: Iterable[str]) -> None:
        """Keep those of the named metrics that there are, once per step."""
        found = {name: float(metrics[name]) for name in names if name in metrics}
        if not found or (self.rows and self.rows[-1]["step"] == step):
            return
        self.rows.append({"step": step} | found)
        if len(self.rows) > MOST_ROWS:
            del self.rows[1::2]

    def series(self, *names: str) -> list[list[float]]:
        """The steps, then the values of each name, of the rows that have all of them."""
        rows = [row for row in self.rows if all(name in row for name in names)]
        return [[row[name] for row in rows] for name in ("step", *names)]


def logs_now(trainer: pl.Trainer) -> bool:
    """Whether the step that has just ended is one that is logged."""
    return trainer.global_step > 0 and trainer.global_step % trainer.log_every_n_steps == 0
