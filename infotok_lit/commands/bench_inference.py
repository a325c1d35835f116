"""How fast a model answers and draws: `bench inference` compares its caches, `bench evaluate` what `evaluate` does.

Help must not wait for torch, which is imported when it is needed.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from jsonargparse.typing import PositiveInt

from infotok_lit import __version__
from infotok_lit.files import check_target, write_json
from infotok_lit.inference import InferenceModel
from infotok_lit.model_choice import ModelOptions, choose
from infotok_lit.progress import progress_bar
from infotok_lit.tables import Table

if TYPE_CHECKING:
    from PIL.Image import Image

    from infotok_lit.evaluation.models import OwnModel
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

    On a card a drawing without caches also launches what is recorded otherwise (docs/drawing.md). Both kinds take turns
    in one process on the same weights and inputs. Every option that is not listed here is one of fit's, such as
    --config FILE or --model.init_args.settings.

    Args:
        fit_arguments: What `fit` is given; only its model and device count.
        new_tokens: Length of each answer.
        prompt_tokens: Length of each caption.
        batch_size: Images at a time.
        rounds: How often each kind has its turn.
        out: Also write the numbers to this JSON file.
    """
    check_target(out)
    from infotok_lit.commands.fit import InfoTokCLI

    fit = InfoTokCLI(["validate", *fit_arguments, "--trainer.devices=1", "--trainer.logger=false"], run=False)
    fit.model.configure_model()
    model = fit.model.base.to(fit.trainer.strategy.root_device).eval()
    jobs = {
        "answering, tokens/s": (answering(model, batch_size, new_tokens), batch_size * new_tokens),
        "drawing, images/s": (drawing(model, batch_size, prompt_tokens), batch_size),
    }
    result = {name: compare_caches(job, amount, rounds, name) for name, (job, amount) in jobs.items()}
    write_json(out, result)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [[name, *(f"{own[of]:.2f}" for of in ("cached", "uncached", "ratio"))] for name, own in result.items()]
    Table(f"{model.title}, {parameters:,} parameters", ["", "with cache", "without", "ratio"], lines).show()


def compare_caches(job: Callable[[bool], object], amount: int, rounds: int, name: str) -> dict[str, float]:
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


def drawing(model: "UnifiedModel", batch_size: int, prompt_tokens: int) -> Callable[[bool], object]:
    """Images from prompts of `prompt_tokens` tokens, by the model's own drawing settings."""
    tokenizer = model.processor.tokenizer
    ids = tokenizer.encode(PHRASE * prompt_tokens, add_special_tokens=False)[:prompt_tokens]
    prompts = [tokenizer.decode(ids)] * batch_size
    # A card goes on computing after the call, until somebody wants the images.
    return lambda use_cache: model.generate(prompts, use_cache=use_cache).cpu()


@contextmanager
def never_ending(model: "UnifiedModel") -> Iterator[None]:
    """Inside, no answer ends before its longest length."""
    end = model.processor.end_id
    model.processor.end_id = NEVER
    try:
        yield
    finally:
        model.processor.end_id = end


def bench_evaluate(
    model: str,
    options: ModelOptions,
    images: PositiveInt = 500,
    questions: PositiveInt = 18,
    drawn: PositiveInt = 32,
    batch_size: PositiveInt = 180,
    max_new_tokens: PositiveInt = 16,
    out: Path | None = None,
) -> None:
    """Time what `evaluate` does: drawing, and answering many questions about each picture of Scenes.

    Answers are timed twice, in batches of one size that take turns: with each picture encoded once for all of its
    questions, and with it encoded anew for each. The answers themselves must agree.

    Args:
        model: An exported folder, a run, an official checkpoint, a name on the Hugging Face hub, or a base that ships,
            such as harmon_scenes32.
        images: Pictures that are asked about.
        questions: Questions about each.
        drawn: Images to draw.
        batch_size: Questions at a time; images are drawn a tenth as many at a time.
        max_new_tokens: The longest answer.
        out: A JSON file to write the numbers to, too.
    """
    check_target(out)
    loaded = InferenceModel(choose(model, options).load())
    from infotok_lit.evaluation.models import OwnModel

    own = OwnModel(loaded, model, None)
    pairs = _pairs(images, questions)
    shared, anew, agreeing = _time_answers(own, pairs, batch_size, max_new_tokens)
    result = {
        "infotok_lit": __version__,
        "model": model,
        "answers_per_second": len(pairs) / shared,
        "answers_per_second_encoding_anew": len(pairs) / anew,
        "gain": anew / shared,
        "answers_that_agree": agreeing / len(pairs),
        "images_per_second": _images_per_second(own, drawn, max(1, batch_size // 10)),
    }
    write_json(out, result)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


def _pairs(images: int, questions: int) -> "list[tuple[Image, str]]":
    """(picture, question) for every question about every picture, picture by picture."""
    from infotok_lit.scenes import Scenes

    scenes = Scenes(split="val", num_samples=max(images, questions), question_kinds=("existence",))
    samples = [scenes.sample("understanding", number) for number in range(max(images, questions))]
    asked = [sample.question for sample in samples[:questions]]
    return [(sample.image, question) for sample in samples[:images] for question in asked]


def _time_answers(
    own: "OwnModel", pairs: "list[tuple[Image, str]]", batch_size: int, max_new_tokens: int
) -> tuple[float, float, int]:
    """Seconds with each picture encoded once, and with it encoded anew; and how many answers agree."""
    batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    seconds, agreeing = {True: 0.0, False: 0.0}, 0
    own.answer(*zip(*batches[0], strict=True), max_new_tokens)
    with progress_bar(len(pairs)) as bar:
        for number, batch in enumerate(batches):
            found = {}
            for shared in (True, False):
                # Equal pictures that are not one object are encoded each by itself.
                shown = [image if shared else image.copy() for image, _ in batch]
                started = perf_counter()
                found[shared] = own.answer(shown, [question for _, question in batch], max_new_tokens)
                seconds[shared] += perf_counter() - started
            agreeing += sum(one == other for one, other in zip(found[True], found[False], strict=True))
            bar.show(number * batch_size, "answers")
    return seconds[True], seconds[False], agreeing


def _images_per_second(own: "OwnModel", count: int, batch_size: int) -> float:
    prompts = ["a red circle above a blue square"] * count
    own.generate(prompts[:1], [0])
    started = perf_counter()
    for start in range(0, count, batch_size):
        batch = prompts[start : start + batch_size]
        own.generate(batch, list(range(start, start + len(batch))))
    return count / (perf_counter() - started)
