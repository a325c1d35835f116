"""`bench inference`: how long answering and drawing take, with and without the caches of keys and values."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import PositiveInt

from infotok_lit.commands.progress import progress_bar
from infotok_lit.files import write_whole

if TYPE_CHECKING:
    from rich.table import Table

    from infotok_lit.models.unified import UnifiedModel

NEVER = -1
"""The id of no token."""
PHRASE = "a red circle and "


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

    fit = InfoTokCLI(["validate", *fit_arguments, "--trainer.devices=1", "--trainer.logger=false"], run=False)
    fit.model.configure_model()
    model = fit.model.base.to(fit.trainer.strategy.root_device).eval()
    jobs = {
        "answering, tokens/s": (answering(model, batch_size, new_tokens), batch_size * new_tokens),
        "drawing, images/s": (drawing(model, batch_size, prompt_tokens), batch_size),
    }
    result = {name: compare_caches(job, amount, rounds, name) for name, (job, amount) in jobs.items()}
    write_numbers(out, result)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [[name, *(f"{own[of]:.2f}" for of in ("cached", "uncached", "ratio"))] for name, own in result.items()]
    Console().print(plain_table(f"{model.title}, {parameters:,} parameters", ["with cache", "without", "ratio"], lines))


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
def never_ending(model: "UnifiedModel") -> Iterator[None]:
    """Inside, no answer ends before its longest length."""
    end = model.processor.end_id
    model.processor.end_id = NEVER
    try:
        yield
    finally:
        model.processor.end_id = end


def plain_table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(box=SIMPLE_HEAD, title=title)
    shown.add_column("", no_wrap=True)
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        shown.add_row(*line)
    return shown


def write_numbers(out: Path | None, result: dict[str, Any]) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, (json.dumps(result, indent=2) + "\n").encode())
