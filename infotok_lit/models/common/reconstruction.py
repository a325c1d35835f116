"""Reconstruction alignment: a model draws an image from what it understands of it (Xie et al. 2025, arXiv 2509.07295).

What the families share: the request that goes with the image, the copy of the image that is understood, and the scale
of the gradient through it. Shapes: B images, D width of their tokens.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from infotok_lit.models.common.describe_templates import DESCRIBE_TEMPLATES

Condition = Literal["same_res", "low_res", "blur8"]
BLUR = 8


@dataclass(frozen=True)
class ReconstructionConfig:
    """The reconstruction loss; null takes the family's own setting.

    Args:
        condition: The copy of the image that is understood: `same_res` as it is, `low_res` smaller, or `blur8` made 8
            times smaller and large again. Copying is too easy where both images share one token space and size.
        condition_size: Side of the `low_res` copy in pixels; by default half of the image's, up to a whole token.
        gradient_scale: Factor in [0, 1] on the gradient through the understood tokens; 0 stops it.
        template_swap: Share of images whose request gives way to the text of unconditional drawing; the image stays.
        templates: The requests; by default a list of our own.
    """

    condition: Condition | None = None
    condition_size: int | None = None
    gradient_scale: float | None = None
    template_swap: float | None = None
    templates: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.condition not in (None, *get_args(Condition)):
            raise ValueError(f"reconstruction.condition: {self.condition!r} is not one of {get_args(Condition)}")
        if self.condition_size is not None and self.condition_size < 1:
            raise ValueError(f"reconstruction.condition_size is {self.condition_size}; set it to 1 or more")
        for name in ("gradient_scale", "template_swap"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"reconstruction.{name} is {value}; set it between 0 and 1")
        if self.templates is not None:
            object.__setattr__(self, "templates", tuple(self.templates))
            if not all(self.templates) or not self.templates:
                raise ValueError("reconstruction.templates needs at least one text, and none of them empty")

    def over(self, defaults: "ReconstructionConfig") -> "ReconstructionConfig":
        """These settings, and those of `defaults` where there are none."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(defaults, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class TemplateDraws:
    """Which text goes with each image."""

    template: Tensor
    """(B,) in [0, 1): the place in the list of templates."""
    swap: Tensor
    """(B,) in [0, 1): below `template_swap`, the text of unconditional drawing."""


def draw_templates(batch: int) -> TemplateDraws:
    """Draws on the CPU, where texts become ids."""
    return TemplateDraws(torch.rand(batch), torch.rand(batch))


def choose_templates(draws: TemplateDraws, config: ReconstructionConfig) -> list[str]:
    """The request that goes with each image; "" for the text of unconditional drawing."""
    templates = config.templates or DESCRIBE_TEMPLATES
    chosen = [templates[int(place * len(templates))] for place in draws.template.tolist()]
    return ["" if swap < config.template_swap else text for swap, text in zip(draws.swap.tolist(), chosen, strict=True)]


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
