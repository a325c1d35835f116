"""Image geometry without torchvision: from pictures of any shape to square tensors."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

GREY, BLACK = (127, 127, 127), (0, 0, 0)


def pad_to_square(image: Image.Image) -> Image.Image:
    """Centre an image on a grey square, so that nothing of it is lost."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), GREY)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def crop_to_square(image: Image.Image, offset: float) -> Image.Image:
    """The square that starts at a fraction `offset` in [0, 1) of the free room along the longer side."""
    width, height = image.size
    side = min(width, height)
    left, top = int(offset * (width - side + 1)), int(offset * (height - side + 1))
    return image.crop((left, top, left + side, top + side))


def fit_on_square(image: Image.Image, size: int) -> Image.Image:
    """Resize an image until it fits, and centre it on a black square: nothing of it is lost."""
    scale = size / max(image.size)
    width, height = (min(size, math.ceil(side * scale)) for side in image.size)
    square = Image.new("RGB", (size, size), BLACK)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(resized, ((size - width) // 2, (size - height) // 2))
    return square


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize an image until its shorter side fits, and cut the square at its centre."""
    shorter = min(image.size)
    width, height = (int(size * side / shorter) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return resized.crop((left, top, left + size, top + size))


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """An RGB square -> (3, size, size) float32 in [-1, 1], by bicubic resizing."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return (pixels / 255 * 2 - 1).permute(2, 0, 1)
