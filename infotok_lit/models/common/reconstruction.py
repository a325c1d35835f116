"""Reconstruction alignment: a model generates an image from what it understands of it (Xie et al. 2025, 2509.07295).

What the families share: the request that goes with the image, the copy of the image that is understood, and the scale
of the gradient through it. Shapes: B images, D width of their tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from infotok_lit.errors import SettingsError

Condition = Literal["same_res", "low_res", "blur8"]
BLUR = 8

DESCRIBE_TEMPLATES: tuple[str, ...] = (
    "Describe this.",
    "What is here?",
    "Name all that is visible.",
    "What does the image show?",
    "Say what you see.",
    "Describe the image in detail.",
    "Give a full account of the scene.",
    "Which things are in the picture?",
    "Explain the picture to someone who cannot see it.",
    "Write a caption that leaves nothing out.",
    "Sum up the image, then go into its details.",
    "Talk me through this picture from left to right.",
    "Tell me about everything in view, near and far.",
    "How would you put this image into words?",
    "List the objects, and say how many there are of each.",
    "Describe each object with its colour and its shape.",
    "Where is each thing, and what lies beside it?",
    "What stands in front, and what is behind it?",
    "Write the prompt from which this image could be drawn.",
    "Give a painter all the information needed to copy this picture.",
    "Describe the people, animals and things, and what they are doing.",
    "Note the colours, the light and the mood of the picture.",
    "What would you have to write down to remember this image exactly?",
    "Go over the picture row by row and report what you find.",
    "Begin with the main subject, then describe what surrounds it.",
    "Is it a photograph, a painting or a drawing, and what does it depict?",
    "Describe the background as carefully as the foreground.",
    "Which materials and textures can be made out, and on which objects?",
    "Report how large the objects are compared with one another.",
    "Copy any text that appears in the image, and say where it stands.",
    "Describe the setting: the place, the time of day and the weather, if they can be told.",
    "Give the positions of the objects: what is above, below, to the left and to the right of what?",
    "State plainly what is shown. Do not guess at anything that cannot be seen.",
    "In a few sentences, cover the subject, the setting, the colours and the composition.",
    "Write a paragraph that would let a reader picture this scene without having seen it.",
    "Count what can be counted, name what can be named, and place each thing where it belongs.",
    "Imagine that the image is lost and only your words remain: what has to be said about it?",
    "Describe the style of the image, how it was made, and what draws the eye first.",
    "What is the overall impression, and which details bring it about? Mention light, shadow and contrast.",
    "For every object, give its kind, its colour, its size, its surface and its place in the picture.",
    "Look at the centre of the image first, then at its corners, and describe what is found in each of these places.",
    "Describe the image for an archive: the subject, the number of things shown, their arrangement, the palette, and "
    "the quality of the picture.",
    "Provide a description so complete that two people who read it would draw the same picture, down to the colours, "
    "the sizes and the distances between the objects.",
    "Explain what is going on, who or what takes part in it, how everything is arranged in space, and how the light "
    "falls on it.",
    "Write down what is in this image as a list of facts: objects, attributes, numbers, relations and any writing. "
    "Then add a sentence on the style and one on the background.",
    "Take your time and describe the whole image: what it is about, what each part looks like, which shapes and "
    "textures there are, how many of each thing there are, and how the parts stand to one another.",
    "Describe this picture in as much detail as you can. Include the main subject and its pose, the colours and "
    "materials, any text, the surroundings, the camera's point of view, and how sharp and how bright the picture is.",
)
"""Requests for the whole image, from a glance to an inventory; all are equally likely."""


@dataclass(frozen=True)
class ReconstructionConfig:
    """The reconstruction loss; null takes the family's own setting.

    Args:
        condition: The copy of the image that is understood: `same_res` as it is, `low_res` smaller, or `blur8` made 8
            times smaller and large again. Copying is too easy where both images share one token space and size.
        condition_size: Side of the `low_res` copy in pixels; by default half of the image's, up to a whole token.
        gradient_scale: Factor in [0, 1] on the gradient through the understood tokens; 0 stops it.
        template_swap: Share of images whose request gives way to the text of unconditional generation; the image stays.
        templates: The requests; by default a list of our own.
    """

    condition: Condition | None = None
    condition_size: int | None = None
    gradient_scale: float | None = None
    template_swap: float | None = None
    templates: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.condition not in (None, *get_args(Condition)):
            raise SettingsError(f"reconstruction.condition: {self.condition!r} is not one of {get_args(Condition)}")
        if self.condition_size is not None and self.condition_size < 1:
            raise SettingsError(f"reconstruction.condition_size is {self.condition_size}; set it to 1 or more")
        for name in ("gradient_scale", "template_swap"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise SettingsError(f"reconstruction.{name} is {value}; set it between 0 and 1")
        if self.templates is not None:
            object.__setattr__(self, "templates", tuple(self.templates))
            if not all(self.templates) or not self.templates:
                raise SettingsError("reconstruction.templates needs at least one text, and none of them empty")

    def over(self, defaults: "ReconstructionConfig") -> "ReconstructionConfig":
        """These settings, and those of `defaults` where there are none."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(defaults, **{name: value for name, value in given.items() if value is not None})


class ReconstructionInputs(NamedTuple):
    """What a reconstruction loss is computed from, beside the batch whose images are generated."""

    copies: Tensor
    """(B, 3, h, w) in [-1, 1]: the images to understand."""
    requests: Sequence[str]
    """What is asked of each; "" for the text of unconditional generation."""
    gradient_scale: float
    """Factor on the gradient through the understood tokens."""
    understood_transform: Callable[[Tensor], Tensor] | None
    """Applied to the shared tokens of the images that are understood."""
    generated_transform: Callable[[Tensor], Tensor] | None
    """Applied to the shared tokens of the images that are generated."""
    random: Any = None
    """The random numbers of the family's generation loss; drawn if not given."""


@dataclass(frozen=True)
class RandomTemplates:
    """The random numbers that decide which text goes with each image."""

    template: Tensor
    """(B,) in [0, 1): the place in the list of templates."""
    swap: Tensor
    """(B,) in [0, 1): below `template_swap`, the text of unconditional generation."""


def random_templates(batch: int) -> RandomTemplates:
    """New ones, on the CPU, where texts become ids."""
    return RandomTemplates(torch.rand(batch), torch.rand(batch))


def choose_templates(numbers: RandomTemplates, config: ReconstructionConfig) -> list[str]:
    """The request that goes with each image; "" for the text of unconditional generation."""
    templates = config.templates or DESCRIBE_TEMPLATES
    chosen = [templates[int(place * len(templates))] for place in numbers.template.tolist()]
    return [
        "" if swap < config.template_swap else text for swap, text in zip(numbers.swap.tolist(), chosen, strict=True)
    ]


def condition_pixels(pixel_values: Tensor, config: ReconstructionConfig, step: int) -> Tensor:
    """The copies (B, 3, h, w) that are understood, of images (B, 3, height, width) in [-1, 1].

    Args:
        step: pixels per side of a token.
    """
    sides = pixel_values.shape[2:]
    if config.condition == "same_res":
        return pixel_values
    if config.condition == "blur8":
        return _resize(_resize(pixel_values, [max(1, side // BLUR) for side in sides]), sides)
    return _resize(pixel_values, [config.condition_size or step * -(-side // (2 * step)) for side in sides])


def scale_gradient(tokens: Tensor, scale: float | None) -> Tensor:
    """The same tokens, with the gradient through them multiplied by `scale`; None leaves it alone."""
    return tokens if scale is None else tokens.detach() + scale * (tokens - tokens.detach())


def graph_unless_stopped(scale: float) -> AbstractContextManager:
    """A context in which nothing is kept for a gradient that a scale of 0 would stop."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and scale > 0)


def _resize(images: Tensor, sides: list[int] | torch.Size) -> Tensor:
    return F.interpolate(images, size=tuple(sides), mode="bilinear", antialias=True, align_corners=False)
