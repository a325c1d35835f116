"""Ask models about images: one line per answer, `image<TAB>prompt<TAB>answer`; several models answer side by side."""

import argparse
import glob
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from infotok_lit.commands.command_line import ProgressBar, at_least, progress_bar
from infotok_lit.commands.model_choice import ModelChoice, labels

if TYPE_CHECKING:
    from infotok_lit.batch import UnderstandingSample
    from infotok_lit.models.unified import UnifiedModel

DEFAULT_PROMPT = "Describe the image in detail."
IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"))
"""What counts as an image in a folder; a file that is named is read whatever its suffix."""

CONTROL_CHARACTERS = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+"
"""Would be taken for the end of a field or of a line, or for an order to the terminal."""


class Reply(NamedTuple):
    """What a model answers to a prompt about an image file."""

    image: str
    prompt: str
    answer: str


def main(argv: Sequence[str]) -> int:
    """`describe --model DIR --image X`; 1 if an image could not be read."""
    parser = _parser()
    arguments = parser.parse_args(argv[1:])
    try:
        choices = ModelChoice.each_from_arguments(arguments)
        reader = Reader(find_images(arguments.image), arguments.prompt or [DEFAULT_PROMPT])
        model = choices[0].load()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    total = len(reader) * len(choices)
    with progress_bar(total, shown=total > 1) as bar:
        if len(choices) == 1:
            for row in ask(choices[0], model, reader, arguments, bar):
                bar.write(_json(row._asdict()) if arguments.json else _tabbed(row))
            return 1 if reader.broken else 0
        columns = [list(ask(choices[0], model, reader, arguments, bar))]
        for done, choice in enumerate(choices[1:], 1):
            # One model at a time.
            del model
            model = choice.load()
            columns.append(list(ask(choice, model, reader, arguments, bar, done * len(reader))))
    show_side_by_side(labels(choices), columns, arguments.json)
    return 1 if reader.broken else 0


def ask(
    choice: ModelChoice,
    model: "UnifiedModel",
    reader: "Reader",
    arguments: argparse.Namespace,
    bar: ProgressBar,
    before: int = 0,
) -> Iterator[Reply]:
    """The model's answer to every question, as they come.

    Args:
        before: questions that the bar counts as done already.
    """
    done = before
    for samples in batches(reader, arguments.batch_size):
        pixel_values = model.processor.pixels([sample.image for sample in samples])
        prompts = [sample.question for sample in samples]
        with choice.running(model) as device:
            answers = model.describe(pixel_values.to(device), prompts, arguments.max_new_tokens)
        for sample, answer in zip(samples, answers, strict=True):
            yield Reply(sample.name, sample.question, answer)
        done += len(samples)
        bar.show(done + len(reader.broken) * len(reader.prompts), samples[-1].name)


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


class Reader:
    """Every prompt about every image; an image that cannot be read is reported on stderr and left out."""

    def __init__(self, images: Sequence[Path], prompts: Sequence[str]) -> None:
        self.images = images
        self.prompts = prompts
        self.broken: list[Path] = []

    def __len__(self) -> int:
        """How many questions there are if every image can be read."""
        return len(self.images) * len(self.prompts)

    def __iter__(self) -> Iterator["UnderstandingSample"]:
        from infotok_lit.batch import BrokenSampleError, UnderstandingSample
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
                yield UnderstandingSample(image, question=prompt, answer="", name=str(path))


def batches(samples: Iterable["UnderstandingSample"], size: int) -> Iterator[list["UnderstandingSample"]]:
    """Lists of `size` samples, the last one shorter; only one is held at a time."""
    remaining = iter(samples)
    while batch := list(islice(remaining, size)):
        yield batch


def find_images(given: Sequence[str]) -> list[Path]:
    """The image files behind paths, folders and glob patterns, in the order given; names are sorted within each.

    A path that does not exist stays in the list: it is reported where it would be read.

    Raises:
        ValueError: for a folder or a pattern without images, or if nothing given exists.
    """
    found: list[Path] = []
    for name in given:
        path = Path(name)
        if path.is_dir():
            matches = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        elif not path.exists() and glob.has_magic(name):
            matches = sorted(file for file in map(Path, glob.glob(name, recursive=True)) if file.is_file())
        else:
            matches = [path]
        if not matches:
            kind = "folder" if path.is_dir() else "pattern"
            raise ValueError(f"no image in the {kind} {name}")
        found += matches
    if not any(path.exists() for path in found):
        raise ValueError(f"there is no image at {', '.join(map(str, found))}")
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
    return json.dumps(content, ensure_ascii=False)


def _tabbed(fields: Sequence[str]) -> str:
    return "\t".join(_printable(field) for field in fields)


def _printable(text: str) -> str:
    return re.sub(CONTROL_CHARACTERS, " ", text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m infotok_lit describe", description=__doc__)
    ModelChoice.add_arguments(parser, several=True)
    parser.add_argument(
        "--image",
        required=True,
        nargs="+",
        action="extend",
        metavar="X",
        help="image files, folders of images, or quoted glob patterns; may be given several times",
    )
    parser.add_argument(
        "--prompt", action="append", metavar="Q", help=f"asked about every image; repeatable; default: {DEFAULT_PROMPT}"
    )
    parser.add_argument("--max_new_tokens", type=at_least(1), default=64, help="longest answer; default: 64")
    parser.add_argument("--batch_size", type=at_least(1), default=8, help="questions at a time; default: 8")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line, with answers as they are")
    return parser
