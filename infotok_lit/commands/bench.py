"""`bench`: how long training takes, and where its time goes, per term of the objective."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import NonNegativeInt, PositiveInt

from infotok_lit import __version__
from infotok_lit.commands.bench_inference import bench_evaluate, bench_inference
from infotok_lit.commands.bench_reading import bench_reading
from infotok_lit.commands.parsing import run
from infotok_lit.errors import SettingsError, did_you_mean
from infotok_lit.files import check_target, write_json
from infotok_lit.progress import progress_bar
from infotok_lit.tables import Table

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from infotok_lit.callbacks.throughput import StepTime, StepTiming
    from infotok_lit.commands.fit import InfoTokCLI
    from infotok_lit.objective.config import ObjectiveConfig

TERM_SETS = (
    (),
    ("compactness",),
    ("compactness", "sufficiency"),
    ("compactness", "sufficiency", "alignment"),
)
"""Plain fine-tuning, and each term added."""
Result = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """`bench --config FILE ... [overrides] [--steps N]`, or `bench inference`, `bench evaluate`, `bench reading`."""
    kinds = {"reading": bench_reading, "evaluate": bench_evaluate, "inference": bench_inference}
    if (kind := argv[1] if len(argv) > 1 else "") in kinds:
        return run(kinds[kind], [f"bench {kind}", *argv[2:]])
    if kind and not kind.startswith("-"):
        raise SettingsError(f"there is no bench {kind!r} (there are {', '.join(kinds)}){did_you_mean(kind, kinds)}")
    return run(bench, argv)


def bench(
    fit_arguments: list[str],
    steps: PositiveInt = 20,
    warmup: NonNegativeInt = 3,
    rounds: PositiveInt = 3,
    variants: list[str] | None = None,
    out: Path | None = None,
) -> None:
    """Time the training of a configuration, without any term of the objective and with each one added.

    Each variant is a real `fit` of so many steps, with the configuration's callbacks and with logs, in one process on
    one device, without validation, checkpoints and a bar. Steps that log count as often as they come in a long run. The
    variants take turns for some rounds, and ratios are taken round by round, as machines have moods.
    Every option that is not listed here is one of fit's, such as --config FILE; without --config the quickstart is
    timed. `bench inference` times answering and drawing with and without their caches, `bench evaluate`
    what `evaluate` does, and `bench reading` counts what a token budget saves.

    Args:
        fit_arguments: What `fit` is given.
        steps: Optimiser steps that count, in each round.
        warmup: Steps before them.
        rounds: How often each variant has its turn.
        variants: Which of them are timed beside `plain`, such as C&S or C&S&A; default: all.
        out: Also write the numbers to this JSON file.
    """
    check_target(out)
    from infotok_lit.commands.fit import InfoTokCLI
    from infotok_lit.modules.two_steps import quiet_lightning

    configured = ["--trainer.logger=false", "--trainer.devices=1"]
    objective = InfoTokCLI(["fit", *fit_arguments, *configured], run=False).model.objective_config
    refuse_what_needs_terms(objective)
    sets = chosen_sets(objective.terms, variants)
    rounds_of: dict[str, list[Result]] = {name_of(terms): [] for terms in sets}
    circumstances: Result = {}
    with progress_bar(rounds * len(sets)) as bar, quiet_lightning(), TemporaryDirectory() as folder:
        for i in range(rounds):
            for place, terms in enumerate(sets):
                bar.show(i * len(sets) + place, f"round {i + 1}: {name_of(terms)}")
                fit = InfoTokCLI(["fit", *fit_arguments, *_short_fit(steps, warmup, terms, folder)], run=False)
                timing = _with_timing(fit.trainer, warmup)
                fit.start()
                circumstances = circumstances or _circumstances(fit, timing)
                rounds_of[name_of(terms)].append(_measured(fit, timing))
    result = circumstances | {"arguments": fit_arguments, "steps": steps, "warmup": warmup, "rounds": rounds}
    most = circumstances["most_flops"]
    result["variants"] = [{"name": name} | summarise(own, rounds_of["plain"], most) for name, own in rounds_of.items()]
    write_json(out, result)
    table(result).show()


# Training


def refuse_what_needs_terms(objective: "ObjectiveConfig") -> None:
    """SettingsError for settings of an objective that cannot stay where its terms are taken out, saying the mend."""
    bound = {"token_budget": (objective.token_budget, "null"), "shuffled_texts": (objective.shuffled_texts, "false")}
    if found := {name: off for name, (value, off) in bound.items() if value}:
        mend = " ".join(f"--model.init_args.objective.{name} {off}" for name, off in found.items())
        raise SettingsError(
            f"bench also times training without terms, where {' and '.join(found)} cannot be: add {mend}"
        )


def chosen_sets(terms: Sequence[str], variants: Sequence[str] | None) -> list[Sequence[str]]:
    """The sets of terms to time: plain fine-tuning, each term added, and a configuration's own; or those of some names.

    Raises:
        SettingsError: for a name that there is not.
    """
    sets = [*TERM_SETS, *([] if set(terms) in map(set, TERM_SETS) else [tuple(terms)])]
    names = [name_of(terms) for terms in sets]
    unknown = [name for name in variants or () if name not in names]
    if unknown:
        raise SettingsError(f"variants: there is no {', '.join(unknown)}; choose from {', '.join(names)}")
    wanted = names if variants is None else ["plain", *variants]
    return [terms for name, terms in zip(names, sets, strict=True) if name in wanted]


def name_of(terms: Sequence[str]) -> str:
    """The paper's short name of a set of terms, such as C&S, with other terms spelled out; "plain" for none."""
    return "&".join(term[0].upper() if term in TERM_SETS[-1] else term for term in terms) or "plain"


def summarise(own: Sequence[Result], plain: Sequence[Result], most_flops: float | None = None) -> Result:
    """What is reported of a variant: of a typical step, and its rounds' ratios to those of plain fine-tuning.

    Args:
        own: Its rounds, as `_measured` leaves them.
        plain: Those of plain fine-tuning.
        most_flops: What the device can compute in a second, where it is known.
    """
    steps, log_share = [step for each in own for step in each["steps"]], own[0]["log_share"]
    seconds = typical(steps, log_share, "wall")
    phases, ratios = {}, {}
    for kind in ("wall", "cpu"):
        phases[kind] = {phase: typical(steps, log_share, kind, phase) for phase in steps[0].wall}
        taken, plainly = ([typical(each["steps"], log_share, kind) for each in rounds] for rounds in (own, plain))
        ratios[kind] = [one / other for one, other in zip(taken, plainly, strict=True)]
    peaks = [each["peak_bytes"] for each in own]
    return {
        "head_parameters": own[0]["head_parameters"],
        "step_seconds": seconds,
        "step_cpu_seconds": typical(steps, log_share, "cpu"),
        "ratio": median(ratios["wall"]),
        "ratio_range": [min(ratios["wall"]), max(ratios["wall"])],
        "cpu_ratio": median(ratios["cpu"]),
        "samples_per_second": own[0]["samples_per_step"] / seconds,
        "peak_memory_bytes": None if None in peaks else max(peaks),
        "flops": own[0]["flops"],
        "mfu": None if None in (own[0]["flops"], most_flops) else own[0]["flops"] / seconds / most_flops,
        "phase_seconds": phases["wall"],
        "phase_cpu_seconds": phases["cpu"],
    }


def table(result: Result) -> Table:
    """The result for people: a column per variant."""
    title = f"One training step: {result['samples_per_step']} samples on {result['device']}, {result['precision']}"
    columns = [_cells(variant) for variant in result["variants"]]
    lines = [[label, *(cells[label] for cells in columns)] for label in columns[0]]
    caption = (
        f"medians of {result['rounds']} x {result['steps']} steps, those that log weighed as in a long run; ratios to "
        "plain are taken round by round"
    )
    return Table(title, ["", *(variant["name"] for variant in result["variants"])], lines, caption)


def _short_fit(steps: int, warmup: int, terms: Sequence[str], folder: str) -> list[str]:
    """What turns a configuration into a short fit with some terms, which writes logs into a folder and nothing else."""
    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": folder}}
    settings = {"max_steps": warmup + steps, "max_epochs": -1, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    settings |= {"devices": 1, "num_nodes": 1, "logger": logger}
    settings |= dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return [
        "--trainer.strategy=auto",
        f"--trainer.default_root_dir={folder}",
        *(f"--trainer.{name}={json.dumps(of)}" for name, of in settings.items()),
        f"--model.init_args.objective.terms={json.dumps(terms)}",
    ]


def _with_timing(trainer: "pl.Trainer", warmup: int) -> "StepTiming":
    """The callback that times a trainer's steps, behind its others, without what acts at the end or times steps too."""
    from infotok_lit.callbacks import ExportInference, FinalReport, Throughput
    from infotok_lit.callbacks.throughput import StepTiming

    timing = StepTiming(warmup)
    others = ExportInference | FinalReport | Throughput
    trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, others)]
    trainer.callbacks.append(timing)
    return timing


def _measured(fit: "InfoTokCLI", timing: "StepTiming") -> Result:
    """What is kept of a fit: its steps, its memory, and the size of its heads."""
    every = fit.trainer.log_every_n_steps
    return {
        "steps": timing.steps,
        "log_share": 1 / every if every > 0 else 0.0,
        "samples_per_step": timing.samples_per_step,
        "flops": timing.flops_per_step,
        "peak_bytes": timing.peak_bytes,
        "head_parameters": sum(parameter.numel() for parameter in fit.model.infotok.parameters()),
    }


def typical(steps: "Sequence[StepTime]", log_share: float, kind: str, phase: str | None = None) -> float:
    """Mean seconds of a step over a long run, by the medians of steps that log and of steps that do not.

    Args:
        log_share: which share of the steps of a long run logs.
        kind: `wall` or `cpu`.
        phase: of its phases; None for the whole step.
    """
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for step in steps:
        spent = getattr(step, kind)
        seconds[step.logs].append(sum(spent.values()) if phase is None else spent[phase])
    if not all(seconds.values()):
        return median(seconds[True] or seconds[False])
    return log_share * median(seconds[True]) + (1 - log_share) * median(seconds[False])


def _circumstances(fit: "InfoTokCLI", timing: "StepTiming") -> Result:
    import torch

    from infotok_lit.modules.flops import most_flops

    device = fit.trainer.strategy.root_device
    threads = torch.get_num_threads()
    return {
        "infotok_lit": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {threads} threads",
        "cpu_cores": os.cpu_count(),
        "precision": str(fit.trainer.precision),
        "most_flops": most_flops(device, fit.trainer.precision),
        "samples_per_step": timing.samples_per_step,
        "base_parameters": sum(parameter.numel() for parameter in fit.model.base.parameters()),
    }


def _cells(variant: Result) -> dict[str, str]:
    """A column of the table: what each line is about -> what it says."""
    seconds, peak, flops, mfu = (variant[of] for of in ("step_seconds", "peak_memory_bytes", "flops", "mfu"))
    cells = {
        "step, ms": f"{1000 * seconds:.1f}",
        "  ratio to plain": f"{variant['ratio']:.3f}",
        "  of the rounds": "-".join(f"{value:.2f}" for value in variant["ratio_range"]),
        "step, CPU ms": f"{1000 * variant['step_cpu_seconds']:.1f}",
        "  ratio to plain (CPU)": f"{variant['cpu_ratio']:.3f}",
        "samples/s": f"{variant['samples_per_second']:.1f}",
        "peak memory, GiB": "-" if peak is None else f"{peak / 2**30:.2f}",
        "TFLOP/s": "-" if flops is None else f"{flops / seconds / 1e12:.4g}",
        "MFU": "-" if mfu is None else f"{100 * mfu:.1f} %",
    }
    for unit, kind in (("ms", "phase_seconds"), ("CPU ms", "phase_cpu_seconds")):
        total = sum(variant[kind].values())
        for phase, spent in variant[kind].items():
            cells[f"{phase}, {unit}"] = f"{1000 * spent:.1f} ({100 * spent / total:.0f} %)"
    return cells | {"head parameters": f"{variant['head_parameters']:,}"}
