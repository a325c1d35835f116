"""`generate`: draw images from prompts, to a PNG file, to a folder with a manifest, or for several models to a grid."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from infotok_lit.commands.parsing import Seed
from infotok_lit.errors import MissingFileError, SettingsError
from infotok_lit.files import check_target, replacing, write_whole
from infotok_lit.inference import InferenceModel, sampling_options
from infotok_lit.model_choice import ModelOptions, choose, labels, tell_what_was_found
from infotok_lit.progress import ProgressBar, progress_bar

if TYPE_CHECKING:
    import numpy as np

PNG = ".png"
OTHER_IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".tif", ".tiff", ".webp"))
MANIFEST = "manifest.json"
NUMBERED = r"\d{5,}\.png"


@dataclass(frozen=True)
class Picture:
    """One image of the request, and its entry in the manifest."""

    file: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class SamplingOptions:
    """How to draw, where it is to differ from the model's own way; not every family has every option.

    Args:
        guidance: Scale of classifier-free guidance; 1 draws without. Below 1, Harmon and Show-o2 follow the prompt less
            (Harmon at 0 not at all); OpenUni, and Show-o2 at 0, draw without guidance.
        guidance_schedule: `linear` goes from 1 up to the scale while drawing.
        iterations: Steps from noise to image.
        negative_prompt: What guidance leads away from.
        solver_steps: Steps of DPM-Solver++ for each token; 0 samples them as the official code does.
        temperature: Factor on the sampling noise.
        time_shift: Above 1, more of the iterations are near pure noise.
    """

    guidance: NonNegativeFloat | None = None
    guidance_schedule: Literal["constant", "linear"] | None = None
    iterations: PositiveInt | None = None
    negative_prompt: str | None = None
    solver_steps: NonNegativeInt | None = None
    temperature: NonNegativeFloat | None = None
    time_shift: NonNegativeFloat | None = None

    @property
    def given(self) -> dict[str, Any]:
        """Those that are given."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def generate(
    model: list[str],
    out: Path,
    options: ModelOptions,
    sampling: SamplingOptions,
    prompt: list[str] | None = None,
    prompts: Path | None = None,
    seed: Seed = 0,
    images_per_prompt: PositiveInt = 1,
    size: str | None = None,
    batch_size: PositiveInt = 8,
    force: bool = False,
) -> None:
    """Draw images from prompts: one to a PNG file, several to a folder with a manifest.json; several models' to a grid.

    Args:
        model: An exported folder, a run, an official checkpoint, a name on the Hugging Face hub, or a base that ships,
            such as harmon_scenes32; or several.
        out: x.png for one image or for several models, or a folder.
        prompt: What to draw; or several.
        prompts: A text file with more prompts, one a line.
        seed: Of the first image; image i has seed + i.
        images_per_prompt: How many.
        size: HEIGHTxWIDTH in pixels; default: the model's own.
        batch_size: Images at a time.
        force: Replace images that are there.
    """
    choices = [choose(source, options) for source in model]
    tell_what_was_found(choices)
    for choice in choices:
        sampling_options(choice.family, sampling.given)
    image_size = None if size is None else height_and_width(size)
    pictures = plan(read_prompts(prompt, prompts), images_per_prompt, seed)
    check_suits(pictures, out, force, len(choices))
    columns: list[list[np.ndarray]] = []
    with progress_bar(len(pictures) * len(choices)) as bar:
        out.parent.mkdir(parents=True, exist_ok=True)
        for choice in choices:
            report = _reporter(bar, len(columns) * len(pictures), len(pictures), batch_size)
            texts = [picture.prompt for picture in pictures]
            # One model at a time: the last one is let go before the next is loaded.
            drawn = InferenceModel(choice.load()).pictures(texts, seed, image_size, batch_size, sampling.given, report)
            if len(choices) > 1:
                columns.append(list(drawn))
            else:
                write(out, pictures, drawn)
            del drawn
        if columns:
            write_png(out, side_by_side(labels(choices), pictures, columns))
    count = "" if len(pictures) == 1 or len(choices) > 1 else f"{len(pictures)} images to "
    sys.stdout.write(f"wrote {count}{out}\n")


def _reporter(bar: ProgressBar, before: int, images: int, batch_size: int) -> Callable[[int, int, int], None]:
    """What shows (first image of a batch, iteration, iterations) on a bar, after `before` images of other models."""

    def report(start: int, done: int, rounds: int) -> None:
        end = min(start + batch_size, images)
        bar.show(before + start + (end - start) * done / rounds, f"images: {end}/{images}, iteration {done}/{rounds}")

    return report


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


def read_prompts(given: Sequence[str] | None, file: Path | None) -> list[str]:
    """The prompts of the command line, then those of a file, one a line; empty lines of the file are skipped.

    Raises:
        SettingsError: if there is no prompt at all, or the file is no text.
    """
    prompts = list(given or [])
    if file is not None:
        try:
            # Not splitlines(): that also breaks a prompt at U+2028, U+0085 and form feeds, which web texts hold.
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except FileNotFoundError as error:
            raise MissingFileError(f"there are no prompts at {file}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"the prompts in {file} cannot be read: {error}") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise SettingsError(f"there is no prompt in {file}" if file is not None else "give --prompt or --prompts")
    return prompts


def is_file(out: Path) -> bool:
    """Whether --out names one image rather than a folder."""
    return out.suffix.lower() == PNG and not out.is_dir()


def check_suits(pictures: Sequence[Picture], out: Path, force: bool, models: int = 1) -> None:
    """Refuse an --out that does not suit the images, or in which something else would be overwritten.

    Raises:
        SettingsError: saying which, and the mend.
    """
    if models > 1 and not is_file(out):
        raise SettingsError(f"the images of {models} models become one picture: call --out a {PNG} file, not {out}")
    if is_file(out):
        if len(pictures) > 1 and models == 1:
            raise SettingsError(f"{len(pictures)} images do not fit into the file {out}: give --out a folder")
        check_target(out, force)
        return
    if out.suffix.lower() in OTHER_IMAGE_SUFFIXES:
        raise SettingsError(f"images are written as PNG: call the file {out.with_suffix(PNG)}")
    if out.exists() and not out.is_dir():
        raise SettingsError(f"{out} is a file, not a folder; name a .png file for one image, or another folder")
    check_target(out / MANIFEST)
    if not out.is_dir():
        return
    if any(out.iterdir()) and not force:
        raise SettingsError(f"{out} is not empty; choose another folder, or replace its images with --force")
    ours = drawn_before(out)
    others = [name for picture in pictures if (out / (name := picture.file)).exists() and name not in ours]
    if others:
        raise SettingsError(f"{out} holds {others[0]}, which no earlier request drew: choose another folder")


def drawn_before(folder: Path) -> set[str]:
    """The images of the request whose manifest is in a folder: what may be replaced or deleted."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        names = {entry["file"] for entry in entries}
        return {name for name in names if re.fullmatch(NUMBERED, name)}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return set()


def write(out: Path, pictures: Sequence[Picture], drawn: "Iterator[np.ndarray]") -> None:
    """Write the pictures of a model into the file, or into the folder."""
    if is_file(out):
        write_png(out, *drawn)
    else:
        write_folder(out, pictures, drawn)


def write_folder(out: Path, pictures: Sequence[Picture], drawn: "Iterator[np.ndarray]") -> None:
    """Write the pictures as they come, and a manifest of those that are there, also if drawing is cut short."""
    out.mkdir(exist_ok=True)
    earlier = drawn_before(out)
    written: list[Picture] = []
    try:
        for picture, image in zip(pictures, drawn, strict=True):
            write_png(out / picture.file, image)
            written.append(picture)
    finally:
        if written:
            lines = [json.dumps(asdict(picture), ensure_ascii=False) for picture in written]
            write_whole(out / MANIFEST, ("[\n" + ",\n".join(lines) + "\n]\n").encode())
            # Left over from a longer request that --force replaced.
            for name in earlier - {picture.file for picture in written}:
                (out / name).unlink(missing_ok=True)


def height_and_width(text: str) -> tuple[int, int]:
    """(height, width) of "HxW" in pixels."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise SettingsError(f"size is {text!r}, not HEIGHTxWIDTH in pixels, such as 512x768")
    return int(match[1]), int(match[2])


def write_png(path: Path, image: "np.ndarray") -> None:
    """Write an image (height, width, 3) uint8, whole or not at all."""
    from PIL import Image

    with replacing(path) as file:
        Image.fromarray(image).save(file, format="PNG")
