"""Measure what the shared tokens hold: bits about the objects of unseen scenes, and about the texture behind them.

Probes are trained on some scenes and measured on others, none of which the model was trained on. Every number is a
lower bound on mutual information, in bits per image. A run brings its posteriors too: their means, and samples of
them, whose structure and texture together stay below their rate.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infotok_lit import __version__
from infotok_lit.checkpoints import exported_family
from infotok_lit.commands.command_line import at_least, progress_bar
from infotok_lit.commands.model_choice import ModelChoice, chosen_device
from infotok_lit.files import write_whole

if TYPE_CHECKING:
    from rich.table import Table

    from infotok_lit.models.unified import UnifiedModel
    from infotok_lit.objective.infotok import InfoTok

SPECS = ("scenes32", "scenes64", "scenes32_hard", "garments32")


def main(argv: Sequence[str]) -> int:
    """`probe --model DIR_OR_RUN [--scenes scenes64] [--out probe.json]`."""
    parser = _parser()
    arguments = parser.parse_args(argv[1:])
    from infotok_lit.callbacks.scene_probes import probed_model
    from infotok_lit.scenes.probe import ProbeOptions, measure

    try:
        options = ProbeOptions(**{name: getattr(arguments, name) for name in asdict(ProbeOptions())})
        base, heads, running = _load(arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    with progress_bar(1.0) as bar:
        rows = [row.to_dict() for row in measure(probed_model(base, heads, running), options, bar.show)]
    ceiling = _ceiling(options.scenes)
    result = {
        "infotok_lit": __version__,
        "model": str(arguments.model),
        "family": base.family,
        **asdict(options),
        "structure_ceiling": ceiling,
        "rows": rows,
    }
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.out, (json.dumps(result, indent=2) + "\n").encode())
    from rich.console import Console

    for table in tables(result):
        Console().print(table)
    return 0


def _load(
    arguments: argparse.Namespace,
) -> "tuple[UnifiedModel, InfoTok | None, Callable[[], AbstractContextManager[Any]]]":
    """The model, the heads if it is a run, and the context to call them in."""
    run = _run(arguments)
    if run is None:
        choice = ModelChoice.from_arguments(arguments)
        base = choice.load()
        return base, None, partial(choice.running, base)
    if arguments.dtype != "float32":
        raise ValueError("a run is probed in float32: leave out --dtype, or export the run first")
    import torch

    from infotok_lit.checkpoints import read_run
    from infotok_lit.modules.base_model import read_heads, rebuild_base

    checkpoint = read_run(run)
    device = chosen_device(arguments.device)
    base = rebuild_base(checkpoint).to(device)
    return base, read_heads(checkpoint, base).to(device), torch.inference_mode


def _run(arguments: argparse.Namespace) -> Path | None:
    """The checkpoint, if --model names a run."""
    if arguments.family is not None or exported_family(arguments.model) is not None:
        return None
    from infotok_lit.checkpoints import find_checkpoint

    return find_checkpoint(arguments.model)


def _ceiling(scenes: str) -> dict[str, float]:
    """What there is to know about the objects, in bits per scene."""
    from infotok_lit.scenes.prior import ScenePrior
    from infotok_lit.scenes.spec import SPECS as known

    return ScenePrior(known[scenes]).entropy_bits()


def tables(result: dict[str, Any]) -> "list[Table]":
    """The result for people: a table per branch, with a row per part and a column per kind of features."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    ceiling = result["structure_ceiling"] | {"structure": sum(result["structure_ceiling"].values())}
    shown = []
    for branch in dict.fromkeys(row["branch"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["branch"] == branch]
        own = Table(box=SIMPLE_HEAD, title=f"{branch}: bits per image, at least", caption="\u00b1 standard error")
        for column in ("", "of", *(row["features"].replace(" ", "\n") for row in rows)):
            own.add_column(column, justify="right" if column else "left", no_wrap=True)
        parts = list(rows[0]["parts"])
        split = len(result["structure_ceiling"])
        for name in ("structure", *parts[:split], "texture", *parts[split:]):
            label = name if name in ("structure", "texture") else f"  {name}"
            bits = [row["parts"].get(name) or row[name] for row in rows]
            own.add_row(label, f"{ceiling[name]:.2f}" if name in ceiling else "", *map(_cell, bits))
        if any(row["rate_bits"] is not None for row in rows):
            rates = ["" if row["rate_bits"] is None else f"{row['rate_bits']:.1f}" for row in rows]
            own.add_row("rate (most)", "", *rates)
        shown.append(own)
    return shown


def _cell(bits: dict[str, float]) -> str:
    # Adding 0 turns a rounded -0 into 0.
    return f"{round(bits['mean'], 2) + 0.0:.2f} \u00b1{bits['error']:.1f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m infotok_lit probe", description=__doc__)
    ModelChoice.add_arguments(parser)
    parser.add_argument("--scenes", choices=SPECS, default="scenes32", help="family of scenes; default: scenes32")
    parser.add_argument("--train", type=at_least(50), default=1500, help="scenes that fit the probes; default: 1500")
    parser.add_argument("--test", type=at_least(2), default=500, help="scenes that measure them; default: 500")
    parser.add_argument(
        "--hidden", type=at_least(0), default=0, help="hidden width of the probes of objects; default: 0, linear ones"
    )
    parser.add_argument("--batch_size", type=at_least(1), default=50, help="scenes at a time; default: 50")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of scenes and random numbers; default: 0")
    parser.add_argument("--texture", type=float, help="strength of the background in [0, 1]; default: the family's own")
    parser.add_argument("--jitter", type=float, help="most pixels off a cell's centre; default: the family's own")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the numbers here")
    return parser
