"""The official layouts of text and images in one sequence: lists of ids and of labels.

An image takes `slots` positions, its time and its tokens, between the markers of its beginning and end.
"""

from collections.abc import Sequence
from typing import NamedTuple

from infotok_lit.batch import IGNORE_INDEX, IMAGE_TOKEN_ID

CAPTION_PREFIXES = (
    "The image features ",
    "The image presents ",
    "The image you've sent is, ",
    "In the center of the image, ",
    "The image showcases ",
    "The image is ",
    "The image captures ",
    "In the given image ",
    "The image portrays ",
    "In the image, ",
    "In this image, we see ",
    "The image depicts ",
    "This is ",
    "In this image, ",
    "This image captures ",
    "This image showcases ",
    "This suggests ",
    "In the photo, we see ",
    "This is ",
    "This image is ",
    "In the photo, we have ",
    "The photo features ",
    "The photo depicts ",
    "The photo appears to be ",
)
"""What captions of images to draw lose wherever it stands, in the official order."""


class Markers(NamedTuple):
    """Ids of the tokens that structure a sequence."""

    start: int
    end: int
    image_start: int
    image_end: int


class Chat(NamedTuple):
    """Ids of the fixed parts of a conversation."""

    system: list[int]
    user: list[int]
    assistant: list[int]


class Layout(NamedTuple):
    """One sequence."""

    ids: list[int]
    """IMAGE_TOKEN_ID at image slots."""
    labels: list[int]
    """IGNORE_INDEX where no loss is taken."""


def clean_caption(caption: str) -> str:
    """A caption to draw as the official data loader cleans it."""
    caption = caption.replace("\n", "")
    for prefix in CAPTION_PREFIXES:
        caption = caption.replace(prefix, "")
    return caption


def image(markers: Markers, slots: int) -> list[int]:
    """One image."""
    return [markers.image_start, *[IMAGE_TOKEN_ID] * slots, markers.image_end]


def drawing(markers: Markers, caption: list[int], slots: int) -> Layout:
    """Text to image; no caption for the unconditional prompt."""
    return _unlabelled([markers.start, *caption, *image(markers, slots), markers.end])


def captioning(markers: Markers, caption: list[int], slots: int) -> Layout:
    """Stage 1: an image and its caption; the markers after the image are predicted too."""
    ids = [markers.start, *image(markers, slots), *caption, markers.end]
    return Layout(ids, [IGNORE_INDEX if id == IMAGE_TOKEN_ID else id for id in ids])


def pretraining(markers: Markers, answer: list[int], slots: int) -> Layout:
    """Stages 2a and 2b: an image and an answer, without the question."""
    return _answered([markers.start, *image(markers, slots)], answer, markers)


def chat(
    markers: Markers,
    fixed: Chat,
    turns: Sequence[tuple[list[int], list[int]]],
    slots: int,
    max_length: int | None = None,
) -> Layout:
    """Stage 2c: questions and answers about an image, which opens the first question; without slots, about none."""
    ids: list[int] = []
    labels: list[int] = []
    for question, answer in turns:
        opening = [*fixed.user, *question, markers.end, *fixed.assistant] if ids else None
        prompt = opening or chat_prompt(markers, fixed, question, slots)
        turn = _answered(prompt, answer, markers)
        ids += turn.ids
        labels += turn.labels
    return Layout(ids[:max_length], labels[:max_length])


def chat_prompt(markers: Markers, fixed: Chat, question: list[int], slots: int) -> list[int]:
    """The conversation of stage 2c up to its first answer."""
    shown = image(markers, slots) if slots else []
    return [markers.start, *fixed.system, *fixed.user, *shown, *question, markers.end, *fixed.assistant]


def official_prompt(markers: Markers, fixed: Chat, question: list[int], slots: int) -> list[int]:
    """The conversation of the official inference script, whose user turn does not end."""
    return [markers.start, *fixed.system, *fixed.user, *image(markers, slots), *question, *fixed.assistant]


def reconstructing(markers: Markers, fixed: Chat, request: list[int], condition_slots: int, slots: int) -> Layout:
    """An image that is understood, a request to describe it, and as the answer the same image, drawn."""
    prompt = chat_prompt(markers, fixed, request, condition_slots)
    return _unlabelled([*prompt, *image(markers, slots), markers.end])


def interleaved(markers: Markers, prefix: list[int], texts: Sequence[list[int]], slots: int, slot_label: int) -> Layout:
    """A story: each text is followed by its image.

    Args:
        prefix: opens the first text and is not predicted.
        slot_label: what the official code has the language model predict at image slots.
    """
    ids = [markers.start, *prefix]
    for text in texts:
        ids += [*text, *image(markers, slots)]
    ids.append(markers.end)
    labels = [slot_label if id == IMAGE_TOKEN_ID else id for id in ids]
    labels[1 : 1 + len(prefix)] = [IGNORE_INDEX] * len(prefix)
    return Layout(ids, labels)


def _answered(prompt: list[int], answer: list[int], markers: Markers) -> Layout:
    target = [*answer, markers.end]
    return Layout(prompt + target, [IGNORE_INDEX] * len(prompt) + target)


def _unlabelled(ids: list[int]) -> Layout:
    return Layout(ids, [IGNORE_INDEX] * len(ids))
