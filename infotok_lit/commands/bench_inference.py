"""Time answering and drawing with and without the caches of keys and values.

Both kinds take turns in one process on the same weights and inputs, so their ratio does not depend on the machine's
moods. Every option that is not listed here is one of fit's, such as --config FILE or --model.init_args.settings.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from infotok_lit.commands.command_line import at_least, progress_bar
from infotok_lit.files import write_whole

if TYPE_CHECKING:
    from infotok_lit.models.unified import UnifiedModel

NEVER = -1
"""The id of no token."""
PHRASE = "a red circle and "


def main(argv: Sequence[str]) -> int:
    """`bench inference --config FILE ... [--new_tokens 128] [--prompt_tokens 64] [--batch_size N] [--out FILE]`."""
    parser = _parser()
    arguments, fit_arguments = parser.parse_known_args(argv[1:])
    from infotok_lit.commands.fit_setup import FitSetup

    try:
        setup = FitSetup(fit_arguments)
        setup.connect()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    model = setup.model.base.to(setup.trainer.strategy.root_device).eval()
    jobs = {
        "answering, tokens/s": (answering(model, arguments), arguments.batch_size * arguments.new_tokens),
        "drawing, images/s": (drawing(model, arguments), arguments.batch_size),
    }
    result = {name: compare(job, amount, arguments.rounds, name) for name, (job, amount) in jobs.items()}
    if arguments.out is not None:
        write_whole(arguments.out, (json.dumps(result, indent=2) + "\n").encode())
    _print(result, model)
    return 0


def compare(job: Callable[[bool], None], amount: int, rounds: int, name: str) -> dict[str, float]:
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
    return {
        "cached": amount / median(seconds[True]),
        "uncached": amount / median(seconds[False]),
        "ratio": median(ratios),
    }


def answering(model: "UnifiedModel", arguments: argparse.Namespace) -> Callable[[bool], None]:
    """Answers of exactly `new_tokens` tokens."""
    import torch

    size = model.config.image_size
    images = torch.zeros(arguments.batch_size, 3, size, size, device=next(model.parameters()).device)
    prompts = ["what is in the image?"] * arguments.batch_size

    def job(use_cache: bool) -> None:
        with never_ending(model):
            model.describe(images, prompts, arguments.new_tokens, use_cache)

    return job


def drawing(model: "UnifiedModel", arguments: argparse.Namespace) -> Callable[[bool], None]:
    """Images from prompts of `prompt_tokens` tokens, by the model's own drawing settings."""
    prompts = [prompt_of(model, arguments.prompt_tokens)] * arguments.batch_size

    def job(use_cache: bool) -> None:
        model.generate(prompts, use_cache=use_cache)

    return job


def prompt_of(model: "UnifiedModel", tokens: int) -> str:
    """A text of a number of tokens."""
    tokenizer = model.processor.tokenizer
    ids = tokenizer.encode(PHRASE * tokens, add_special_tokens=False)[:tokens]
    return tokenizer.decode(ids)


@contextmanager
def never_ending(model: "UnifiedModel") -> Iterator[None]:
    """Inside, no answer ends before its longest length."""
    end = model.processor.end_id
    model.processor.end_id = NEVER
    try:
        yield
    finally:
        model.processor.end_id = end


def _print(result: dict[str, dict[str, float]], model: "UnifiedModel") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    parameters = sum(parameter.numel() for parameter in model.parameters())
    shown = Table(box=SIMPLE_HEAD, title=f"{model.title}, {parameters:,} parameters")
    for column in ("", "with cache", "without", "ratio"):
        shown.add_column(column, justify="right" if column else "left")
    for name, row in result.items():
        shown.add_row(name, *(f"{row[column]:.2f}" for column in ("cached", "uncached", "ratio")))
    Console().print(shown)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m infotok_lit bench inference", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--new_tokens", type=at_least(1), default=128, help="length of each answer; default: 128")
    parser.add_argument("--prompt_tokens", type=at_least(1), default=64, help="length of each caption; default: 64")
    parser.add_argument("--batch_size", type=at_least(1), default=1, help="images at a time; default: 1")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="default: 3")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the numbers here")
    return parser
