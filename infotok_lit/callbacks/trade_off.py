"""During training: a small part of any benchmark against the model as it was before; a warning when a task falls."""

import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from infotok_lit.callbacks.history import RunResult
from infotok_lit.callbacks.throughput import not_training
from infotok_lit.callbacks.weight_average import as_validated
from infotok_lit.errors import SettingsError
from infotok_lit.evaluation.benchmark import Benchmark, Grader, Rules
from infotok_lit.evaluation.catalogue import Options, check_names, make_benchmarks, told_of_rules
from infotok_lit.evaluation.endpoint import Endpoint, JudgeError
from infotok_lit.evaluation.judge import JudgeGrader
from infotok_lit.evaluation.models import OwnModel
from infotok_lit.evaluation.records import Row
from infotok_lit.evaluation.results import change
from infotok_lit.evaluation.running import Evaluation, World
from infotok_lit.inference import InferenceModel
from infotok_lit.modules.run_callbacks import run_folder
from infotok_lit.seeding import isolated_rng

JUDGE_TRIES = 3
"""How often a judge is asked for a verdict while training waits."""


class PatientGrader:
    """A grader whose failures are told and not raised: what it did not judge has no verdict."""

    def __init__(self, grader: Grader) -> None:
        self.grader, self.name, self.batch_size = grader, grader.name, grader.batch_size

    def verdicts(self, rows: Sequence[Row], folder: Path) -> Iterator[Row]:
        """The verdicts that come."""
        try:
            yield from self.grader.verdicts(rows, folder)
        except JudgeError as error:
            warnings.warn(f"TradeOff: some of {len(rows)} rows have no verdict: {error}", stacklevel=2)

    def facts(self, verdicts: Sequence[Row]) -> dict[str, Any]:
        """What they cost."""
        return self.grader.facts(verdicts)


class TradeOff(pl.Callback):
    """Runs a part of some benchmarks before training and every so many steps, and compares; in `validate`, once.

    Logged: `benchmark/<name>/<score>`, for every score of `evaluate`, and `benchmark/<name>/<score>_change` since step
    0. A headline score that has fallen by more than `errors` standard errors of the change is warned about in words,
    with what has risen meanwhile: fine-tuning easily trades one task for the other. The same prompts, seeds and
    questions are used each time, so that the error is that of the change, not of two scores. Beside a WeightAverage the
    average is measured, as in validation; listed before it, the one before the step's update.

    What was made stays below the run folder, in `benchmarks/step_*`, or is thrown away where a run has none. `ablate`
    takes the logged names as metrics.

    Args:
        benchmarks: names as for `evaluate`; the default is both tasks on Scenes.
        data: the folder with the benchmarks' own files.
        every_n_steps: optimiser steps between two comparisons; the last step is always compared.
        limit: at most so many prompts or images of each benchmark, evenly spread; null for all.
        batch_size: images or questions at a time.
        rules: how answers are read, as for `evaluate`.
        detector: GenEval's two models, as for `evaluate`; classifier likewise. Without them it is left out of scores.
        judge: URL of an OpenAI-compatible endpoint, .../v1, for the benchmarks that have a judge; without it they are
            left out of scores. Where it fails, that is said, training goes on, and those images have no score.
        judge_model: the judge's name there.
        judge_key: the environment variable that holds its key.
        errors: how many standard errors are a fall.
    """

    def __init__(
        self,
        benchmarks: tuple[str, ...] = ("scenes32",),
        data: str | None = None,
        every_n_steps: int = 500,
        limit: int | None = 64,
        batch_size: int = 16,
        rules: Rules = "official",
        detector: str | None = None,
        classifier: str | None = None,
        judge: str | None = None,
        judge_model: str | None = None,
        judge_key: str = "OPENAI_API_KEY",
        errors: float = 2.0,
    ) -> None:
        if every_n_steps < 1 or batch_size < 1 or (limit is not None and limit < 2):
            raise SettingsError("TradeOff: every_n_steps and batch_size must be 1 or more, and limit 2 or more")
        folders = {"data": data, "detector": detector, "classifier": classifier}
        given = {name: Path(folder) for name, folder in folders.items() if folder is not None}
        if judge is not None and judge_model is None:
            raise SettingsError("TradeOff: say which model judges there: judge_model")
        endpoint = None if judge is None else Endpoint(judge, judge_model, judge_key, tries=JUDGE_TRIES)
        self.names, self.options = tuple(benchmarks), Options(**given, rules=rules, endpoint=endpoint)
        check_names(self.names)
        self.benchmarks: list[Benchmark] = []
        self.every_n_steps, self.limit, self.batch_size, self.errors = every_n_steps, limit, batch_size, errors
        self.before: dict[str, list[Row]] = {}
        self._measured = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the benchmarks; SettingsError for a strategy under which no process has the whole model."""
        if isinstance(trainer.strategy, pl.strategies.FSDPStrategy | pl.strategies.ModelParallelStrategy):
            raise SettingsError("TradeOff: the processes work apart, which a sharded model does not allow: use DDP")
        self.benchmarks = make_benchmarks(self.names, self.options, self.limit)
        for line in told_of_rules(self.benchmarks, self.options.rules):
            rank_zero_info(f"TradeOff: {line}")
        for benchmark in self.benchmarks:
            if isinstance(benchmark.grader, JudgeGrader):
                benchmark.grader = PatientGrader(benchmark.grader)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the model as it is before the first step."""
        if not self.before:
            self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, if it is time."""
        step = trainer.global_step
        if step != self._measured and (step % self.every_n_steps == 0 or step == trainer.max_steps):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the last step of a run that epochs, a time or a callback ended."""
        if trainer.global_step != self._measured:
            self._measure(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure a model that is validated and not trained."""
        if trainer.state.fn == "validate":
            self.before = {}
            self._measure(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The answers and scores before training."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the model before the run."""
        self.before = state_dict["before"]

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measured = trainer.global_step
        root = run_folder(trainer)
        with not_training(trainer), as_validated(trainer, pl_module), tempfile.TemporaryDirectory() as unwanted:
            folder = Path(trainer.strategy.broadcast(unwanted) if root is None else root)
            folder = folder / "benchmarks" / f"step_{trainer.global_step:07d}"
            if trainer.is_global_zero:
                # An earlier run in this folder was of other weights: its answers are not this one's. Nobody writes
                # before all have come to `run.open`.
                for earlier in (folder / benchmark.name for benchmark in self.benchmarks):
                    if earlier.exists():
                        shutil.rmtree(earlier)
            graded = {
                benchmark.name: self._rows(trainer, pl_module, benchmark, folder) for benchmark in self.benchmarks
            }
        if not self.before:
            self.before = graded
        fallen, risen, logged = [], [], {}
        for benchmark in self.benchmarks:
            rows = graded[benchmark.name]
            scores = {name: score.value for name, score in benchmark.scores(rows).items()}
            changes = change(benchmark, self.before[benchmark.name], rows)
            told = scores | {f"{name}_change": one.value for name, one in changes.items()}
            logged |= {f"benchmark/{benchmark.name}/{name}": value for name, value in told.items()}
            for name in benchmark.headlines:
                if name in changes and abs(changes[name].value) > self.errors * (changes[name].error or 0.0):
                    said = f"{benchmark.name} {name} {changes[name].value:+.3f} to {scores[name]:.3f}"
                    said += "" if changes[name].error is None else f" (± {changes[name].error:.3f})"
                    (risen if changes[name].value > 0 else fallen).append(said)
        self._log(trainer, logged)
        if fallen:
            rank_zero_warn(_warning(trainer.global_step, fallen, risen))
        elif risen:
            rank_zero_info(f"step {trainer.global_step}: {'; '.join(risen)} since step 0, and nothing has fallen.")

    def _rows(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, benchmark: Benchmark, folder: Path
    ) -> list[Row]:
        """Graded rows of the model as it is now."""
        training = pl_module.training
        pl_module.eval()
        world = World(trainer.global_rank, trainer.world_size)
        context = trainer.precision_plugin.val_step_context()
        try:
            with pl_module.plain_base() as base, context, isolated_rng(0, pl_module.device):
                model = OwnModel(InferenceModel(base), f"step {trainer.global_step}", None)
                run = Evaluation(
                    model, benchmark, folder / benchmark.name, batch_size=self.batch_size, limit=self.limit, world=world
                )
                run.open()
                return run.graded()
        finally:
            pl_module.train(training)

    def _log(self, trainer: pl.Trainer, values: Mapping[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), trainer.global_step)
        for callback in trainer.callbacks:
            if isinstance(callback, RunResult):
                # Where studies look for a run's numbers.
                callback.benchmarks.record(trainer.global_step, values)


def _warning(step: int, fallen: list[str], risen: list[str]) -> str:
    meanwhile = f" Meanwhile {'; '.join(risen)}: one task is paid for with the other." if risen else ""
    return (
        f"step {step}: a task has become worse since step 0: {'; '.join(fallen)}.{meanwhile} Ways to keep it: a lower "
        "optimiser.lr, a higher weight of that task in model.task_weights, data of that task that looks like what the "
        "model was trained on, fewer trained parts (model.freeze) or adapters (model.lora). Or stop at an earlier "
        "checkpoint."
    )
