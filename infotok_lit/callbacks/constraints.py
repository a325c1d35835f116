"""Whether dual ascent meets its budget: the constrained number and its multiplier over the steps."""

from typing import Any

import lightning.pytorch as pl
import numpy as np
from matplotlib.axes import Axes
from PIL.Image import Image

from infotok_lit.batch import BRANCHES, Branch
from infotok_lit.callbacks.figures import BRANCH_COLOURS, GREY, log_axis, panels, publish, rendered
from infotok_lit.callbacks.history import MetricHistory
from infotok_lit.modules.run_callbacks import logs_now
from infotok_lit.objective.constraint import RATE, Constraint


class Constraints(pl.Callback):
    """At each validation, draws every constraint of the objective: what is limited, its limit, and the multiplier.

    Nothing is drawn for an objective without `rate_budget_bits` and `sufficiency_target_nats`. The numbers are those
    that training logs, and part of the checkpoint.
    """

    def __init__(self) -> None:
        self.history = MetricHistory()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember what the step logged."""
        if logs_now(trainer):
            names = [f"train/{branch}/constraint_{name}" for branch in BRANCHES for name in ("gap", "multiplier")]
            self.history.record_logged(trainer, names)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw."""
        constraints = dict(pl_module.infotok.constraints.items())
        if self.history.rows and constraints:
            publish(trainer, "train/constraints", lambda: draw_constraints(self.history, constraints))

    def state_dict(self) -> dict[str, Any]:
        """The numbers, in primitives."""
        return {"rows": self.history.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the numbers of the run."""
        self.history.rows = state_dict["rows"]


def draw_constraints(history: MetricHistory, constraints: dict[Branch, Constraint]) -> Image:
    """The picture: above the constrained numbers, below their multipliers; a column per branch."""
    figure, axes = panels(2, len(constraints), "Dual ascent: the constraint, and the factor that enforces it")
    for column, (branch, constraint) in enumerate(constraints.items()):
        steps, gaps, multipliers = history.series(
            f"train/{branch}/constraint_gap", f"train/{branch}/constraint_multiplier"
        )
        colour = BRANCH_COLOURS[branch]
        _draw_limited(axes[0, column], branch, constraint, steps, np.array(gaps) + constraint.limit)
        axes[1, column].plot(steps, multipliers, color=colour)
        log_axis(axes[1, column], "y", min(multipliers), max(multipliers))
        axes[1, column].set_ylabel(f"factor of {constraint.term}", fontsize=9)
        axes[1, column].set_xlabel("step", fontsize=9)
    return rendered(figure)


def _draw_limited(axis: Axes, branch: Branch, constraint: Constraint, steps: list[float], values: np.ndarray) -> None:
    name, unit = ("budget", "bits per token") if constraint.quantity == RATE else ("target", "nats per element")
    axis.plot(steps, values, color=BRANCH_COLOURS[branch], label="measured, per logged step")
    axis.axhline(constraint.limit, color=GREY, linestyle="--", linewidth=1, label=f"{name}: {constraint.limit:g}")
    if constraint.quantity == RATE:
        log_axis(axis, "y", min(*values, constraint.limit), max(*values, constraint.limit))
    axis.set_title(branch, fontsize=11, color=BRANCH_COLOURS[branch])
    axis.set_ylabel(f"{'rate' if constraint.quantity == RATE else 'sufficiency'}, {unit}", fontsize=9)
    axis.legend(fontsize=8, frameon=False)
