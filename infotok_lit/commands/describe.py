"""`describe`: ask models about images; one line per answer, several models side by side."""

import glob
import json as json_format
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jsonargparse.typing import PositiveInt

from infotok_lit.batch import BrokenSampleError
from infotok_lit.errors import MissingFileError
from infotok_lit.inference import QUESTION, InferenceModel
from infotok_lit.model_choice import ModelOptions, choose, labels, tell_what_was_found
from infotok_lit.progress import ProgressBar, progress_bar

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)
"""What counts as an image in a folder; a file that is named is read whatever its suffix."""

CONTROL_CHARACTERS = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+"
"""Would be taken for the end of a field or of a line, or for an order to the terminal."""


class Reply(NamedTuple):
    """What a model answers to a prompt about an image file."""

    image: str
    prompt: str
    answer: str


def describe(
    model: list[str],
    image: list[str],
    options: ModelOptions,
    prompt: list[str] | None = None,
    max_new_tokens: PositiveInt = 64,
    batch_size: PositiveInt = 8,
    budget: float | None = None,
    json: bool = False,
) -> int:
    """Ask models about images: one line per answer, `image<TAB>prompt<TAB>answer`; several models answer side by side.

    Args:
        model: An exported folder, a run, an official checkpoint, a name on the Hugging Face hub, or a base that ships,
            such as harmon_scenes32; or several.
        image: Image files, folders of images, or quoted glob patterns.
        prompt: What to ask about every image; default: to describe it in detail.
        max_new_tokens: The longest answer.
        batch_size: Questions at a time.
        budget: Read images with this mean share of their tokens, such as 0.5: those that carry most, and more of them
            of an image that holds more. For a run with objective.token_budget, or its export --with_budget.
        json: Print one JSON object per line, with answers as they are.

    Returns:
        1 if an image could not be read, else 0.
    """
    choices = [choose(source, options) for source in model]
    tell_what_was_found(choices)
    reader = Reader(find_images(image), prompt or [QUESTION])
    total = len(reader) * len(choices)
    columns = []
    with progress_bar(total, shown=total > 1) as bar:
        for number, choice in enumerate(choices):
            before = number * len(reader)
            # One model at a time: nothing else holds it, so it goes when its last reply has come.
            replies = ask(InferenceModel.of(choice, budget), reader, max_new_tokens, batch_size, bar, before)
            if len(choices) > 1:
                columns.append(list(replies))
                continue
            for row in replies:
                bar.write(_json(row._asdict()) if json else _tabbed(row))
    if columns:
        show_side_by_side(labels(choices), columns, json)
    return 1 if reader.broken else 0


def ask(
    model: InferenceModel, reader: "Reader", max_new_tokens: int, batch_size: int, bar: ProgressBar, before: int = 0
) -> Iterator[Reply]:
    """The model's answer to every question, as they come.

    Args:
        before: questions that the bar counts as done already.
    """
    done = before
    for questions in batches(reader, batch_size):
        answers = model.answers([one.image for one in questions], [one.prompt for one in questions], max_new_tokens)
        for question, answer in zip(questions, answers, strict=True):
            yield Reply(question.name, question.prompt, answer)
        done += len(questions)
        bar.show(done + len(reader.broken) * len(reader.prompts), questions[-1].name)


def show_side_by_side(names: Sequence[str], columns: Sequence[Sequence[Reply]], as_json: bool) -> None:
    """Write a table to a terminal, and else one line per question, with the names of the columns first.

    Args:
        columns: for each model, its replies; all in one order.
    """
    rows = [(replies[0], [reply.answer for reply in replies]) for replies in zip(*columns, strict=True)]
    if as_json:
        for asked, answers in rows:
            given = dict(zip(names, answers, strict=True))
            sys.stdout.write(_json({"image": asked.image, "prompt": asked.prompt, "answers": given}) + "\n")
        return
    lines = [("image", "prompt", *names), *((asked.image, asked.prompt, *answers) for asked, answers in rows)]
    if sys.stdout.isatty():
        _draw_table(lines)
    else:
        sys.stdout.writelines(f"{_tabbed(line)}\n" for line in lines)


class Question(NamedTuple):
    """A prompt about an image file that was read."""

    image: "Image"
    prompt: str
    name: str


class Reader:
    """Every prompt about every image; an image that cannot be read is reported on stderr and left out."""

    def __init__(self, images: Sequence[Path], prompts: Sequence[str]) -> None:
        self.images = images
        self.prompts = prompts
        self.broken: list[Path] = []

    def __len__(self) -> int:
        """How many questions there are if every image can be read."""
        return len(self.images) * len(self.prompts)

    def __iter__(self) -> Iterator[Question]:
        from infotok_lit.data.image_file import read_image

        for path in self.images:
            try:
                image = read_image(path)
            except BrokenSampleError as error:
                if path not in self.broken:
                    self.broken.append(path)
                    sys.stderr.write(f"infotok_lit: {error}\n")
                continue
            for prompt in self.prompts:
                yield Question(image, prompt, str(path))


def batches(questions: Iterable[Question], size: int) -> Iterator[list[Question]]:
    """Lists of `size` questions, the last one shorter; only one is held at a time."""
    remaining = iter(questions)
    while batch := list(islice(remaining, size)):
        yield batch


def find_images(given: Sequence[str]) -> list[Path]:
    """The image files behind paths, folders and glob patterns, in the order given; names are sorted within each.

    A path that does not exist stays in the list: it is reported where it would be read.

    Raises:
        MissingFileError: for a folder or a pattern without images, or if nothing given exists.
    """
    found: list[Path] = []
    for name in given:
        path = Path(name)
        if not name:
            raise MissingFileError("--image is empty: give it a path")
        if path.is_dir():
            # Not hidden ones: `._x.jpg` is what macOS notes about x.jpg on foreign disks.
            seen = (file for file in path.iterdir() if not file.name.startswith("."))
            matches = sorted(file for file in seen if file.suffix.lower() in IMAGE_SUFFIXES)
        elif not path.exists() and glob.has_magic(name):
            matches = sorted(file for file in map(Path, glob.glob(name, recursive=True)) if file.is_file())
        else:
            matches = [path]
        if not matches:
            kind = "folder" if path.is_dir() else "pattern"
            raise MissingFileError(f"no image in the {kind} {name}")
        found += matches
    if not any(path.exists() for path in found):
        raise MissingFileError(f"there is no image at {', '.join(map(str, found))}")
    return found


def _draw_table(lines: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    head, *body = ([Text(_printable(text)) for text in line] for line in lines)
    table = Table(show_lines=True)
    for name in head:
        table.add_column(name)
    for row in body:
        table.add_row(*row)
    Console().print(table)


def _json(content: dict[str, Any]) -> str:
    return json_format.dumps(content, ensure_ascii=False)


def _tabbed(fields: Sequence[str]) -> str:
    return "\t".join(_printable(field) for field in fields)


def _printable(text: str) -> str:
    return re.sub(CONTROL_CHARACTERS, " ", text)
