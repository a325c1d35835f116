"""`bench reading`: what reading an image takes at a token budget, by part; no weights are needed."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import process_time
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import PositiveInt

from infotok_lit import __version__
from infotok_lit.files import check_target, write_json
from infotok_lit.progress import progress_bar
from infotok_lit.tables import Table

if TYPE_CHECKING:
    from infotok_lit.models.unified import UnifiedModel

GIGA = 1e9
CACHED_BYTES = 2
"""Of a key or a value, in bfloat16."""

Result = dict[str, Any]


def bench_reading(
    family: str = "harmon",
    model_size: str = "0.5b",
    budgets: list[float] | None = None,
    question_tokens: PositiveInt = 32,
    layers: PositiveInt | None = None,
    rounds: PositiveInt = 3,
    out: Path | None = None,
) -> None:
    """Count the operations of reading one image by part, at each budget, for an image of mean rate.

    The counts are exact and take no memory: the model has shapes and no numbers. Tokens without a place, which are
    always read, are in the count.

    Args:
        family: The family of the model.
        model_size: One of its sizes.
        budgets: Shares of the tokens that are read; default: 1 and 0.5.
        question_tokens: Text around the image.
        layers: Also time the language model on the CPU, at random weights, in the first so many of its layers.
        rounds: How often each budget has its turn in that.
        out: Also write the numbers to this JSON file.
    """
    check_target(out)
    from infotok_lit.modules.token_budget import checked_share

    shares = [checked_share(share) for share in budgets or (1.0, 0.5)]
    model = shapes_of(family, model_size)
    result: Result = {"infotok_lit": __version__, "family": family, "model_size": model_size}
    result |= {"question_tokens": question_tokens, "before": before_language_model(model)}
    result["budgets"] = [at_budget(model, share, question_tokens) for share in shares]
    if layers is not None:
        lengths = [each["image_tokens"] + question_tokens for each in result["budgets"]]
        for each, seconds in zip(result["budgets"], prefill_seconds(model, lengths, layers, rounds), strict=True):
            each[f"cpu_seconds_of_{layers}_layers"] = seconds
    write_json(out, result)
    sys.stdout.write(report(result))


def shapes_of(family: str, size: str) -> "UnifiedModel":
    """A model without numbers."""
    import torch

    from infotok_lit.models.family import family as family_called

    known = family_called(family)
    # No word is read, so any tokenizer that fits will do, and this one ships with the package.
    with torch.device("meta"):
        return known.build(known.config_of_size(size), "scenes32").eval()


def before_language_model(model: "UnifiedModel") -> Result:
    """GFLOP of everything that a budget does not change: what makes the shared tokens, and their projection."""
    import torch

    side = model.config.image_size
    pixels = torch.zeros(1, 3, side, side, device="meta")
    parts = gigaflops(lambda: model.understood_tokens(pixels))
    count = image_tokens(model, 1.0) - model.slots_before_tokens
    tokens = torch.zeros(1, count, model.token_widths["understanding"], device="meta")
    return parts | {"projection": sum(gigaflops(lambda: model.project_for_llm(tokens)).values())}


def at_budget(model: "UnifiedModel", share: float, question_tokens: int) -> Result:
    """What the language model takes to read an image at a budget, up to the first word of the answer."""
    import torch

    tokens, llm = image_tokens(model, share), model.config.llm
    embeds = torch.zeros(1, tokens + question_tokens, model.text_width, device="meta")

    def prefill() -> None:
        states = model.text_body(inputs_embeds=embeds, use_cache=True).last_hidden_state
        model.language_model.lm_head(states[:, -1])

    width = llm.hidden_size // llm.num_attention_heads
    cached = 2 * llm.num_hidden_layers * llm.num_key_value_heads * width * CACHED_BYTES
    return {
        "budget": share,
        "image_tokens": tokens,
        "prefill": sum(gigaflops(prefill).values()),
        "image_cache_mib": tokens * cached / 2**20,
    }


def image_tokens(model: "UnifiedModel", share: float) -> int:
    """How many positions an image of mean rate takes in the language model."""
    always = model.num_extras["understanding"] + model.slots_before_tokens
    return always + max(1, round(share * (model.processor.num_image_tokens - always)))


def gigaflops(job: Callable[[], object]) -> dict[str, float]:
    """What a job takes, by the outermost modules that it calls."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        job()
    found = {name: sum(counts.values()) / GIGA for name, counts in counter.get_flop_counts().items()}
    total = found.pop("Global")
    outermost = {name: value for name, value in found.items() if "." not in name}
    return outermost | {"rest": total - sum(outermost.values())}


def prefill_seconds(model: "UnifiedModel", lengths: Sequence[int], layers: int, rounds: int) -> list[float]:
    """Median CPU seconds of prefill at each length, which take turns, in a language model of random weights."""
    import torch

    from infotok_lit.models.common.language_model import build_language_model

    body = build_language_model(replace(model.config.llm, num_hidden_layers=layers)).eval().model
    seconds: list[list[float]] = [[] for _ in lengths]
    with progress_bar(rounds) as bar, torch.inference_mode():
        for turn in range(rounds + 1):
            for length, own in zip(lengths, seconds, strict=True):
                embeds = torch.randn(1, length, model.text_width)
                start = process_time()
                body(inputs_embeds=embeds, use_cache=True)
                own.append(process_time() - start)
            bar.show(turn, "prefill")
    # The first turn warms up.
    return [median(own[1:]) for own in seconds]


def report(result: Result) -> str:
    """The numbers as Markdown, beside those of all tokens."""
    before = {name: value for name, value in result["before"].items() if round(value, 1)}
    whole = result["budgets"][0]
    timed = [name for name in whole if name.startswith("cpu_seconds")]
    heads = ["budget", "image tokens", *before, "prefill", "reading", "against the first: prefill", "reading"]
    heads += ["image cache, MiB", *(f"{name.replace('_', ' ')} (ratio)" for name in timed)]
    lines = []
    for each in result["budgets"]:
        reading, first = (sum(before.values()) + one["prefill"] for one in (each, whole))
        cells = [f"{each['budget']:g}", each["image_tokens"], *(f"{value:.0f}" for value in before.values())]
        cells += [f"{each['prefill']:.0f}", f"{reading:.0f}"]
        cells += [f"{whole['prefill'] / each['prefill']:.2f} x", f"{first / reading:.2f} x"]
        cells += [f"{each['image_cache_mib']:.1f}", *(f"{each[n]:.3f} ({whole[n] / each[n]:.2f} x)" for n in timed)]
        lines.append(cells)
    title = f"Reading one image with {result['family']} {result['model_size']}, GFLOP"
    return f"{title}\n\n{Table(title, heads, lines).markdown()}\n"
