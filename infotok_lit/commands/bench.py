"""`bench`: how long training takes, per term of the objective; `bench inference`: answering and drawing."""

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import NonNegativeInt, PositiveInt

from infotok_lit import __version__
from infotok_lit.commands import bench_evaluate, bench_reading
from infotok_lit.commands.parsing import run
from infotok_lit.commands.progress import progress_bar
from infotok_lit.files import write_whole

if TYPE_CHECKING:
    from rich.table import Table

    from infotok_lit.commands.fit import InfoTokCLI
    from infotok_lit.models.unified import UnifiedModel

TERM_SETS = (
    (),
    ("compactness",),
    ("compactness", "sufficiency"),
    ("compactness", "sufficiency", "alignment"),
)
"""Plain fine-tuning, and each term added."""
NEVER = -1
"""The id of no token."""
PHRASE = "a red circle and "

Result = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """`bench --config FILE ... [overrides] [--steps N]`, `bench inference ...`, `bench evaluate ...`, ..."""
    if list(argv[1:2]) == ["reading"]:
        return bench_reading.main(["bench reading", *argv[2:]])
    if list(argv[1:2]) == ["evaluate"]:
        return bench_evaluate.main(["bench evaluate", *argv[2:]])
    if list(argv[1:2]) == ["inference"]:
        return run(bench_inference, ["bench inference", *argv[2:]], rest="fit_arguments")
    return run(bench, argv, rest="fit_arguments")


def bench(
    fit_arguments: list[str],
    steps: PositiveInt = 20,
    warmup: NonNegativeInt = 3,
    rounds: PositiveInt = 3,
    out: Path | None = None,
) -> None:
    """Time the training of a configuration, without any term of the objective and with each one added.

    Each variant is a real `fit` of so many steps, in one process on one device, without validation, logs and
    checkpoints. The variants take turns for some rounds, and ratios are taken round by round, as machines have moods.
    Every option that is not listed here is one of fit's, such as --config FILE; without --config the quickstart is
    timed. `bench inference` times answering and drawing with and without their caches, `bench evaluate`
    what `evaluate` does, and `bench reading` counts what a token budget saves.

    Args:
        fit_arguments: What `fit` is given.
        steps: Optimiser steps that count, in each round.
        warmup: Steps before them.
        rounds: How often each variant has its turn.
        out: Also write the numbers to this JSON file.
    """
    from rich.console import Console

    from infotok_lit.commands.fit import InfoTokCLI

    terms = InfoTokCLI(["fit", *fit_arguments, *_overrides(1, 0)], run=False).model.objective_config.terms
    sets = [*TERM_SETS, *([] if set(terms) in map(set, TERM_SETS) else [tuple(terms)])]
    variants: dict[str, list[Result]] = {name_of(terms): [] for terms in sets}
    circumstances: Result = {}
    with progress_bar(rounds * len(sets)) as bar, _quiet(), TemporaryDirectory() as folder:
        for i in range(rounds):
            for place, terms in enumerate(sets):
                bar.show(i * len(sets) + place, f"round {i + 1}: {name_of(terms)}")
                # Without a logger, a fit leaves its configuration in this folder.
                root = f"--trainer.default_root_dir={folder}"
                fit = InfoTokCLI(["fit", *fit_arguments, *_overrides(steps, warmup, terms), root])
                circumstances = circumstances or _circumstances(fit)
                variants[name_of(terms)].append(_measured(fit))
    result = circumstances | {"arguments": fit_arguments, "steps": steps, "warmup": warmup, "rounds": rounds}
    result["variants"] = [{"name": name} | summarise(own, variants["plain"]) for name, own in variants.items()]
    _write(out, result)
    Console().print(table(result))


def bench_inference(
    fit_arguments: list[str],
    new_tokens: PositiveInt = 128,
    prompt_tokens: PositiveInt = 64,
    batch_size: PositiveInt = 1,
    rounds: PositiveInt = 3,
    out: Path | None = None,
) -> None:
    """Time answering and drawing with and without the caches of keys and values.

    Both kinds take turns in one process on the same weights and inputs. Every option that is not listed here is one of
    fit's, such as --config FILE or --model.init_args.settings.

    Args:
        fit_arguments: What `fit` is given; only its model and device count.
        new_tokens: Length of each answer.
        prompt_tokens: Length of each caption.
        batch_size: Images at a time.
        rounds: How often each kind has its turn.
        out: Also write the numbers to this JSON file.
    """
    from rich.console import Console

    from infotok_lit.commands.fit import InfoTokCLI

    fit = InfoTokCLI(["validate", *fit_arguments, *_overrides(1, 0)], run=False)
    fit.model.configure_model()
    model = fit.model.base.to(fit.trainer.strategy.root_device).eval()
    jobs = {
        "answering, tokens/s": (answering(model, batch_size, new_tokens), batch_size * new_tokens),
        "drawing, images/s": (drawing(model, batch_size, prompt_tokens), batch_size),
    }
    result = {name: compare_caches(job, amount, rounds, name) for name, (job, amount) in jobs.items()}
    _write(out, result)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [[name, *(f"{own[of]:.2f}" for of in ("cached", "uncached", "ratio"))] for name, own in result.items()]
    Console().print(_table(f"{model.title}, {parameters:,} parameters", ["with cache", "without", "ratio"], lines))


# Training


def name_of(terms: Sequence[str]) -> str:
    """The paper's short name of a set of terms, such as C&S; "plain" for none."""
    return "&".join(term[0].upper() for term in terms) or "plain"


def summarise(own: Sequence[Result], plain: Sequence[Result]) -> Result:
    """What is reported of a variant: medians over all steps, and its rounds' ratios to those of plain fine-tuning.

    Args:
        own: Its rounds, as `_measured` leaves them.
        plain: Those of plain fine-tuning.
    """
    steps = [step for each in own for step in each["steps"]]
    seconds = median(sum(step.wall.values()) for step in steps)
    ratios = {
        kind: [_step_median(each, kind) / _step_median(other, kind) for each, other in zip(own, plain, strict=True)]
        for kind in ("wall", "cpu")
    }
    peaks = [each["peak_bytes"] for each in own]
    return {
        "head_parameters": own[0]["head_parameters"],
        "step_seconds": seconds,
        "step_cpu_seconds": median(sum(step.cpu.values()) for step in steps),
        "ratio": median(ratios["wall"]),
        "ratio_range": [min(ratios["wall"]), max(ratios["wall"])],
        "cpu_ratio": median(ratios["cpu"]),
        "samples_per_second": own[0]["samples_per_step"] / seconds,
        "peak_memory_bytes": None if None in peaks else max(peaks),
        "phase_seconds": {phase: median(step.wall[phase] for step in steps) for phase in steps[0].wall},
        "phase_cpu_seconds": {phase: median(step.cpu[phase] for step in steps) for phase in steps[0].cpu},
    }


def table(result: Result) -> "Table":
    """The result for people: a column per variant."""
    title = f"One training step: {result['samples_per_step']} samples on {result['device']}, {result['precision']}"
    lines = [[label, *(cell(variant) for variant in result["variants"])] for label, cell in _ROWS.items()]
    shown = _table(title, [variant["name"] for variant in result["variants"]], lines)
    shown.caption = f"medians of {result['rounds']} x {result['steps']} steps; ratios to plain are taken round by round"
    return shown


def _overrides(steps: int, warmup: int, terms: Sequence[str] | None = None) -> list[str]:
    """What turns a configuration into a short fit that measures itself, with some terms or those that it has."""
    timing = {"class_path": "infotok_lit.callbacks.timing.StepTiming", "init_args": {"warmup": warmup}}
    settings = {"max_steps": warmup + steps, "max_epochs": -1, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    settings |= {"devices": 1, "num_nodes": 1, "logger": False, "callbacks": [timing]}
    settings |= dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    chosen = [] if terms is None else [f"--model.init_args.objective.terms={json.dumps(terms)}"]
    return [
        "--trainer.strategy=auto",
        *(f"--trainer.{name}={json.dumps(of)}" for name, of in settings.items()),
        *chosen,
    ]


def _measured(fit: "InfoTokCLI") -> Result:
    """What is kept of a fit: its steps, its memory, and the size of its heads."""
    from infotok_lit.callbacks.timing import StepTiming

    (timing,) = (callback for callback in fit.trainer.callbacks if isinstance(callback, StepTiming))
    return {
        "steps": timing.steps,
        "samples_per_step": timing.samples_per_step,
        "peak_bytes": timing.peak_bytes,
        "head_parameters": sum(parameter.numel() for parameter in fit.model.infotok.parameters()),
    }


def _step_median(measured: Result, kind: str) -> float:
    return median(sum(getattr(step, kind).values()) for step in measured["steps"])


def _circumstances(fit: "InfoTokCLI") -> Result:
    import torch

    device = fit.trainer.strategy.root_device
    threads = torch.get_num_threads()
    return {
        "infotok_lit": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {threads} threads",
        "cpu_cores": os.cpu_count(),
        "precision": str(fit.trainer.precision),
        "samples_per_step": _measured(fit)["samples_per_step"],
        "base_parameters": sum(parameter.numel() for parameter in fit.model.base.parameters()),
    }


def _phase(name: str) -> Callable[[Result], str]:
    def cell(variant: Result) -> str:
        seconds = variant["phase_seconds"][name]
        return f"{1000 * seconds:.1f} ({100 * seconds / sum(variant['phase_seconds'].values()):.0f} %)"

    return cell


def _memory(variant: Result) -> str:
    peak = variant["peak_memory_bytes"]
    return "-" if peak is None else f"{peak / 2**30:.2f}"


_ROWS: dict[str, Callable[[Result], str]] = {
    "step, ms": lambda variant: f"{1000 * variant['step_seconds']:.1f}",
    "  ratio to plain": lambda variant: f"{variant['ratio']:.3f}",
    "  of the rounds": lambda variant: "-".join(f"{value:.2f}" for value in variant["ratio_range"]),
    "step, CPU ms": lambda variant: f"{1000 * variant['step_cpu_seconds']:.1f}",
    "  ratio to plain (CPU)": lambda variant: f"{variant['cpu_ratio']:.3f}",
    "samples/s": lambda variant: f"{variant['samples_per_second']:.1f}",
    "peak memory, GiB": _memory,
    "data, ms": _phase("data"),
    "forward, ms": _phase("forward"),
    "backward, ms": _phase("backward"),
    "optimiser, ms": _phase("optimiser"),
    "head parameters": lambda variant: f"{variant['head_parameters']:,}",
}


# Inference


def compare_caches(job: Callable[[bool], None], amount: int, rounds: int, name: str) -> dict[str, float]:
    """What a job does per second with and without cache, and the median of the rounds' ratios."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    job(True)
    with progress_bar(rounds) as bar:
        for i in range(rounds):
            for use_cache in (True, False):
                start = perf_counter()
                job(use_cache)
                seconds[use_cache].append(perf_counter() - start)
            bar.show(i + 1, name)
    ratios = [slow / fast for fast, slow in zip(seconds[True], seconds[False], strict=True)]
    rates = {use_cache: amount / median(taken) for use_cache, taken in seconds.items()}
    return {"cached": rates[True], "uncached": rates[False], "ratio": median(ratios)}


def answering(model: "UnifiedModel", batch_size: int, new_tokens: int) -> Callable[[bool], None]:
    """Answers of exactly `new_tokens` tokens."""
    import torch

    size = model.config.image_size
    images = torch.zeros(batch_size, 3, size, size, device=next(model.parameters()).device)
    prompts = ["what is in the image?"] * batch_size

    def job(use_cache: bool) -> None:
        with never_ending(model):
            model.describe(images, prompts, new_tokens, use_cache)

    return job


def drawing(model: "UnifiedModel", batch_size: int, prompt_tokens: int) -> Callable[[bool], None]:
    """Images from prompts of `prompt_tokens` tokens, by the model's own drawing settings."""
    tokenizer = model.processor.tokenizer
    ids = tokenizer.encode(PHRASE * prompt_tokens, add_special_tokens=False)[:prompt_tokens]
    prompts = [tokenizer.decode(ids)] * batch_size
    return lambda use_cache: model.generate(prompts, use_cache=use_cache)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, Lightning does not say of every fit what it always says, nor that it is short."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def never_ending(model: "UnifiedModel") -> Iterator[None]:
    """Inside, no answer ends before its longest length."""
    end = model.processor.end_id
    model.processor.end_id = NEVER
    try:
        yield
    finally:
        model.processor.end_id = end


# Both


def _table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(box=SIMPLE_HEAD, title=title)
    shown.add_column("", no_wrap=True)
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        shown.add_row(*line)
    return shown


def _write(out: Path | None, result: Result) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, (json.dumps(result, indent=2) + "\n").encode())
