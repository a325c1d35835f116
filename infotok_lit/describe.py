"""Ask a model about images: one line per answer, `image<TAB>prompt<TAB>answer`."""

import argparse
import glob
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from infotok_lit.command_line import at_least, progress_bar
from infotok_lit.inference import ModelChoice

if TYPE_CHECKING:
    from infotok_lit.data.sample import UnderstandingSample

DEFAULT_PROMPT = "Describe the image in detail."
IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"))
"""What counts as an image in a folder; a file that is named is read whatever its suffix."""

CONTROL_CHARACTERS = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+"
"""Would be taken for the end of a field or of a line, or for an order to the terminal."""


def main(argv: Sequence[str]) -> int:
    """`describe --model DIR --image X`; 1 if an image could not be read."""
    parser = _parser()
    arguments = parser.parse_args(argv[1:])
    try:
        choice = ModelChoice.from_arguments(arguments)
        images = find_images(arguments.image)
        model = choice.load()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    prompts = arguments.prompt or [DEFAULT_PROMPT]
    total, done = len(images) * len(prompts), 0
    reader = Reader(images, prompts)
    with progress_bar(total, shown=total > 1) as bar, choice.running(model) as device:
        for samples in batches(reader, arguments.batch_size):
            batch = model.processor.understanding(samples)
            answers = model.describe(batch.pixel_values.to(device), batch.questions, arguments.max_new_tokens)
            for sample, answer in zip(samples, answers, strict=True):
                bar.write(_line(sample.name, sample.question, answer, arguments.json))
            done += len(samples)
            bar.show(done + len(reader.broken) * len(prompts), samples[-1].name)
    return 1 if reader.broken else 0


class Reader:
    """Every prompt about every image; an image that cannot be read is reported on stderr and left out."""

    def __init__(self, images: Sequence[Path], prompts: Sequence[str]) -> None:
        self.images = images
        self.prompts = prompts
        self.broken: list[Path] = []

    def __iter__(self) -> Iterator["UnderstandingSample"]:
        from infotok_lit.data.image_file import read_image
        from infotok_lit.data.sample import BrokenSampleError, UnderstandingSample

        for path in self.images:
            try:
                image = read_image(path)
            except BrokenSampleError as error:
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


def _line(image: str, prompt: str, answer: str, as_json: bool) -> str:
    if as_json:
        return json.dumps({"image": image, "prompt": prompt, "answer": answer}, ensure_ascii=False)
    return "\t".join(re.sub(CONTROL_CHARACTERS, " ", field) for field in (image, prompt, answer))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m infotok_lit describe", description=__doc__)
    ModelChoice.add_arguments(parser)
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
