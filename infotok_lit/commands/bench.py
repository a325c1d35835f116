"""Time one training step of a fit configuration, without any term of the objective and with each one added.

The variants take turns in one process, on the same weights, batches and random numbers. A step is forward, backward,
clipping and optimiser; loading data is not part of it. Every option that is not listed here is one of fit's, such as
--config FILE or --data.init_args.generation_batch_size 8; without --config the quickstart is timed.
`bench inference` times answering and drawing with and without their caches.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from infotok_lit import __version__
from infotok_lit.commands.command_line import at_least, progress_bar
from infotok_lit.files import write_whole

if TYPE_CHECKING:
    from rich.table import Table

    from infotok_lit.commands.fit_setup import FitSetup
    from infotok_lit.commands.step_timing import StepBatch, StepTime, StepTimer, Variant
    from infotok_lit.objective.term import Term

TERM_SETS: "tuple[tuple[Term, ...], ...]" = (
    (),
    ("compactness",),
    ("compactness", "sufficiency"),
    ("compactness", "sufficiency", "alignment"),
)
"""Plain fine-tuning, and each term added."""

Result = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """`bench --config FILE ... [overrides] [--steps N] [--warmup N] [--out bench.json]`, or `bench inference ...`."""
    if list(argv[1:2]) == ["inference"]:
        from infotok_lit.commands import bench_inference

        return bench_inference.main(argv[1:])
    parser = _parser()
    arguments, fit_arguments = parser.parse_known_args(argv[1:])
    from infotok_lit.commands.fit_setup import FitSetup
    from infotok_lit.commands.step_timing import StepTimer

    try:
        setup = FitSetup(fit_arguments)
        setup.connect()
        batches = setup.draw_steps(arguments.warmup + arguments.steps)
        timer = StepTimer(setup.model, setup.trainer)
        variants = timer.build_variants(term_sets(setup.model.objective_config.terms), setup.to_device(batches[0]))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    times = time_rounds(setup, timer, variants, batches, arguments.warmup, arguments.steps)
    result = _circumstances(setup, batches[0], arguments, fit_arguments)
    result["variants"] = summarise(variants, times, result["samples_per_step"])
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.out, (json.dumps(result, indent=2) + "\n").encode())
    from rich.console import Console

    Console().print(table(result))
    return 0


def term_sets(configured: "Sequence[Term]") -> "list[tuple[Term, ...]]":
    """TERM_SETS, and the configuration's own terms if they are not one of them."""
    known = {frozenset(terms) for terms in TERM_SETS}
    return list(TERM_SETS) + ([] if frozenset(configured) in known else [tuple(configured)])


def time_rounds(
    setup: "FitSetup",
    timer: "StepTimer",
    variants: "Sequence[Variant]",
    batches: "Sequence[Sequence[StepBatch]]",
    warmup: int,
    steps: int,
) -> "list[list[StepTime]]":
    """The times of each variant, one per round after the warm-up; in each round every variant takes one step."""
    times: list[list[StepTime]] = [[] for _ in variants]
    rounds = warmup + steps
    with progress_bar(rounds) as bar:
        for i in range(rounds):
            on_device = setup.to_device(batches[i % len(batches)])
            # Another variant starts each round, so that none profits from its neighbour's caches.
            for turn in range(len(variants)):
                chosen = (i + turn) % len(variants)
                taken = timer.step(variants[chosen], on_device, seed=i)
                if i >= warmup:
                    times[chosen].append(taken)
            bar.show(i + 1, f"{'warm-up' if i < warmup else 'round'} {i + 1}/{rounds}")
    return times


def summarise(
    variants: "Sequence[Variant]", times: "Sequence[Sequence[StepTime]]", samples_per_step: int
) -> list[Result]:
    """What is reported of each variant; the first one is what the others are compared with."""
    own_bytes = [variant.own_bytes() for variant in variants]
    summaries = []
    for variant, own, taken in zip(variants, own_bytes, times, strict=True):
        seconds = median(time.total for time in taken)
        # Round by round, because a step's work depends on its masks; the machine's moods cancel out as well.
        ratios = [time.total / plain.total for time, plain in zip(taken, times[0], strict=True)]
        peaks = [time.peak_bytes for time in taken]
        summaries.append(
            {
                "name": name_of(variant.terms),
                "terms": list(variant.terms),
                "head_parameters": sum(parameter.numel() for parameter in variant.heads.parameters()),
                "step_seconds": seconds,
                "ratio": median(ratios),
                "ratio_quartiles": quantiles(ratios, n=4)[::2],
                "samples_per_second": samples_per_step / seconds,
                "peak_memory_bytes": None if None in peaks else max(peaks) - (sum(own_bytes) - own),
                "phase_seconds": {phase: median(time.phases[phase] for time in taken) for phase in taken[0].phases},
            }
        )
    return summaries


def name_of(terms: "Sequence[Term]") -> str:
    """The paper's short name of a set of terms, such as C&S; "plain" for none."""
    return "&".join(term[0].upper() for term in terms) or "plain"


def table(result: Result) -> "Table":
    """The result for people: a column per variant."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(
        box=SIMPLE_HEAD,
        title=f"One training step: {result['samples_per_step']} samples on {result['device']}, {result['precision']}",
        caption=f"medians of {result['steps']} rounds after {result['warmup']}; ratios are taken round by round",
    )
    shown.add_column("", no_wrap=True)
    for variant in result["variants"]:
        shown.add_column(variant["name"], justify="right")
    for label, cell in _ROWS.items():
        shown.add_row(label, *(cell(variant) for variant in result["variants"]))
    return shown


def _milliseconds(phase: str) -> Callable[[Result], str]:
    return lambda variant: f"{1000 * variant['phase_seconds'][phase]:.1f}"


def _memory(variant: Result) -> str:
    peak = variant["peak_memory_bytes"]
    return "-" if peak is None else f"{peak / 2**30:.2f}"


_ROWS: dict[str, Callable[[Result], str]] = {
    "step, ms": lambda variant: f"{1000 * variant['step_seconds']:.1f}",
    "ratio to plain": lambda variant: f"{variant['ratio']:.3f}",
    "  quartiles": lambda variant: "-".join(f"{value:.2f}" for value in variant["ratio_quartiles"]),
    "samples/s": lambda variant: f"{variant['samples_per_second']:.1f}",
    "peak memory, GiB": _memory,
    "base forward, ms": _milliseconds("base_forward"),
    "terms forward, ms": _milliseconds("objective_forward"),
    "backward, ms": _milliseconds("backward"),
    "optimiser, ms": _milliseconds("optimiser"),
    "head parameters": lambda variant: f"{variant['head_parameters']:,}",
}


def _circumstances(
    setup: "FitSetup", batches: "Sequence[StepBatch]", arguments: argparse.Namespace, fit_arguments: Sequence[str]
) -> Result:
    import torch

    device = setup.trainer.strategy.root_device
    threads = torch.get_num_threads()
    return {
        "infotok_lit": __version__,
        "torch": torch.__version__,
        "arguments": list(fit_arguments),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {threads} threads",
        "cpu_cores": os.cpu_count(),
        "precision": str(setup.trainer.precision),
        "warmup": arguments.warmup,
        "steps": arguments.steps,
        "samples_per_step": sum(len(branch.names) for batch in batches for branch in batch.values()),
        "base_parameters": sum(parameter.numel() for parameter in setup.model.base.parameters()),
    }


def _parser() -> argparse.ArgumentParser:
    # Without abbreviations: fit's options pass through, and some begin like ours.
    parser = argparse.ArgumentParser(prog="python -m infotok_lit bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=at_least(2), default=20, help="rounds that count; default: 20")
    parser.add_argument("--warmup", type=at_least(0), default=3, help="rounds before them; default: 3")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the numbers here")
    return parser
