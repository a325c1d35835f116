"""Models for use: find one by folder, run, file or name, load it, ask it about images, and have it draw.

    model = infotok_lit.load("runs/quickstart/version_0")
    model.describe(image, "what shape is the red object?")
    model.generate("a red circle above a blue square").save("picture.png")

Nothing heavy is imported before a model is loaded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from infotok_lit.checkpoints import CHECKPOINT_KEY, CheckpointError, exported_family, find_checkpoint, read_run
from infotok_lit.errors import MissingFileError, SettingsError
from infotok_lit.hub import fetch
from infotok_lit.models.export import DType
from infotok_lit.models.family import families, family_config, family_loading
from infotok_lit.weight_files import read_pickle

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image

    from infotok_lit.models.unified import UnifiedModel

QUESTION = "Describe the image in detail."
PARTS = ("autoencoder", "vlm", "transformer")
"""Official files that some family needs beside its main one."""
Progress = Callable[[int, int, int], None]
"""(first image of a batch, iteration, iterations) -> None."""


@dataclass(frozen=True)
class ModelOptions:
    """What an official checkpoint does not say about itself, and where a model runs.

    Args:
        family: Official checkpoint: its family.
        model_size: Official checkpoint: its size, such as 0.5b.
        autoencoder: Official checkpoint: the file or folder of its image autoencoder.
        vlm: Official checkpoint: the folder of OpenUni's InternVL3.
        transformer: Official checkpoint: the folder of OpenUni's SANA, if it holds none.
        tokenizer: Official checkpoint: folder or hub name of its tokenizer; default: that of the size.
        device: Where to run; `auto` is cuda if there is one.
        dtype: Of the weights.
    """

    family: str | None = None
    model_size: str | None = None
    autoencoder: str | None = None
    vlm: str | None = None
    transformer: str | None = None
    tokenizer: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: DType = "float32"

    @property
    def parts(self) -> dict[str, str]:
        """The official files that are given, by name."""
        return {name: getattr(self, name) for name in PARTS if getattr(self, name) is not None}

    @property
    def of_official(self) -> list[str]:
        """The options given that only an official checkpoint needs."""
        names = ("family", "model_size", *PARTS, "tokenizer")
        return [name for name in names if getattr(self, name) is not None]


@dataclass(frozen=True)
class ModelChoice:
    """A model that is there, not loaded yet.

    Args:
        source: As it was named.
        path: The exported folder, the run's checkpoint, or the official file or folder.
        family: The family that it belongs to.
        is_run: Whether it is a run's checkpoint.
    """

    source: str
    path: Path
    family: str
    is_run: bool
    options: ModelOptions

    def load(self) -> "InferenceModel":
        """The model in evaluation mode: read on the CPU, then moved.

        Raises:
            ExplainedError: if the weights do not fit, a file is missing, or there is no such device.
        """
        import torch

        device = chosen_device(self.options.device)
        model = self._read()
        # Parameters only: buffers are tables (frequencies, bases) that lose their meaning in few bits.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, self.options.dtype))
        return InferenceModel(model.to(device).eval())

    def _read(self) -> "UnifiedModel":
        if self.is_run:
            from infotok_lit.modules.base_model import rebuild_base

            return rebuild_base(read_run(self.path))
        loading, size = family_loading(self.family), self.options.model_size
        if size is not None:
            parts = {name: fetch(path) for name, path in self.options.parts.items()}
            return loading.from_official(self.path, size, parts, self.options.tokenizer)
        try:
            return loading.from_folder(self.path)
        except (TypeError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(f"the config.json in {self.path} describes no model: {error}") from error


def choose(source: str | Path, options: ModelOptions = ModelOptions()) -> ModelChoice:
    """The model behind a name, checked as far as that is possible without reading weights.

    Args:
        source: An exported folder; a run, or one of its checkpoints; an official file or folder, with its family and
            size in the options; or any of these by its name on the Hugging Face hub (hub.py).

    Raises:
        MissingFileError: if there is none.
        SettingsError: naming what is missing or does not belong, and the mend.
    """
    name, path = str(source), fetch(source)
    if not path.exists():
        raise MissingFileError(f"there is no model at {path}")
    exported = exported_family(path)
    if exported is not None:
        _refuse_official_options(name, "an exported folder", options)
        return ModelChoice(name, path, _known(exported, path), False, options)
    if options.family is not None:
        return ModelChoice(name, path, _official_family(path, options), False, options)
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise SettingsError(
            f"{path} is neither an exported folder nor a run: name one of these, or an official checkpoint with "
            f"--family ({', '.join(families())}) and --model_size"
        )
    _refuse_official_options(name, "a run", options)
    family = read_pickle(checkpoint, mmap=True)[CHECKPOINT_KEY].get("family")
    return ModelChoice(name, checkpoint, _known(family, checkpoint), True, options)


def labels(choices: Sequence[ModelChoice]) -> list[str]:
    """What tells models apart: the last parts of their names, or where those are equal, the whole names."""
    names = [Path(choice.source).absolute().name for choice in choices]
    return [name if names.count(name) == 1 else choice.source for name, choice in zip(names, choices, strict=True)]


def load(
    source: str | Path,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: DType = "float32",
    family: str | None = None,
    model_size: str | None = None,
    parts: Mapping[str, str | Path] | None = None,
    tokenizer: str | None = None,
) -> "InferenceModel":
    """A model to use.

    Args:
        source: An exported folder, a run, or the name of an exported folder on the Hugging Face hub; or an official
            checkpoint, with the options from `family` on.
        device: `auto` is cuda if there is one.
        dtype: Of the weights.
        family: `harmon`, `showo2` or `openuni`.
        model_size: Such as `0.5b`.
        parts: Official files that the family needs beside the main one, by name: `autoencoder`, `vlm`, `transformer`.
        tokenizer: Folder or hub name; default: that of the size.

    Raises:
        ExplainedError: if it cannot be loaded; the message says why.
    """
    unknown = sorted(set(parts or {}) - set(PARTS))
    if unknown:
        raise SettingsError(f"parts: there is no {', '.join(unknown)}; there are {', '.join(PARTS)}")
    files = {name: str(path) for name, path in (parts or {}).items()}
    options = ModelOptions(family, model_size, tokenizer=tokenizer, device=device, dtype=dtype, **files)
    return choose(source, options).load()


class InferenceModel:
    """A loaded model, without gradients and in the precision of its weights.

    Args:
        base: In evaluation mode, on its device.
    """

    def __init__(self, base: "UnifiedModel") -> None:
        self.base = base

    def describe(
        self,
        images: "Image | str | Path | Sequence[Image | str | Path]",
        questions: str | Sequence[str] = QUESTION,
        *,
        max_new_tokens: int = 64,
        batch_size: int = 8,
    ) -> str | list[str]:
        """Answer questions about images, greedily.

        Args:
            images: PIL images or image files: one, or several.
            questions: One, which is asked about every image; or several: one per image, or all about the only image.
            max_new_tokens: The longest answer.
            batch_size: Questions at a time.

        Returns:
            One answer for one image and one question, else a list.

        Raises:
            SettingsError: for other numbers of questions than of images.
            BrokenSampleError: for a file that is no image.
        """
        one_image = not isinstance(images, Sequence) or isinstance(images, str)
        shown = [images] if one_image else list(images)
        asked = [questions] * len(shown) if isinstance(questions, str) else list(questions)
        if one_image:
            shown *= len(asked)
        if len(shown) != len(asked):
            raise SettingsError(
                f"{len(asked)} questions about {len(shown)} images: give one question for all, or one for each"
            )
        pictures = [_rgb(image) for image in shown]
        answers = [
            answer
            for start in range(0, len(asked), at_least(1, batch_size, "batch_size"))
            for answer in self.answers(
                pictures[start : start + batch_size], asked[start : start + batch_size], max_new_tokens
            )
        ]
        return answers[0] if one_image and isinstance(questions, str) else answers

    def answers(self, images: "Sequence[Image]", questions: Sequence[str], max_new_tokens: int = 64) -> list[str]:
        """One answer per RGB image and question, in one batch."""
        at_least(1, max_new_tokens, "max_new_tokens")
        with self.running() as device:
            pixels = self.base.processor.pixels(images).to(device)
            return self.base.describe(pixels, questions, max_new_tokens)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        image_size: tuple[int, int] | None = None,
        batch_size: int = 8,
        options: Mapping[str, Any] | None = None,
    ) -> "Image | list[Image]":
        """Draw images; image i depends on its prompt and on seed + i, not on the others.

        Args:
            prompts: One, or several.
            seed: Of the first image.
            image_size: (height, width) in pixels; default: the model's own.
            batch_size: Images at a time.
            options: How to draw, such as `guidance` and `iterations`, where it is to differ from the model's own.

        Returns:
            One PIL image for one prompt, else a list.

        Raises:
            SettingsError: for an option or a size that the model does not have.
        """
        from PIL import Image

        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        drawn = self.pictures(texts, seed, image_size, batch_size, options or {})
        images = [Image.fromarray(picture) for picture in drawn]
        return images[0] if isinstance(prompts, str) else images

    def pictures(
        self,
        prompts: Sequence[str],
        seed: int,
        image_size: tuple[int, int] | None,
        batch_size: int,
        options: Mapping[str, Any],
        progress: Progress | None = None,
    ) -> "Iterator[np.ndarray]":
        """What `generate` draws, as it comes: (height, width, 3) uint8 each."""
        from infotok_lit.pictures import to_uint8

        drawing = replace(self.base.config.drawing, **drawing_options(self.base.family, options))
        for start in range(0, len(prompts), at_least(1, batch_size, "batch_size")):
            report = None if progress is None else _from(progress, start)
            batch = prompts[start : start + batch_size]
            with self.running():
                images = self.base.generate(batch, seed + start, drawing, image_size, report)
            yield from to_uint8(images)

    @contextmanager
    def running(self) -> "Iterator[torch.device]":
        """Where the model is called: without gradients, in the precision of its weights. Yields its device."""
        import torch

        weight = next(self.base.parameters())
        low = weight.dtype != torch.float32
        with torch.inference_mode(), torch.autocast(weight.device.type, weight.dtype if low else None, enabled=low):
            yield weight.device


def drawing_options(family: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of drawing, checked: SettingsError for one that the family does not draw with."""
    known = [field.name for field in fields(family_config(family).DrawingConfig)]
    for name in given:
        if name not in known:
            raise SettingsError(f"{name} means nothing to a {family} model, which draws with {', '.join(known)}")
    return dict(given)


def chosen_device(name: Literal["auto", "cpu", "cuda"]) -> str:
    """`cpu` or `cuda`; SettingsError if there is none."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("there is no CUDA device here: leave out device, or set it to cpu")
    return name


def at_least(minimum: int, value: int, name: str) -> int:
    """The value; SettingsError if it is below the minimum."""
    if value < minimum:
        raise SettingsError(f"{name} is {value}; set it to {minimum} or more")
    return value


def _rgb(image: "Image | str | Path") -> "Image":
    """An image as the commands see it: upright, opaque, RGB."""
    from io import BytesIO

    from PIL import ImageOps

    from infotok_lit.data.image_file import read_image

    if isinstance(image, (str, Path)):
        return read_image(Path(image))
    image = ImageOps.exif_transpose(image)
    if image.mode not in ("1", "L", "LA", "P", "RGBA", "I", "I;16"):
        return image.convert("RGB")
    buffer = BytesIO()
    image.save(buffer, format="PNG", compress_level=0)
    return read_image(buffer.getvalue(), "the image")


def _from(progress: Progress, start: int) -> Callable[[int, int], None]:
    return lambda done, iterations: progress(start, done, iterations)


def _known(family: object, path: Path) -> str:
    if family not in families():
        raise SettingsError(f"{path} holds a model of family {family!r}; this version knows {', '.join(families())}")
    return family


def _official_family(path: Path, options: ModelOptions) -> str:
    family, size = _known(options.family, path), options.model_size
    known = family_config(family)
    sizes = get_args(known.Size)
    if size not in sizes:
        wrong = "needs its --model_size" if size is None else f"of family {family} has no size {size!r}"
        raise SettingsError(f"the official checkpoint {path} {wrong}: choose one of {', '.join(sizes)}")
    for name, part in options.parts.items():
        if name not in known.PARTS:
            raise SettingsError(f"--{name} means nothing to a {family} checkpoint: leave it out")
        if not fetch(part).exists():
            raise MissingFileError(f"there is no {name} at {part}")
    return family


def _refuse_official_options(name: str, what: str, options: ModelOptions) -> None:
    if options.of_official:
        given = ", ".join(f"--{option}" for option in options.of_official)
        raise SettingsError(f"{name} is {what}, which brings everything: leave out {given}")
