"""The photographs of garments, and how one is laid into a scene: tinted, at its size and place.

They are a part of Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017, arXiv 1708.07747); assets/garments has its licence.
"""

from functools import lru_cache

import numpy as np
from PIL import Image

from infotok_lit.assets import GARMENT_PHOTOGRAPHS
from infotok_lit.scenes.spec import Kind, Split

SIDE = 28
"""Pixels of a photograph."""
_CLASSES: dict[Kind, tuple[int, ...]] = {
    "shirt": (0, 2, 4, 6),
    "trouser": (1,),
    "dress": (3,),
    "shoe": (5, 7),
    "boot": (9,),
    "bag": (8,),
}
"""The data's own classes. Its t-shirts, pullovers, coats and shirts cannot be told apart at this size, nor can its
sandals and sneakers, so each group is one kind."""
_GROUND = 0.06
"""Grey in [0, 1] up to which a pixel is the ground behind the garment."""
_DARKEST = 0.35
"""Share of the tint that is left where the garment is black."""


@lru_cache(maxsize=1)
def _photographs() -> dict[Kind, tuple[np.ndarray, int]]:
    """Kind -> its photographs (n, 28, 28) uint8, and how many of them, the first ones, are for training."""
    with np.load(GARMENT_PHOTOGRAPHS, allow_pickle=False) as file:
        found = {}
        for kind, classes in _CLASSES.items():
            train, test = (
                file[f"{part}_images"][np.isin(file[f"{part}_labels"], classes)] for part in ("train", "test")
            )
            found[kind] = (np.concatenate([train, test]), len(train))
    return found


def photographs_of(kind: Kind, split: Split) -> range:
    """The photographs of a kind that a split shows; "val" and "held_out" show those that are never trained on."""
    photographs, trained = _photographs()[kind]
    return range(trained) if split == "train" else range(trained, len(photographs))


def photograph(kind: Kind, number: int) -> np.ndarray:
    """One photograph, (28, 28) uint8: grey on black."""
    return _photographs()[kind][0][number]


def cut_out(
    image: np.ndarray, width: float, offset: tuple[float, float], shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """A photograph at another size and place: its coverage of each pixel, and its brightness there, both (h, w).

    Args:
        image: (28, 28) uint8.
        width: of the whole photograph in pixels.
        offset: (y, x) of its centre from the top left corner of the result, in pixels.
        shape: (h, w) of the result in pixels.
    """
    grey = image.astype(np.float32) / 255
    seen = (grey > _GROUND).astype(np.float32)
    scale = SIDE / width
    # The ground all around lets the box reach beyond the photograph.
    margin = int(np.ceil(max(shape) * scale))
    top, left = (margin + SIDE / 2 - place * scale for place in offset)
    box = (left, top, left + shape[1] * scale, top + shape[0] * scale)
    covered, bright = (
        np.asarray(Image.fromarray(np.pad(layer, margin)).resize(shape[::-1], Image.Resampling.BILINEAR, box))
        for layer in (seen, seen * (_DARKEST + (1 - _DARKEST) * grey))
    )
    return covered, bright / np.maximum(covered, 1e-6)
