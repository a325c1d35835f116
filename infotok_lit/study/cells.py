"""From a study to its runs: which `fit` commands there are, and where each leaves its files.

A variant's folder carries a digest of everything that decides its results but the seed, so that a changed configuration
is another variant, and runs of different configurations are never mixed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infotok_lit.assets import DEFAULTS_CONFIG, config_chain
from infotok_lit.errors import SettingsError
from infotok_lit.study.config import Row, Study

RUN_FOLDER = "run"
"""Below a cell's folder: what `fit` itself writes."""
DIGEST_LENGTH = 8
CELL_FORMAT = 2
"""Part of the digest: runs of a version that left no `result.json` are other cells, and their folders stay."""


@dataclass(frozen=True)
class Cell:
    """One run of `fit` or `validate`.

    Args:
        key: Its folder below the study's.
        variant: The row's name, or the point's.
        seed: Its seed.
        folder: Its folder.
        arguments: The command line after `python -m infotok_lit`.
        last_step: The optimiser steps that it has taken at its last validation.
    """

    key: str
    variant: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    last_step: int

    @property
    def label(self) -> str:
        """What a person calls it."""
        return f"{self.variant}, seed {self.seed}"

    @property
    def run_folder(self) -> Path:
        """Where `fit` writes."""
        return self.folder / RUN_FOLDER


@dataclass(frozen=True)
class Job:
    """What one Optuna trial stands for: a row's cell, or a point of a search with its cells, one per seed.

    Args:
        key: Its folder below the study's, by which Optuna's trials name it.
        cells: What it runs, one after the other.
        params: The point, by dimension; None for a row.
    """

    key: str
    cells: tuple[Cell, ...]
    params: Mapping[str, Any] | None = None


def row_cells(study: Study) -> list[Cell]:
    """The cells of the rows, seed by seed, so that an early look compares rows and not one row's seeds."""
    cells = [
        cell
        for name, row in study.rows.items()
        for cell in make_cells(study, f"rows/{name}-{digest(study, row)}", name, row, study.seeds_of(name))
    ]
    return sorted(cells, key=lambda cell: study.all_seeds.index(cell.seed))


def point_job(study: Study, params: Mapping[str, Any]) -> Job:
    """The job of a point of the search: all of its seeds."""
    row = point_row(study, params)
    name = digest(study, row)
    key = f"points/{name}"
    return Job(key, make_cells(study, key, f"point {name}", row, study.seeds), params)


def point_row(study: Study, params: Mapping[str, Any]) -> Row:
    """What a point lays over the study's configuration."""
    start, configs, overrides = study.search.row, [], {}
    for name, dimension in study.search.space.items():
        chosen = dimension.row(name, params[name])
        configs += chosen.configs
        overrides |= chosen.overrides
    return Row([*start.configs, *configs], {**start.overrides, **overrides}, start.train)


def make_cells(study: Study, variant_key: str, variant: str, row: Row, seeds: Sequence[int]) -> tuple[Cell, ...]:
    """The cells of a variant, one per seed."""
    common, cells = _common_arguments(study, row), []
    for seed in seeds:
        key = f"{variant_key}/seed_{seed}"
        folder = Path(study.out, key)
        arguments = (*common, *(_option(name, seed) for name in study.seeded), _logger(folder))
        cells.append(Cell(key, variant, seed, folder, arguments, last_step=study.steps if row.train else 0))
    return tuple(cells)


def digest(study: Study, row: Row) -> str:
    """Some hexadecimal digits that stand for everything that decides a variant's results, but for the seed.

    Raises:
        MissingFileError: for a configuration file that does not exist.
        SettingsError: for one that is no YAML.
    """
    files = config_chain(_configs(study, row))
    contents = [_read(path) for path in [DEFAULTS_CONFIG, *files]]
    arguments = [argument for argument in _common_arguments(study, row) if argument not in _configs(study, row)]
    what = json.dumps([CELL_FORMAT, contents, arguments, study.seeded], sort_keys=True, default=str)
    return hashlib.sha256(what.encode()).hexdigest()[:DIGEST_LENGTH]


def _common_arguments(study: Study, row: Row) -> list[str]:
    configs = [part for path in _configs(study, row) for part in ("--config", path)]
    budget = {
        "trainer.max_steps": study.steps,
        # Lightning counts batches here, and steps there.
        "trainer.val_check_interval": study.validation_interval * _batches_per_step(study, row),
    }
    overrides = budget | study.overrides | row.overrides
    return ["fit" if row.train else "validate", *configs, *(_option(*item) for item in overrides.items())]


def _batches_per_step(study: Study, row: Row) -> int:
    """How many batches a step accumulates; 1 for what is no number, which `fit` refuses."""
    found: Any = 1
    for path in config_chain(_configs(study, row)):
        content = _read(path)
        trainer = content.get("trainer") if isinstance(content, dict) else None
        if isinstance(trainer, dict):
            found = trainer.get("accumulate_grad_batches", found)
    found = (study.overrides | row.overrides).get("trainer.accumulate_grad_batches", found)
    return found if isinstance(found, int) else 1


def _configs(study: Study, row: Row) -> list[str]:
    return [*study.configs, *row.configs]


def _option(name: str, value: Any) -> str:
    return f"--{name}={value if isinstance(value, str) else json.dumps(value)}"


def _logger(folder: Path) -> str:
    # Whatever the configuration logs to: each run has a folder of its own, where `fit` leaves its result.json.
    init_args = {"save_dir": str(folder / RUN_FOLDER), "name": "", "version": ""}
    return _option(
        "trainer.logger", {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": init_args}
    )


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} cannot be read as a configuration: {error}") from None
