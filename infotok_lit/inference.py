"""Models for use: load one, ask it about images, and have it draw.

    model = infotok_lit.load("runs/quickstart/version_0")
    model.describe(image, "what shape is the red object?")
    model.generate("a red circle above a blue square").save("picture.png")

Nothing heavy is imported before a model is loaded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from infotok_lit.batch import BrokenSampleError
from infotok_lit.errors import SettingsError
from infotok_lit.model_choice import PARTS, ModelChoice, ModelOptions, choose
from infotok_lit.models.common.model_config import check_type, entry_types
from infotok_lit.models.export import DType
from infotok_lit.models.family import family as family_called

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image

    from infotok_lit.batch import UnderstandingBatch
    from infotok_lit.models.unified import UnifiedModel
    from infotok_lit.modules.token_budget import TokenSelector

QUESTION = "Describe the image in detail."
NOT_FINITE = (
    "what was drawn is no picture: its numbers are not finite. Draw with less guidance, temperature or time_shift, or "
    "see whether the model's weights and its config.json are whole"
)


def load(
    source: str | Path,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: DType = "float32",
    family: str | None = None,
    model_size: str | None = None,
    parts: Mapping[str, str | Path] | None = None,
    tokenizer: str | None = None,
    budget: float | None = None,
) -> "InferenceModel":
    """A model to use.

    Args:
        source: An exported folder, a run, or its name on the Hugging Face hub; a base that ships, such as
            `harmon_scenes32`; or an official checkpoint, with the options from `family` on.
        device: `auto` is cuda if there is one.
        dtype: Of the weights.
        family: `harmon`, `showo2` or `openuni`; the others are as in ModelOptions.
        parts: By name: `autoencoder`, `vlm`, `transformer`.
        budget: Read images with this mean share of their tokens (docs/budgets.md); default: with all.

    Raises:
        ExplainedError: if it cannot be loaded; the message says why.
    """
    unknown = sorted(set(parts or {}) - set(PARTS))
    if unknown:
        raise SettingsError(f"parts: there is no {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if dtype not in get_args(DType):
        raise SettingsError(f"dtype is {dtype!r}; choose one of {', '.join(get_args(DType))}")
    files = {name: str(path) for name, path in (parts or {}).items()}
    options = ModelOptions(family, model_size, tokenizer=tokenizer, device=device, dtype=dtype, **files)
    return InferenceModel.of(choose(source, options), budget)


class InferenceModel:
    """A loaded model, without gradients and in the precision of its weights.

    Args:
        base: In evaluation mode, on its device.
        selector: Which tokens of images are read; None for all.
    """

    def __init__(self, base: "UnifiedModel", selector: "TokenSelector | None" = None) -> None:
        self.base = base
        self.selector = selector

    @classmethod
    def of(cls, choice: ModelChoice, budget: float | None = None) -> "InferenceModel":
        """Load a model; `budget` is as for `load`."""
        base = choice.load()
        return cls(base, None if budget is None else choice.token_selector(base, budget))

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
        if not one_image and len(shown) != len(asked):
            raise SettingsError(
                f"{len(asked)} questions about {len(shown)} images: give one question for all, or one for each"
            )
        pictures = [_rgb(image) for image in shown] * (len(asked) if one_image else 1)
        answers = [
            answer
            for start in range(0, len(asked), at_least(1, batch_size, "batch_size"))
            for answer in self.answers(
                pictures[start : start + batch_size], asked[start : start + batch_size], max_new_tokens
            )
        ]
        return answers[0] if one_image and isinstance(questions, str) else answers

    def answers(self, images: "Sequence[Image]", questions: Sequence[str], max_new_tokens: int = 64) -> list[str]:
        """One answer per RGB image and question, in one batch; SettingsError for a question that cannot be asked."""
        at_least(1, max_new_tokens, "max_new_tokens")
        with self.running() as device:
            try:
                return self.read(self.base.processor.pixels(images).to(device), questions, max_new_tokens)
            except BrokenSampleError as error:
                raise SettingsError(str(error)) from error

    def read(
        self,
        pixels: "torch.Tensor",
        questions: Sequence[str],
        max_new_tokens: int,
        image_of: Sequence[int] | None = None,
    ) -> list[str]:
        """`describe` of the base model, at the budget that there is; call it inside `running`."""
        if self.selector is None:
            return self.base.describe(pixels, questions, max_new_tokens, image_of=image_of)
        tokens = self.base.tokens_to_describe(pixels)
        kept = self.selector(tokens)
        return self.base.describe_tokens(tokens, questions, max_new_tokens, image_of=image_of, kept=kept)

    def answer_loss(self, batch: "UnderstandingBatch") -> float:
        """Nats per token of a batch's answers, at the budget that there is; call it inside `running`."""
        if self.selector is None:
            output = self.base.understanding(batch)
            return float(output.loss_sum / output.loss_count)
        from torch.nn.functional import cross_entropy

        tokens = self.base.tokens_to_describe(batch.pixel_values)
        logits, wanted = self.base.answer_logits(batch, tokens, kept=self.selector(tokens))
        return float(cross_entropy(logits.float(), wanted))

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
            SettingsError: for an option or a size that the model does not have, or a picture that is not finite.
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
        progress: Callable[[int, int, int], None] | None = None,
    ) -> "Iterator[np.ndarray]":
        """What `generate` draws, as it comes: (height, width, 3) uint8 each.

        Args:
            progress: called with the first image of a batch, the iteration and how many there are.
        """
        from infotok_lit.pictures import to_uint8

        sampling = replace(self.base.config.sampling, **sampling_options(self.base.family, options))
        for start in range(0, len(prompts), at_least(1, batch_size, "batch_size")):
            report = None if progress is None else partial(progress, start)
            batch = prompts[start : start + batch_size]
            with self.running():
                images = self.base.generate(batch, seed + start, sampling, image_size, report)
                if not images.isfinite().all():
                    raise SettingsError(NOT_FINITE)
            yield from to_uint8(images)

    @contextmanager
    def running(self) -> "Iterator[torch.device]":
        """Where the model is called: without gradients, in the precision of its weights. Yields its device."""
        import torch

        from infotok_lit.models.common.language_model import without_cudnn_attention

        weight = next(self.base.parameters())
        low = weight.dtype != torch.float32
        kind = weight.device.type
        with (
            torch.inference_mode(),
            torch.autocast(kind, weight.dtype if low else None, enabled=low),
            without_cudnn_attention(),
        ):
            yield weight.device


def sampling_options(family: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of sampling, checked: SettingsError for one that the family does not draw with, or another type."""
    known = entry_types(family_called(family).sampling)
    for name, value in given.items():
        if name not in known:
            raise SettingsError(f"{name} means nothing to a {family} model, which draws with {', '.join(known)}")
        check_type(name, value, known[name])
    return dict(given)


def at_least(minimum: int, value: int, name: str) -> int:
    """The value; SettingsError if it is below the minimum."""
    if value < minimum:
        raise SettingsError(f"{name} is {value}; set it to {minimum} or more")
    return value


def _rgb(image: "Image | str | Path") -> "Image":
    """An image as the commands see it: upright, opaque, RGB."""
    from infotok_lit.data.image_file import read_image, to_rgb

    return read_image(Path(image)) if isinstance(image, (str, Path)) else to_rgb(image)
