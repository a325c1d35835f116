"""The information plane: what the tokens cost against what they are worth, over training."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from PIL.Image import Image

from infotok_lit.batch import BRANCHES, Batch, Branch, UnderstandingBatch
from infotok_lit.callbacks.figures import BRANCH_COLOURS, GREY, log_axis, panels, publish, rendered
from infotok_lit.callbacks.generated_images import scenes_of, training_scenes
from infotok_lit.callbacks.history import MetricHistory, is_partial
from infotok_lit.errors import SettingsError
from infotok_lit.modules.run_callbacks import logs_now
from infotok_lit.objective.distributed import global_sum
from infotok_lit.scenes import Scenes
from infotok_lit.scenes.prior import answer_bits, answer_entropy_bits
from infotok_lit.scenes.spec import SPECS, SpecName

Unit = Literal["token", "image"]


@dataclass(frozen=True)
class Relevance:
    """One way to measure what tokens are worth."""

    report: str
    """Name of the number in the objective's report (or `loss`), in nats; the relevance is its `sign` times it."""
    sign: int
    axis: str

    def bits(self, nats: np.ndarray) -> np.ndarray:
        """Nats as reported -> bits of relevance."""
        return self.sign * nats / math.log(2)


ALIGNMENT = Relevance("alignment_bound_nats", 1, "log K \u2212 A, bits per image\nlower bound on I(Z\u0303; T)")
SUFFICIENCY = Relevance(
    "sufficiency_nats_per_image", -1, "\u2212S, bits per image\nI(Z\u0303; Y) \u2212 H(Y), at least"
)
OWN_LOSS = Relevance("loss", -1, "\u2212 the model's own loss")
MEASURES = (ALIGNMENT, SUFFICIENCY)
ANSWER_ENTROPY = "answer_entropy_bits"


class InformationPlane(pl.Callback):
    """At each validation, draws rate against relevance of both branches, from the first step to now.

    The rate is an upper bound on I(Z~; I). The relevance is the bound that there is: log K - A with alignment; with
    sufficiency H(Y) - S where H(Y) is known, and else -S; without either, minus the model's own loss, which is what an
    inline bottleneck pays its rate for. The numbers are part of the checkpoint, so a resumed run goes on drawing.

    Args:
        unit: Whether the rate is shown per token or per image.
        scenes: The family of Scenes that validation asks about, whose answers' entropy is known; None for other data.
            Default: what understanding is validated on says.
    """

    def __init__(self, unit: Unit = "token", scenes: SpecName | Literal["auto"] | None = "auto") -> None:
        if unit not in ("token", "image"):
            raise SettingsError(f"InformationPlane: unit must be token or image, not {unit!r}")
        if scenes not in (None, "auto", *SPECS):
            raise SettingsError(f"InformationPlane: scenes must be one of {tuple(SPECS)}, not {scenes!r}")
        self.unit = unit
        self.asked = scenes
        self.scenes = None if scenes == "auto" else scenes
        self.training = MetricHistory()
        self.validation = MetricHistory()
        self._trained_on: Scenes | None = None
        self._answers: list[float | None] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out whose answers' entropy is known."""
        if self.asked == "auto":
            self.scenes = scenes_of(trainer, "understanding")
        self._trained_on = training_scenes(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember what the step logged."""
        if logs_now(trainer):
            source = None if self.scenes is None else self._trained_on
            # Those of the family as it is, for texture and jitter change no answer.
            known = None if source is None else answer_entropy_bits(SPECS[source.name], source.question_kinds)
            self._record(self.training, trainer, "train", known)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last validation's answers."""
        self._answers = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure how uncertain the answers are."""
        if isinstance(batch, UnderstandingBatch) and self.scenes is not None:
            spec = SPECS[self.scenes]
            pairs = zip(batch.questions, batch.answers, strict=True)
            self._answers += [answer_bits(question, answer, spec) for question, answer in pairs]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember what a whole validation logged, and draw."""
        if is_partial(trainer):
            return
        self._record(self.validation, trainer, "val", self._answer_entropy(pl_module.device))
        if self._shown():
            publish(trainer, "val/information_plane", self.draw)

    def state_dict(self) -> dict[str, Any]:
        """The numbers, in primitives."""
        return {"training": self.training.rows, "validation": self.validation.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the numbers of the run."""
        self.training.rows, self.validation.rows = state_dict["training"], state_dict["validation"]

    def points(self, history: MetricHistory, split: str, branch: Branch, measure: Relevance) -> np.ndarray:
        """(3, points): steps, rates in bits per `unit`, relevances in bits."""
        rate = f"{split}/{branch}/rate_bits_per_{self.unit}"
        names = [rate, f"{split}/{branch}/{measure.report}"]
        absolute = self._is_absolute(branch, measure)
        steps, rates, nats, *entropy = history.series(*names, *([ANSWER_ENTROPY] if absolute else []))
        relevance = measure.bits(np.array(nats)) + (np.array(entropy[0]) if absolute else 0.0)
        return np.array([steps, rates, relevance])

    def _is_absolute(self, branch: Branch, measure: Relevance) -> bool:
        """Whether H(Y) is known in every validation."""
        known = bool(self.validation.rows) and all(ANSWER_ENTROPY in row for row in self.validation.rows)
        return measure is SUFFICIENCY and branch == "understanding" and known

    def draw(self) -> Image:
        """The picture."""
        shown = self._shown()
        rows = max(len(measures) for measures in shown.values())
        figure, axes = panels(
            rows, len(shown), "Information plane: what the shared tokens cost, and what they are worth"
        )
        steps = [row["step"] for history in (self.training, self.validation) for row in history.rows]
        colours = ScalarMappable(Normalize(0, max(*steps, 1)), "cividis")
        for column, (branch, measures) in enumerate(shown.items()):
            for row in range(rows):
                if row < len(measures):
                    self._draw_panel(axes[row, column], branch, measures[row], colours)
                else:
                    axes[row, column].set_visible(False)
        figure.colorbar(colours, ax=axes, label="step", shrink=0.8)
        return rendered(figure)

    def _shown(self) -> dict[Branch, list[Relevance]]:
        """What there is to draw of each branch that has a rate."""
        shown = {branch: self._measures(branch) for branch in BRANCHES}
        return {branch: measures for branch, measures in shown.items() if measures}

    def _measures(self, branch: Branch) -> list[Relevance]:
        """What there is to draw of a branch."""

        def there(measure: Relevance) -> bool:
            return any(
                self.points(history, split, branch, measure).size
                for history, split in ((self.training, "train"), (self.validation, "val"))
            )

        return [measure for measure in MEASURES if there(measure)] or [m for m in (OWN_LOSS,) if there(m)]

    def _draw_panel(self, axis: Axes, branch: Branch, measure: Relevance, colours: ScalarMappable) -> None:
        _, trained_rates, trained = self.points(self.training, "train", branch, measure)
        axis.plot(trained_rates, trained, color=GREY, linewidth=0.7, alpha=0.6, label="training batches")
        steps, rates, relevance = self.points(self.validation, "val", branch, measure)
        axis.plot(rates, relevance, color=BRANCH_COLOURS[branch], linewidth=1.4, label="validation")
        axis.scatter(rates, relevance, c=steps, norm=colours.norm, cmap=colours.cmap, edgecolor="white", s=46, zorder=3)
        axis.set_title(branch, fontsize=11, color=BRANCH_COLOURS[branch])
        axis.set_xlabel(f"rate, bits per {self.unit}: upper bound on I(Z\u0303; I)", fontsize=9)
        axis.set_ylabel(self._relevance_axis(branch, measure), fontsize=9)
        axis.legend(fontsize=8, frameon=False)
        all_rates = np.concatenate([rates, trained_rates])
        log_axis(axis, "x", all_rates.min(), all_rates.max())
        # Where 0 means nothing, the first steps lie far below it, and all that matters just above.
        absolute = measure is ALIGNMENT or self._is_absolute(branch, measure)
        if absolute and min(relevance.min(initial=0), trained.min(initial=0)) < -2:
            axis.set_yscale("symlog", linthresh=1)
            axis.yaxis.set_major_formatter("{x:g}")

    def _relevance_axis(self, branch: Branch, measure: Relevance) -> str:
        if measure is OWN_LOSS and branch == "understanding":
            return "\u2212 own loss, bits per answer token"
        if self._is_absolute(branch, measure):
            most = self.validation.rows[-1][ANSWER_ENTROPY]
            return f"H(Y) \u2212 S, bits per image, of {most:.2f}\nlower bound on I(Z\u0303; Y)"
        return measure.axis

    def _answer_entropy(self, device: torch.device) -> float | None:
        """The mean over all processes, which must all ask; None if a question is not of Scenes."""
        known = [bits for bits in self._answers if bits is not None]
        counts = [sum(known), len(known), len(self._answers) - len(known)]
        total, count, unknown = global_sum(torch.tensor(counts, dtype=torch.float32, device=device)).tolist()
        return total / count if count and not unknown else None

    def _record(self, history: MetricHistory, trainer: pl.Trainer, split: str, entropy: float | None) -> None:
        names = [f"rate_bits_per_{unit}" for unit in ("token", "image")] + [
            measure.report for measure in (*MEASURES, OWN_LOSS)
        ]
        reported = [f"{split}/{branch}/{name}" for branch in BRANCHES for name in names]
        history.record_logged(trainer, reported, None if entropy is None else {ANSWER_ENTROPY: entropy})
