"""Show-o2's prompts and image geometry: the official layouts of text and images, and the processor that fills them.

An image takes `slots` positions, its time and its tokens, between the markers of its beginning and end.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from infotok_lit.batch import IGNORE_INDEX, IMAGE_TOKEN_ID, GenerationSample, Tokenizer, UnderstandingSample
from infotok_lit.models.common.images import centre_crop, fit_on_square, to_pixels
from infotok_lit.models.common.processor import ChatProcessor, Prompt, Words
from infotok_lit.models.common.text import pad
from infotok_lit.models.showo2.family import IMAGE_END, IMAGE_START, PAD, Showo2Config

START, END = "<|im_start|>", "<|im_end|>"
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
"""What captions to generate from lose wherever it stands, in the official order."""


def clean_caption(caption: str) -> str:
    """A caption to generate from as the official data loader cleans it."""
    caption = caption.replace("\n", "")
    for prefix in CAPTION_PREFIXES:
        caption = caption.replace(prefix, "")
    return caption


class Showo2Processor(ChatProcessor):
    """Samples -> batches of Show-o2; the tokenizer is Qwen2.5's, as the family loads it."""

    needs = "Show-o2 needs a Qwen2.5 tokenizer with the tokens that its loader adds"
    pad_marker = PAD

    def __init__(self, config: Showo2Config, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.prompts = config.prompts
        self.max_caption = self.max_prompt = self.prompts.max_caption
        markers = (START, IMAGE_START, IMAGE_END)
        self.start, self.image_start, self.image_end = (self.marker_id(marker) for marker in markers)
        self.system = self.encode(f"system\n{self.prompts.system}{END}")
        self.user, self.assistant = self.encode(f"\n{START}user\n"), self.encode(f"\n{START}assistant\n")

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Resized until they fit, and centred on a black square."""
        return torch.stack([to_pixels(fit_on_square(image, self.image_size), self.image_size) for image in images])

    def target_pixels(self, samples: Sequence[GenerationSample]) -> Tensor:
        """Cropped at the centre, as in the official code."""
        return torch.stack([to_pixels(centre_crop(s.image, self.image_size), self.image_size) for s in samples])

    def question(self, question: str, num_image_tokens: int) -> Prompt:
        """A question as `describing` says: as the official script, whose user turn does not end, or as training."""
        if self.prompts.describing == "training":
            return self.training_question(question, num_image_tokens)
        opening = [self.start, *self.system, *self.user, *self.image_slots(num_image_tokens)]
        return [opening, Words(question), self.assistant]

    def training_question(self, question: str, num_image_tokens: int) -> Prompt:
        """As the stage that `reading` names: 2c has a conversation, the others show an image without a question."""
        if self.prompts.reading != "chat":
            return [[self.start, *self.image_slots(num_image_tokens)]]
        closing = [self.end_id, *self.assistant]
        opening = self.chat_prompt([], num_image_tokens)[: -len(closing)]
        return [opening, Words(question, lead="\n"), closing]

    def example(self, sample: UnderstandingSample, cut: list[str]) -> tuple[list[int], list[int]]:
        """Ids and labels of a sample to understand; in stage 1, the markers after the image are predicted too."""
        ids, labels = super().example(sample, cut)
        if self.prompts.reading == "caption":
            labels = [IGNORE_INDEX if id == IMAGE_TOKEN_ID else id for id in ids]
        return ids, labels

    def caption(self, caption: str, num_image_tokens: int) -> Prompt:
        """The caption, then its image."""
        shown = self.image_slots(num_image_tokens)
        return [[self.start], Words(clean_caption(caption)), [*shown, self.end_id]]

    def image_slots(self, count: int) -> list[int]:
        """One image between its markers."""
        return [self.image_start, *super().image_slots(count), self.image_end]

    def chat_prompt(self, question: list[int], slots: int) -> list[int]:
        """The conversation of stage 2c up to its first answer; without slots, about no image."""
        shown = self.image_slots(slots) if slots else []
        return [self.start, *self.system, *self.user, *shown, *question, self.end_id, *self.assistant]

    def chat(
        self, turns: Sequence[tuple[list[int], list[int]]], slots: int, max_length: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of stage 2c: questions and answers about an image, which opens the first question."""
        ids: list[int] = []
        labels: list[int] = []
        for question, answer in turns:
            later = [*self.user, *question, self.end_id, *self.assistant]
            prompt, target = later if ids else self.chat_prompt(question, slots), [*answer, self.end_id]
            ids += prompt + target
            labels += [IGNORE_INDEX] * len(prompt) + target
        return ids[:max_length], labels[:max_length]

    def interleaved(
        self, prefix: list[int], texts: Sequence[list[int]], slots: int, slot_label: int
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of a story: each text is followed by its image.

        Args:
            prefix: opens the first text and is not predicted.
            slot_label: what the official code has the language model predict at image slots.
        """
        ids = [self.start, *prefix]
        for text in texts:
            ids += [*text, *self.image_slots(slots)]
        ids.append(self.end_id)
        labels = [slot_label if id == IMAGE_TOKEN_ID else id for id in ids]
        labels[1 : 1 + len(prefix)] = [IGNORE_INDEX] * len(prefix)
        return ids, labels

    def reconstruction_prompts(
        self, requests: Sequence[str], condition_slots: int, slots: int
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T) of images to understand, requests to describe them, and the images to generate."""
        prompts = (self.chat_prompt(self.encode(text), condition_slots) for text in requests)
        generated = [*self.image_slots(slots), self.end_id]
        return pad([[*prompt, *generated] for prompt in prompts], self.pad_id)
