"""Draw images from prompts: one to a PNG file, several to a folder with a manifest.json; several models' to a grid."""

import argparse
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infotok_lit.commands.command_line import ShowProgress, at_least, progress_bar
from infotok_lit.commands.model_choice import ModelChoice, labels
from infotok_lit.files import write_whole
from infotok_lit.models.family import family as family_called

if TYPE_CHECKING:
    import numpy as np

    from infotok_lit.models.unified import UnifiedModel

PNG = ".png"
OTHER_IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".tif", ".tiff", ".webp"))
MANIFEST = "manifest.json"
NUMBERED = r"\d{5,}\.png"
DRAWING_OPTIONS = ("guidance", "guidance_schedule", "iterations", "negative_prompt", "temperature", "time_shift")
"""Options of the command that are fields of a family's SamplingConfig; a family need not have all of them."""


@dataclass(frozen=True)
class Picture:
    """One image of the request, and its entry in the manifest."""

    file: str
    prompt: str
    seed: int


def main(argv: Sequence[str]) -> int:
    """`generate --model DIR --prompt P --out x.png`."""
    parser = _parser()
    arguments = parser.parse_args(argv[1:])
    try:
        choices = ModelChoice.each_from_arguments(arguments)
        options = [drawing_overrides(choice.family, arguments) for choice in choices]
        pictures = plan(read_prompts(arguments.prompt, arguments.prompts), arguments.images_per_prompt, arguments.seed)
        check_target(arguments.out, len(pictures), arguments.force, len(choices))
        model = choices[0].load()
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with progress_bar(len(pictures) * len(choices)) as bar:
            drawn = drawn_by(choices[0], model, options[0], pictures, arguments, bar.show)
            if len(choices) == 1:
                write = write_file if is_file(arguments.out) else write_folder
                write(arguments.out, pictures, drawn)
            else:
                columns = [list(drawn)]
                for choice, own in zip(choices[1:], options[1:], strict=True):
                    # One model at a time.
                    del model, drawn
                    model, before = choice.load(), len(columns) * len(pictures)
                    drawn = drawn_by(choice, model, own, pictures, arguments, bar.show, before)
                    columns.append(list(drawn))
                write_whole(arguments.out, _png(side_by_side(labels(choices), pictures, columns)))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    count = "" if len(pictures) == 1 or len(choices) > 1 else f"{len(pictures)} images to "
    sys.stdout.write(f"wrote {count}{arguments.out}\n")
    return 0


def drawn_by(
    choice: ModelChoice,
    model: "UnifiedModel",
    options: dict[str, Any],
    pictures: Sequence[Picture],
    arguments: argparse.Namespace,
    show_progress: ShowProgress,
    before: int = 0,
) -> "Iterator[np.ndarray]":
    """The pictures of one model in order, (height, width, 3) uint8 each.

    Args:
        before: pictures of other models that the progress counts as done already.
    """
    sampling = replace(model.config.sampling, **options)

    def show(done: float, what: str) -> None:
        show_progress(before + done, what)

    with choice.running(model):
        yield from draw(model, pictures, sampling, arguments.size, arguments.batch_size, show)


def side_by_side(
    names: Sequence[str], pictures: Sequence[Picture], columns: "Sequence[Sequence[np.ndarray]]"
) -> "np.ndarray":
    """A grid with one row per picture and one column per model; under each image, its model and its prompt."""
    import numpy as np

    from infotok_lit.pictures import TILE, captioned_grid

    images = [image for row in zip(*columns, strict=True) for image in row]
    texts = [f"{name}: {picture.prompt} (seed {picture.seed})" for picture in pictures for name in names]
    tile = max(TILE, *(max(image.shape[:2]) for image in images))
    return np.asarray(captioned_grid(images, texts, len(columns), tile))


def plan(prompts: Sequence[str], images_per_prompt: int, seed: int) -> list[Picture]:
    """Every image of the request: those of a prompt one after another, image i with seed + i."""
    repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    return [Picture(f"{i:05d}{PNG}", prompt, seed + i) for i, prompt in enumerate(repeated)]


def draw(
    model: "UnifiedModel",
    pictures: Sequence[Picture],
    sampling: Any,
    image_size: tuple[int, int] | None,
    batch_size: int,
    show_progress: ShowProgress,
) -> "Iterator[np.ndarray]":
    """The pictures in order, (height, width, 3) uint8 each; how they are batched does not matter."""
    from infotok_lit.pictures import to_uint8

    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        report = _reporter(show_progress, start, len(batch), len(pictures))
        prompts = [picture.prompt for picture in batch]
        yield from to_uint8(model.generate(prompts, batch[0].seed, sampling, image_size, report))


def drawing_overrides(family: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The drawing options that were given.

    Raises:
        ValueError: for one that the family does not draw with.
    """
    given = {name: getattr(arguments, name) for name in DRAWING_OPTIONS if getattr(arguments, name) is not None}
    known = [field.name for field in fields(family_called(family).sampling)]
    for name in given:
        if name not in known:
            raise ValueError(f"--{name} means nothing to a {family} model, which draws with {', '.join(known)}")
    return given


def read_prompts(given: Sequence[str] | None, file: Path | None) -> list[str]:
    """The prompts of the command line, then those of a file, one a line; empty lines of the file are skipped.

    Raises:
        ValueError: if there is no prompt at all.
    """
    prompts = list(given or [])
    if file is not None:
        prompts += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"there is no prompt in {file}" if file is not None else "give --prompt or --prompts")
    return prompts


def is_file(out: Path) -> bool:
    """Whether --out names one image rather than a folder."""
    return out.suffix.lower() == PNG and not out.is_dir()


def check_target(out: Path, count: int, force: bool, models: int = 1) -> None:
    """Refuse an --out that does not suit the number of images or would overwrite something.

    Raises:
        ValueError: saying which, and the mend.
    """
    if models > 1 and not is_file(out):
        raise ValueError(f"the images of {models} models become one picture: call --out a {PNG} file, not {out}")
    if is_file(out):
        if count > 1 and models == 1:
            raise ValueError(f"{count} images do not fit into the file {out}: give --out a folder")
        if out.exists() and not force:
            raise ValueError(f"{out} exists; choose another file, or replace it with --force")
        return
    if out.suffix.lower() in OTHER_IMAGE_SUFFIXES:
        raise ValueError(f"images are written as PNG: call the file {out.with_suffix(PNG)}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, not a folder; name a .png file for one image, or another folder")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise ValueError(f"{out} is not empty; choose another folder, or replace its images with --force")


def write_file(out: Path, pictures: Sequence[Picture], drawn: "Iterator[np.ndarray]") -> None:
    """Write the only picture."""
    (image,) = drawn
    write_whole(out, _png(image))


def write_folder(out: Path, pictures: Sequence[Picture], drawn: "Iterator[np.ndarray]") -> None:
    """Write the pictures as they come, and a manifest of those that are there, also if drawing is cut short."""
    out.mkdir(exist_ok=True)
    written: list[Picture] = []
    try:
        for picture, image in zip(pictures, drawn, strict=True):
            write_whole(out / picture.file, _png(image))
            written.append(picture)
    finally:
        if written:
            lines = [json.dumps(asdict(picture), ensure_ascii=False) for picture in written]
            write_whole(out / MANIFEST, ("[\n" + ",\n".join(lines) + "\n]\n").encode())
    names = {picture.file for picture in written}
    for file in out.iterdir():
        if re.fullmatch(NUMBERED, file.name) and file.name not in names:
            # Left over from a longer request that --force replaced.
            file.unlink()


def height_and_width(text: str) -> tuple[int, int]:
    """An argparse type: (height, width) of "HxW" in pixels."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH in pixels, such as 512x768")
    return int(match[1]), int(match[2])


def _reporter(show_progress: ShowProgress, before: int, size: int, total: int) -> Callable[[int, int], None]:
    """The model's (round, rounds) over one batch -> progress over all images."""

    def report(done: int, rounds: int) -> None:
        show_progress(before + size * done / rounds, f"images: {before + size}/{total}, iteration {done}/{rounds}")

    return report


def _png(image: "np.ndarray") -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m infotok_lit generate", description=__doc__)
    ModelChoice.add_arguments(parser, several=True)
    parser.add_argument("--prompt", action="append", metavar="P", help="what to draw; repeatable")
    parser.add_argument("--prompts", type=Path, metavar="FILE.txt", help="more prompts, one a line")
    parser.add_argument(
        "--out", required=True, type=Path, help="x.png for one image or for several models, or a folder"
    )
    parser.add_argument("--force", action="store_true", help="replace images that are there")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the first image; image i has seed + i")
    parser.add_argument("--images_per_prompt", type=at_least(1), default=1, help="default: 1")
    parser.add_argument("--batch_size", type=at_least(1), default=8, help="images at a time; default: 8")
    parser.add_argument(
        "--size", type=height_and_width, metavar="HxW", help="height and width in pixels; default: the model's own"
    )
    drawing = parser.add_argument_group("drawing", "default: the model's own")
    drawing.add_argument(
        "--guidance", type=at_least(0, float), help="classifier-free guidance scale; 1 draws without guidance"
    )
    drawing.add_argument(
        "--guidance_schedule", choices=("constant", "linear"), help="linear: from 1 up to the scale while drawing"
    )
    drawing.add_argument("--iterations", type=at_least(1), help="steps from noise to image")
    drawing.add_argument("--negative_prompt", metavar="P", help="what guidance leads away from")
    drawing.add_argument("--temperature", type=at_least(0, float), help="factor on the sampling noise")
    drawing.add_argument(
        "--time_shift", type=at_least(0, float), help="above 1: more of the iterations are near pure noise"
    )
    return parser
