"""GenEval's rules: from what a detector and a colour classifier see in an image to whether its prompt is met.

Ghosh et al., 2023 (arXiv 2310.11513); the rules are those of the official `evaluate_images.py` at commit af4902f2
with its defaults (no suppression of overlapping boxes), written anew.

A prompt's metadata is one line of `evaluation_metadata.jsonl`: `include` lists what must be there (`class`, `count`,
and perhaps a `color`, or a `position` relative to an earlier entry), `exclude` what must not reach a `count`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from infotok_lit.errors import DataError

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD = 0.3
"""A detection must be more certain than this..."""
COUNTING_THRESHOLD = 0.9
"""... or than this where objects are counted, so that no doubtful one is."""
MAX_OBJECTS = 16
"""Of each class, the most certain detections count."""
POSITION_SLACK = 0.1
"""What an offset loses per axis, as a share of the two sizes together."""


class Detection(NamedTuple):
    """One object that a detector sees."""

    label: str
    """One of GenEval's 80 class names."""
    box: tuple[float, float, float, float]
    """(left, top, right, bottom) in pixels."""
    score: float
    """Confidence in [0, 1]."""
    colour: str | None = None
    """One of COLOURS where it is known already."""
    mask: Any = None
    """(height, width) bool array, where colours are looked up in the image."""


NameColours = Callable[[Sequence[Detection]], Sequence[str | None]]
"""The colour of each of some detections of one class."""


@dataclass(frozen=True)
class Verdict:
    """Whether an image meets its prompt, and what is wrong where it does not."""

    correct: bool
    reasons: tuple[str, ...] = ()


def known_colours(detections: Sequence[Detection]) -> list[str | None]:
    """The colours that are stored with the detections."""
    return [detection.colour for detection in detections]


def judge(
    metadata: Mapping[str, Any], detections: Sequence[Detection], colours: NameColours = known_colours
) -> Verdict:
    """The official verdict on one image.

    Args:
        metadata: the prompt's line of the metadata file.
        detections: everything that the detector sees, of any class and confidence, in no order.
        colours: asked only about objects whose colour the prompt names.
    """
    threshold = COUNTING_THRESHOLD if metadata["tag"] == "counting" else THRESHOLD
    seen = certain_objects(detections, threshold)
    groups: list[Sequence[Detection] | None] = []
    reasons = []
    for wanted in metadata["include"]:
        found = seen.get(wanted["class"], [])[: wanted["count"]]
        reason = _missing(wanted, found, groups, colours)
        groups.append(found if reason is None else None)
        reasons += [] if reason is None else [reason]
    for unwanted in metadata.get("exclude", ()):
        number = len(seen.get(unwanted["class"], []))
        if number >= unwanted["count"]:
            reasons.append(f"expected fewer than {unwanted['count']} of {unwanted['class']}, found {number}")
    return Verdict(not reasons, tuple(reasons))


def certain_objects(detections: Sequence[Detection], threshold: float) -> dict[str, list[Detection]]:
    """Class -> its detections above the threshold, at most MAX_OBJECTS, the most certain first."""
    seen: dict[str, list[Detection]] = {}
    # The official order is an ascending sort read backwards, so that of two equal scores the later one comes first.
    for detection in sorted(detections, key=lambda one: one.score)[::-1]:
        kept = seen.setdefault(detection.label, [])
        if detection.score > threshold and len(kept) < MAX_OBJECTS:
            kept.append(detection)
    return seen


def relations(one: Sequence[float], other: Sequence[float]) -> set[str]:
    """How a box lies relative to another, both (left, top, right, bottom): a subset of left/right of, above, below.

    The offset of the centres is shortened on each axis by a tenth of the two sizes together, and divided by the
    length of the whole offset; a relation holds where more than half of it is left.
    """
    centres = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in (one, other)]
    offset = [a - b for a, b in zip(*centres, strict=True)]
    sizes = [abs(one[axis + 2] - one[axis]) + abs(other[axis + 2] - other[axis]) for axis in (0, 1)]
    left = [max(abs(step) - POSITION_SLACK * size, 0.0) for step, size in zip(offset, sizes, strict=True)]
    if max(left) < 1e-3:
        return set()
    right, down = (math.copysign(rest, step) / math.hypot(*offset) for rest, step in zip(left, offset, strict=True))
    holds = {"left of": right < -0.5, "right of": right > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, true in holds.items() if true}


def _missing(
    wanted: Mapping[str, Any],
    found: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    colours: NameColours,
) -> str | None:
    """Why one entry of `include` is not met by the objects that were kept for it; None if it is."""
    name, count = wanted["class"], wanted["count"]
    if len(found) < count:
        return f"expected {count} of {name}, found {len(found)}"
    if "color" in wanted:
        named = list(colours(found))
        if named.count(wanted["color"]) < count:
            return f"expected {count} of {wanted['color']} {name}, found {', '.join(map(str, named))}"
    if "position" in wanted:
        relation, target = wanted["position"]
        others = groups[target]
        if others is None:
            return f"no object that {name} could be {relation}"
        for one, other in product(found, others):
            if relation not in relations(one.box, other.box):
                return f"expected {name} {relation} {other.label}"
    return None


class Scene(NamedTuple):
    """One image as a detector saw it, and the official verdict on it where it is known."""

    metadata: Mapping[str, Any]
    detections: Sequence[Detection]
    correct: bool | None


def read_scene(content: Any, where: str) -> Scene:
    """One stored scene: `{"metadata", "detections": [{"class", "box", "score", "color"}], "correct"}`.

    Raises:
        DataError: naming `where`, for anything else.
    """
    try:
        metadata = content["metadata"]
        detections = [
            Detection(one["class"], _box(one["box"]), _finite(one["score"]), one.get("color"))
            for one in content["detections"]
        ]
        correct = content.get("correct")
        if correct not in (None, True, False):
            raise ValueError(f"correct is {correct!r}")
        if not isinstance(metadata["tag"], str):
            raise ValueError(f"tag is {metadata['tag']!r}")
        # A dry run: every field that the rules read is there.
        judge(metadata, detections)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(
            f"{where} is no stored scene ({type(error).__name__}: {error}): each needs metadata (a line of GenEval's "
            "evaluation_metadata.jsonl) and detections, each with class, box [x0, y0, x1, y1], score and color"
        ) from error
    return Scene(metadata, detections, None if correct is None else bool(correct))


def _box(values: Sequence[float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = map(_finite, values)
    return left, top, right, bottom


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is no number")
    return number
