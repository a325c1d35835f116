"""Judges an image against a prompt as GenEval does (Ghosh et al. 2023), with the family's parser as its detector."""

import numpy as np

from infotok_lit.scenes.grammar import Mention, Prompt, Relation
from infotok_lit.scenes.parser import ParsedObject, parse_image
from infotok_lit.scenes.spec import SceneSpec

_SHRINK = 0.1  # GenEval: offsets within this share of the summed extents count as none
_MIN_COMPONENT = 0.5  # GenEval: a relation holds from this share of the offset on


def score(image: np.ndarray, prompt: Prompt, spec: SceneSpec) -> bool:
    """Whether an image (image_size, image_size, 3) uint8 shows what a prompt asks for.

    Every named object must be found, in its colour where one is named; a count must be met exactly; a relation must
    hold between two matching objects. Other objects are not punished, as in GenEval.
    """
    return satisfies(parse_image(image, spec), prompt)


def satisfies(objects: list[ParsedObject], prompt: Prompt) -> bool:
    """Whether the objects found in an image meet a prompt."""
    matches = [[item for item in objects if _matches(item, mention)] for mention in prompt.objects]
    if prompt.category == "counting":
        return len(matches[0]) == prompt.count
    if prompt.relation is None:
        return all(matches)
    return any(_holds(prompt.relation, first, second) for first in matches[0] for second in matches[1])


def _matches(item: ParsedObject, mention: Mention) -> bool:
    return item.kind == mention.kind and mention.colour in (None, item.colour)


def _holds(relation: Relation, first: ParsedObject, second: ParsedObject) -> bool:
    """GenEval's rule: the offset, shrunk per axis by the extents, over the length of the raw offset."""
    offset = np.subtract(first.centre, second.centre)
    slack = _SHRINK * np.add(first.extent, second.extent)
    length = np.linalg.norm(offset)
    if length == 0:
        return False
    down, right = np.sign(offset) * np.maximum(np.abs(offset) - slack, 0) / length
    component = {"left of": -right, "right of": right, "above": -down, "below": down}[relation]
    return bool(component > _MIN_COMPONENT)
