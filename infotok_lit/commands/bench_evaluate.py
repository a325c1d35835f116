"""`bench evaluate`: how many images and answers a second, and what it brings to encode a picture once."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from jsonargparse.typing import PositiveInt

from infotok_lit import __version__
from infotok_lit.commands.parsing import run
from infotok_lit.commands.progress import progress_bar
from infotok_lit.files import write_whole
from infotok_lit.inference import InferenceModel
from infotok_lit.model_choice import ModelOptions, choose

if TYPE_CHECKING:
    from PIL.Image import Image

    from infotok_lit.evaluation.models import OwnModel


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
        model: An exported folder, a run, an official checkpoint, or a name on the Hugging Face hub.
        images: Pictures that are asked about.
        questions: Questions about each.
        drawn: Images to draw.
        batch_size: Questions at a time; images are drawn a tenth as many at a time.
        max_new_tokens: The longest answer.
        out: A JSON file to write the numbers to, too.
    """
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
    text = json.dumps(result, indent=2) + "\n"
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, text.encode())
    sys.stdout.write(text)


def main(argv: Sequence[str]) -> int:
    """`bench evaluate` of the command line."""
    return run(bench_evaluate, argv)


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
