"""What a study is made of, in primitives: the signature of these classes is the command line and its help."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from infotok_lit.errors import SettingsError
from infotok_lit.evaluation.paper import paper_columns, paper_scores

NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")

Setting = None | bool | int | float | list | dict | str
"""A value of `fit`, handed on as it is written: with `Any` jsonargparse would build what names a class_path."""


@dataclass(frozen=True)
class Row:
    """One variant: what is laid over the study's own configuration.

    Args:
        configs: Configuration files laid over those of the study, in this order.
        overrides: Dotted names of `fit` with their values, such as `model.init_args.objective.temperature: 0.1`.
        train: False measures the model as it is, with `validate` instead of `fit`.
        seeds: Seeds of this row alone, such as `[0]` for a control; null takes those of the study.
        control_of: A row that this one must equal in every judged metric; the report says whether it does.
        paper: Which of the paper's models it repeats, such as `Harmon/finetune`; its numbers stand in the report.
    """

    configs: list[str] = field(default_factory=list)
    overrides: dict[str, Setting] = field(default_factory=dict)
    train: bool = True
    seeds: list[int] | None = None
    control_of: str | None = None
    paper: str | None = None

    def __post_init__(self) -> None:
        if self.paper is not None:
            paper_scores(self.paper)
        if self.seeds is not None and not self.seeds:
            raise SettingsError("seeds of a row is empty; leave it out, or name at least one")
        _check_seeds(self.seeds or [])


@dataclass(frozen=True)
class Metric:
    """A column of the table.

    Args:
        tag: Name under which the runs log it, such as `val/understanding/answers/overall`; the last value counts.
        better: Whether more is better, less, or neither (`none`: reported, not judged).
        optional: True where some rows have no such number, such as a rate without compactness. A run that lacks any
            other metric has failed.
        paper: The column of the paper's tables that it repeats, such as `GenEval/overall`.
    """

    tag: str
    better: Literal["higher", "lower", "none"] = "higher"
    optional: bool = False
    paper: str | None = None

    def __post_init__(self) -> None:
        if self.paper is not None and self.paper not in paper_columns():
            raise SettingsError(f"the paper has no column {self.paper}; it has {', '.join(sorted(paper_columns()))}")


@dataclass(frozen=True)
class Dimension:
    """One dimension of a search space: a range, or choices of the setting that names it, or named variants.

    Args:
        low: Lower end of a range.
        high: Upper end of a range, included.
        log: Sample the range on a logarithmic scale.
        integer: The range holds whole numbers only.
        choices: Values to choose from: numbers, words, booleans or null.
        variants: Named variants to choose from, each a set of overlays and overrides; for settings that belong
            together, such as a schedule and its length. The name of the dimension then is a label.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    integer: bool = False
    choices: list[Setting] | None = None
    variants: dict[str, Row] | None = None

    def __post_init__(self) -> None:
        ranged = self.low is not None or self.high is not None
        if sum((ranged, self.choices is not None, self.variants is not None)) != 1:
            raise SettingsError("a dimension needs exactly one of: low and high, choices, variants")
        if ranged and (self.low is None or self.high is None or not self.low < self.high):
            raise SettingsError(f"a range needs low < high, got low {self.low} and high {self.high}")
        if self.log and not (ranged and self.low > 0):
            raise SettingsError("log needs a range with low above 0")
        if self.integer and not (ranged and self.low == int(self.low) and self.high == int(self.high)):
            raise SettingsError("integer needs a range with whole ends")
        if not ranged and not (self.choices or self.variants):
            raise SettingsError("choices and variants must not be empty")
        if any(not isinstance(choice, bool | int | float | str | None) for choice in self.choices or []):
            raise SettingsError(f"choices must be numbers, words, booleans or null, got {self.choices}; use variants")

    @property
    def options(self) -> list[Any] | None:
        """The values that Optuna chooses from; None for a range."""
        return list(self.variants) if self.variants is not None else self.choices

    def holds(self, value: Any) -> bool:
        """Whether a value is one of this dimension."""
        return value in self.options if self.options is not None else self.low <= value <= self.high

    def row(self, name: str, value: Any) -> Row:
        """What a value of this dimension, which is called `name`, does to a run."""
        return self.variants[value] if self.variants is not None else Row(overrides={name: value})


@dataclass(frozen=True)
class Search:
    """A sweep: points of a search space, each measured on every seed of the study.

    Args:
        space: Dimension by name: the dotted name of a setting of `fit`, or a label if it has variants.
        objectives: Names of the metrics that the front is about, usually understanding and generation.
        sampler: `grid` (all combinations of choices), `random`, or the multi-objective `tpe` and `nsga2`, which learn
            from the points that are done.
        trials: How many points; null, for `grid` only, means all of them. One that is chosen twice is measured once.
        seed: Seed of the sampler; with several workers, what it chooses also depends on who is first.
        row: What every point starts from, beside the study's own configuration.
    """

    space: dict[str, Dimension]
    objectives: list[str]
    sampler: Literal["grid", "random", "tpe", "nsga2"] = "tpe"
    trials: int | None = None
    seed: int = 0
    row: Row = field(default_factory=Row)

    def __post_init__(self) -> None:
        if not self.space or not self.objectives:
            empty = "objectives" if self.space else "space"
            raise SettingsError(f"search.{empty} is empty; name at least one")
        if self.sampler == "grid":
            ranges = [name for name, dimension in self.space.items() if dimension.options is None]
            if ranges:
                raise SettingsError(f"search.sampler is grid: give choices instead of a range for {', '.join(ranges)}")
        elif self.trials is None:
            raise SettingsError(f"search.sampler is {self.sampler}: say how many points with search.trials")
        if self.trials is not None and self.trials < 1:
            raise SettingsError(f"search.trials is {self.trials}; set it to 1 or more")


@dataclass(frozen=True)
class Analysis:
    """What a study was set up to decide, said before it runs.

    Args:
        endpoint: Metrics whose mean is what counts, such as one of each task; all better higher, or all better lower.
        contrasts: Pairs of rows, each [row, reference]: is the row's endpoint different from the reference's?
        margin: Differences below this are as good as none: the margin of the equivalence tests, in the endpoint's unit.
        level: How often each family of tests may be wrong. Tests of difference are corrected by Holm's method.
        power: How surely the reported number of seeds should decide what is undecided.
    """

    endpoint: list[str]
    contrasts: list[tuple[str, str]]
    margin: float = 0.02
    level: float = 0.05
    power: float = 0.8

    def __post_init__(self) -> None:
        if not self.endpoint or not self.contrasts:
            raise SettingsError("analysis: name at least one metric in endpoint and one pair of rows in contrasts")
        if any(len(set(pair)) != 2 for pair in self.contrasts):
            raise SettingsError(f"analysis.contrasts: a row cannot be compared with itself: {self.contrasts}")
        if self.margin <= 0 or not 0 < self.level < 0.5 or not self.level < self.power < 1:
            raise SettingsError("analysis needs margin > 0 and 0 < level < 0.5, and level < power < 1")


@dataclass(frozen=True)
class Study:
    """A study: rows (variants) times seeds, and optionally a search, all with the same data and steps.

    Args:
        name: Name of the study in Optuna's storage.
        out: Folder of everything that the study leaves. Machines that share a study share this folder.
        configs: Configurations of every run, as for `fit --config`: names such as `harmon/scenes32`, or files, whose
            paths are as seen from the working folder.
        metrics: Columns of the table, by name.
        rows: Variants by name, in the table's order.
        seeds: Every row runs once with each.
        steps: Optimiser steps of every run (`trainer.max_steps`).
        validate_every: Optimiser steps between validations; must divide `steps`; null validates once, at the end.
        overrides: Dotted names of `fit` with their values, for every run.
        seeded: Dotted names of `fit` that take the seed of a run.
        references: Rows that the others are compared with, seed by seed; null takes the first row.
        curves: What the learning curves show besides the metrics: tags that the runs log.
        confidence: Level of the confidence intervals.
        analysis: What the study is to decide: endpoint, pairs of rows, equivalence margin.
        search: A sweep, beside the rows or instead of them.
        storage: Optuna's storage, a database URL such as `postgresql://host/name` for several machines; null keeps
            `study.db` (SQLite) in `out`, for one machine.
        keep_checkpoints: False deletes a run's checkpoints when it has finished; exports stay.
    """

    name: str
    out: str
    configs: list[str]
    metrics: dict[str, Metric]
    steps: int
    rows: dict[str, Row] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    validate_every: int | None = None
    overrides: dict[str, Setting] = field(default_factory=dict)
    seeded: list[str] = field(default_factory=lambda: ["seed_everything", "data.init_args.seed"])
    references: list[str] | None = None
    curves: list[str] = field(default_factory=lambda: ["train/understanding/loss", "train/generation/loss"])
    confidence: float = 0.95
    analysis: Analysis | None = None
    search: Search | None = None
    storage: str | None = None
    keep_checkpoints: bool = True

    def __post_init__(self) -> None:
        if not self.rows and self.search is None:
            raise SettingsError("nothing to run: give rows, or a search")
        if not self.metrics or not self.seeds:
            raise SettingsError("give at least one of metrics and one of seeds")
        _check_seeds(self.seeds)
        if self.steps < 1:
            raise SettingsError(f"steps is {self.steps}; set it to 1 or more")
        if self.validation_interval < 1 or self.steps % self.validation_interval:
            raise SettingsError(f"validate_every is {self.validate_every}; it must divide steps, {self.steps}")
        if not 0 < self.confidence < 1:
            raise SettingsError(f"confidence is {self.confidence}; set it between 0 and 1")
        if self.storage is not None and "://" not in self.storage:
            raise SettingsError(
                f"storage: {self.storage} is no database URL, and journal files are not used any more; leave storage "
                "out for a database in `out`, or give a URL such as postgresql://host/name"
            )
        if not self.objectives:
            raise SettingsError("every metric is optional; a finished run needs one that it must have measured")
        self._check_names()
        self._check_overrides()

    def _check_names(self) -> None:
        """Refuse names of rows and metrics that nothing has, and metrics that cannot be what they are used for."""
        for name, row in self.rows.items():
            if set(name) - NAME_CHARACTERS or not name.strip("."):
                raise SettingsError(f"row {name!r}: a name becomes a folder; use letters, digits, and any of _ . -")
            _check_known(f"rows.{name}.control_of", [row.control_of] if row.control_of else [], self.rows)
            if row.control_of == name:
                raise SettingsError(f"rows.{name}.control_of: a row always equals itself; name another row")
        _check_known("references", self.references or [], self.rows)
        if self.search is not None:
            self._check_judged("search.objectives", self.search.objectives)
            if self.search.row.seeds is not None or self.search.row.control_of is not None:
                raise SettingsError("search.row: seeds and control_of belong to rows of the study")
        if self.analysis is not None:
            self._check_judged("analysis.endpoint", self.analysis.endpoint)
            _check_known("analysis.contrasts", [row for pair in self.analysis.contrasts for row in pair], self.rows)
            if len({self.metrics[name].better for name in self.analysis.endpoint}) > 1:
                raise SettingsError("analysis.endpoint: a mean needs metrics that are all better higher, or all lower")

    def _check_overrides(self) -> None:
        """Refuse settings that the study itself sets: they would change what is measured, or nothing at all."""
        for what, names in self._overridden():
            if "trainer" in names:
                raise SettingsError(
                    f"{what}: trainer cannot be set whole; set what it holds, as trainer.precision: 16-mixed"
                )
            if "trainer.max_steps" in names:
                raise SettingsError(
                    f"{what}: trainer.max_steps cannot be set there, as all runs are measured after `steps` of the "
                    "study; set that, or make it another study"
                )
            if any(name.split(".")[:2] == ["trainer", "logger"] for name in names):
                raise SettingsError(
                    f"{what}: trainer.logger cannot be set there, as each run logs into its own folder below `out`, "
                    "from where the report reads it; leave it out"
                )
            for name in self.seeded:
                if name in names:
                    raise SettingsError(f"{what}: {name} takes the seed of each run; take it out of `seeded` to set it")

    def _overridden(self) -> Iterator[tuple[str, Collection[str]]]:
        """Where the study sets dotted names of `fit`, and which."""
        yield "overrides", self.overrides
        for name, row in self.rows.items():
            yield f"rows.{name}.overrides", row.overrides
        if self.search is not None:
            yield "search.row.overrides", self.search.row.overrides
            yield "search.space", [name for name, one in self.search.space.items() if one.variants is None]
            for name, dimension in self.search.space.items():
                for variant, row in (dimension.variants or {}).items():
                    yield f"search.space.{name}.variants.{variant}.overrides", row.overrides

    def _check_judged(self, what: str, names: list[str]) -> None:
        _check_known(what, names, self.metrics)
        for name in names:
            if self.metrics[name].better == "none" or self.metrics[name].optional:
                raise SettingsError(f"{what}: {name} must be better higher or lower, and not optional")

    @property
    def validation_interval(self) -> int:
        """Optimiser steps between validations."""
        return self.steps if self.validate_every is None else self.validate_every

    @property
    def compared_with(self) -> list[str]:
        """The rows that the others are compared with."""
        return list(self.rows)[:1] if self.references is None else self.references

    @property
    def objectives(self) -> list[str]:
        """What Optuna is told of a run: the search's objectives, or else every metric that a run must have."""
        if self.search is not None:
            return self.search.objectives
        return [name for name, metric in self.metrics.items() if not metric.optional]

    @property
    def all_seeds(self) -> list[int]:
        """The study's seeds, then those that only some rows have."""
        return list(dict.fromkeys([*self.seeds, *(seed for row in self.rows.values() for seed in row.seeds or [])]))

    def seeds_of(self, row: str) -> list[int]:
        """The seeds of a row."""
        own = self.rows[row].seeds
        return self.seeds if own is None else own


def _check_seeds(seeds: list[int]) -> None:
    if len(set(seeds)) < len(seeds) or min(seeds, default=0) < 0:
        raise SettingsError(f"seeds must be different and not negative, got {seeds}")


def _check_known(what: str, given: list[str], known: Mapping[str, object]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise SettingsError(f"{what}: {', '.join(unknown)} is not one of {', '.join(known) or 'none'}")
