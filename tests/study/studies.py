"""Small studies whose runs are stand-ins, with known results."""

import json
import multiprocessing
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from infotok_lit.study.cells import row_cells
from infotok_lit.study.config import Metric, Row, Study
from infotok_lit.study.launch import Resources
from infotok_lit.study.record import read_record
from infotok_lit.study.run import run_study

FORK = multiprocessing.get_context("fork")
STAND_IN = Path(__file__).with_name("stand_in.py")
STEPS = 4
METRICS = {
    "answers": Metric("val/understanding/answers/overall"),
    "loss": Metric("val/generation/loss", better="lower"),
    "rate": Metric("val/understanding/rate", better="none", optional=True),
}


@dataclass
class Bench:
    """A folder with prepared results, and the command that plays `fit` with them."""

    home: Path

    @property
    def prefix(self) -> tuple[str, ...]:
        return (sys.executable, "-S", str(STAND_IN), str(self.home))

    def study(self, variants: list[str], seeds: tuple[int, ...] = (0, 1), **settings) -> Study:
        """A study with a row per variant; what they log is prepared, and `plain` only validates."""
        for variant in variants:
            for seed in seeds:
                self.prepare(variant, seed)
        config = self.home / "base.yaml"
        if not config.exists():
            config.write_text(yaml.safe_dump({"model": {"lr": 0.1}}))
        rows = {name: Row(overrides={"stub.variant": name}, train=name != "plain") for name in variants}
        given = {"configs": [str(config)], "metrics": METRICS, "steps": STEPS, "rows": rows, "seeds": list(seeds)}
        return Study(name="test", out=str(self.home / "out"), **given | settings)

    def prepare(self, variant: str, seed: int, values: dict[str, float] | None = None) -> None:
        """What the run of a variant with a seed will have measured."""
        values = known_values(variant, seed) if values is None else values
        folder = self.home / "results"
        folder.mkdir(exist_ok=True)
        content = result({0: {tag: value + 1 for tag, value in values.items()}, STEPS: values})
        if variant == "plain":
            content = result({0: values})
        (folder / f"{variant}-{seed}.json").write_text(json.dumps(content))

    def run(self, study: Study, workers: int = 1, **resources) -> bool:
        return run_study(study, Resources(workers, **resources), self.prefix)

    def notes(self) -> list[list[str]]:
        """What the stand-ins noted: [start, folder, pid, fresh or resumed, threads], [end, folder, pid]."""
        path = self.home / "notes"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def starts(self) -> Counter:
        """How often each cell was started, by its folder below the study's, without the digest."""
        return Counter(self.cell(note[1]) for note in self.notes() if note[0] == "start")

    def cell(self, run: str) -> tuple[str, int]:
        """(variant, seed) of a run folder."""
        variant, seed = Path(run).parts[-3:-1]
        return variant.rpartition("-")[0] or variant, int(seed.removeprefix("seed_"))

    def overlaps(self) -> bool:
        """Whether some cell was ever run by two at once."""
        running: set[str] = set()
        for note in self.notes():
            if note[0] == "start":
                if note[1] in running:
                    return True
                running.add(note[1])
            else:
                running.discard(note[1])
        return False


def known_values(variant: str, seed: int) -> dict[str, float]:
    """Some values for each metric, different for each variant and seed."""
    rng = np.random.default_rng([seed, *variant.encode()])
    values = {metric.tag: float(rng.normal()) for metric in METRICS.values()}
    if variant == "plain":
        del values[METRICS["rate"].tag]
    return values


def result(validations: dict[int, dict[str, float]]) -> dict:
    """What `result.json` holds of a finished run with these validations."""
    return {
        "state": "finished",
        "reason": "",
        "step": max(validations),
        "seconds": 1.0,
        "versions": {"torch": "2.0", "optuna": "5.0"},
        "training": [{"step": 2, "train/understanding/loss": 0.5}, {"step": 4, "train/understanding/loss": 0.25}],
        "validation": [{"step": step, **metrics} for step, metrics in validations.items()],
    }


def wait_until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def start(bench: Bench, study: Study, workers: int = 1) -> multiprocessing.Process:
    """Another call of `ablate` on the same study."""
    process = FORK.Process(target=_run_interruptible, args=(bench, study, workers), daemon=True)
    process.start()
    return process


def _run_interruptible(bench: Bench, study: Study, workers: int) -> None:
    # A shell that starts the tests in the background has them ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    bench.run(study, workers)


def states(study: Study) -> dict[tuple[str, int], str]:
    return {(cell.variant, cell.seed): read_record(cell.folder).state for cell in row_cells(study)}
