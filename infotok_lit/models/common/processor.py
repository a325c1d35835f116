"""From samples to batches: what the families' processors do in the same way.

One rule for all texts that are too long: the user's own words are cut at their end, the batch says so, and template,
image and answer stay whole; a sample for which that is not enough is broken.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from infotok_lit.batch import (
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    BrokenSampleError,
    GenerationBatch,
    GenerationSample,
    PairedText,
    Sample,
    Tokenizer,
    UnderstandingBatch,
    UnderstandingSample,
)
from infotok_lit.errors import SettingsError
from infotok_lit.models.common.images import crop_to_square, pad_to_square, to_pixels
from infotok_lit.models.common.model_config import ModelConfig
from infotok_lit.models.common.text import Text, label_places, pad, paired_text


class Words(NamedTuple):
    """A user's own words inside a template: what may be cut, from the right."""

    text: str
    lead: str = ""
    """What the template puts right before them, and is encoded with them."""


Prompt = Sequence[list[int] | Words]
"""A template: ids that stay whole, and the user's own words."""
CAPTION_REQUEST = "describe the image."
"""What captions answer, in the words that Scenes asks with."""


class ChatProcessor(ABC):
    """Samples -> right-padded batches; prompts -> ids. A family adds its chat template and its image geometry.

    Args:
        tokenizer: knows the family's markers.
    """

    needs: ClassVar[str]
    """Which tokenizer the family needs, for messages."""
    pad_marker: ClassVar[str] = "<|endoftext|>"
    user_start: ClassVar[str] = "<|im_start|>user\n"
    assistant_start: ClassVar[str] = "<|im_end|>\n<|im_start|>assistant\n"
    generation_prompt: ClassVar[str] = "Generate an image: "
    unconditional_prompt: ClassVar[str] = "Generate an image."
    after_answer: ClassVar[str] = ""
    """What follows an answer in training and is not predicted."""
    max_caption: int | None = None
    """Longest caption in tokens; None for as much as `max_length` leaves."""
    max_prompt: int | None = None
    """The same for prompts to generate from at inference."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.image_size = self.input_size = config.image_size
        self.num_image_tokens = config.num_image_tokens
        self.max_length = config.max_length
        self.end_id = self.marker_id("<|im_end|>")
        self.pad_id = self.marker_id(self.pad_marker)
        self._warned = False

    # What a family says

    @abstractmethod
    def question(self, question: str, num_image_tokens: int) -> Prompt:
        """A question about one image, up to where the answer starts."""

    @abstractmethod
    def caption(self, caption: str, num_image_tokens: int) -> Prompt:
        """A request to generate an image; "" for the unconditional one.

        Args:
            num_image_tokens: slots of the image itself, for families whose prompts hold it.
        """

    def training_question(self, question: str, num_image_tokens: int) -> Prompt:
        """A question as training asks it; here as inference does."""
        return self.question(question, num_image_tokens)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images to understand -> (B, 3, height, width) float32 in [-1, 1]; here centred on a grey square."""
        return torch.stack([to_pixels(pad_to_square(image), self.input_size) for image in images])

    def target_pixels(self, samples: Sequence[GenerationSample]) -> Tensor:
        """The images to generate, (B, 3, height, width) float32 in [-1, 1]; here cropped where the sample says."""
        return torch.stack([to_pixels(crop_to_square(s.image, s.crop_offset), self.image_size) for s in samples])

    # What all do in the same way

    def understanding(self, samples: Sequence[UnderstandingSample], skipped: Sequence[str] = ()) -> UnderstandingBatch:
        """Collate samples to understand; BrokenSampleError names one that does not fit `max_length`."""
        cut: list[str] = []
        rows = [self.example(sample, cut) for sample in samples]
        ids, mask = pad([ids for ids, _ in rows], self.pad_id)
        texts = [self._exchange(sample.question, sample.answer) for sample in samples]
        negatives = [[self._exchange(*exchange) for exchange in sample.negatives] for sample in samples]
        labels, _ = pad([labels for _, labels in rows], IGNORE_INDEX)
        return UnderstandingBatch(
            pixel_values=self.pixels([sample.image for sample in samples]),
            input_ids=ids,
            attention_mask=mask,
            labels=labels,
            text=self._paired(texts, [f"{sample.question}\n{sample.answer}" for sample in samples], negatives),
            questions=[sample.question for sample in samples],
            answers=[sample.answer for sample in samples],
            names=[sample.name for sample in samples],
            skipped=list(skipped),
            cut=cut,
            label_places=label_places(labels),
        )

    def generation(self, samples: Sequence[GenerationSample], skipped: Sequence[str] = ()) -> GenerationBatch:
        """Collate samples to generate."""
        cut: list[str] = []
        prompts = ["" if sample.drop_prompt else sample.caption for sample in samples]
        slots = self.num_image_tokens
        longest = self.max_caption
        rows = [self._caption_ids(text, slots, s.name, longest, cut) for text, s in zip(prompts, samples, strict=True)]
        ids, mask = pad(rows, self.pad_id)
        # What an image shows does not depend on whether the model was told: a dropped prompt keeps its paired text.
        captions = [sample.caption.strip() for sample in samples]
        negatives = [[(self.encode(text.strip()), []) for text in sample.negatives] for sample in samples]
        return GenerationBatch(
            pixel_values=self.target_pixels(samples),
            input_ids=ids,
            attention_mask=mask,
            text=self._paired([(self.encode(caption), []) for caption in captions], captions, negatives),
            captions=captions,
            names=[sample.name for sample in samples],
            skipped=list(skipped),
            cut=cut,
        )

    def check(self, sample: Sample) -> None:
        """BrokenSampleError if not even the shortest form of a sample fits `max_length`."""
        if isinstance(sample, UnderstandingSample):
            self.example(sample, [])

    def example(self, sample: UnderstandingSample, cut: list[str]) -> tuple[list[int], list[int]]:
        """Ids and labels of a sample to understand; what is cut off is told to `cut`."""
        answer, after = self.answer(sample.answer), self.encode(self.after_answer)
        prompt = self.training_question(sample.question, self.num_image_tokens)
        ids = self.fit(prompt, sample.name, reserved=len(answer) + len(after), cut=cut)
        return ids + answer + after, [IGNORE_INDEX] * len(ids) + answer + [IGNORE_INDEX] * len(after)

    def caption_answers(self, captions: Sequence[str], num_image_tokens: int) -> tuple[Tensor, Tensor]:
        """Right-padded ids and labels (B, T) of a request to describe one image each, answered by its caption.

        An empty caption has no label; one that is too long loses its end.
        """
        prompt = self.fit(self.training_question(CAPTION_REQUEST, num_image_tokens), "a caption's request", reserved=1)
        room = self.max_length - len(prompt)
        answers = [self.answer(caption)[:room] if caption.strip() else [] for caption in captions]
        ids, _ = pad([prompt + answer for answer in answers], self.pad_id)
        labels, _ = pad([[IGNORE_INDEX] * len(prompt) + answer for answer in answers], IGNORE_INDEX)
        return ids, labels

    def understanding_prompts(
        self, prompts: Sequence[str], num_image_tokens: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Left-padded ids and mask (B, T) of questions about one image each, up to where the answer starts."""
        slots = self.num_image_tokens if num_image_tokens is None else num_image_tokens
        rows = [self.fit(self.question(prompt, slots), _shown(prompt)) for prompt in prompts]
        return pad(rows, self.pad_id, left=True)

    def generation_prompts(
        self, prompts: Sequence[str], negative: str | None = None, num_image_tokens: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T) of prompts to generate from; right-padded.

        Args:
            negative: follows as many times as there are prompts; "" is the unconditional prompt, None for none.
            num_image_tokens: of an image in a prompt; default: that of the processor's size.
        """
        slots = self.num_image_tokens if num_image_tokens is None else num_image_tokens
        texts = [*prompts, *([] if negative is None else [negative] * len(prompts))]
        return pad([self._caption_ids(text, slots, _shown(text), self.max_prompt) for text in texts], self.pad_id)

    def decode(self, ids: Tensor) -> list[str]:
        """Answers of generated ids (B, T), without anything from the end of the turn on."""
        rows = (row[: row.index(self.end_id)] if self.end_id in row else row for row in ids.tolist())
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    def fit(
        self,
        prompt: Prompt,
        name: str,
        *,
        reserved: int = 0,
        longest: int | None = None,
        cut: list[str] | None = None,
    ) -> list[int]:
        """The ids of a prompt, with its own words cut at their end as far as they must.

        Args:
            name: of the sample, for messages.
            reserved: tokens of `max_length` that something else needs.
            longest: limit on the words alone, in tokens.
            cut: takes a message if something is cut; the first one of a processor is a warning, too.

        Raises:
            BrokenSampleError: if there is no room even without any words.
        """
        parts = [part if isinstance(part, list) else self.encode(part.lead + part.text) for part in prompt]
        words = [place for place, part in enumerate(prompt) if isinstance(part, Words)]
        too_long = max(
            sum(map(len, parts)) + reserved - self.max_length,
            0 if longest is None else sum(len(parts[place]) for place in words) - longest,
        )
        left = too_long
        for place in reversed(words) if left > 0 else ():
            removable = len(parts[place]) - len(self.encode(prompt[place].lead))
            taken = min(left, removable)
            parts[place] = parts[place][: len(parts[place]) - taken]
            left -= taken
        if left > 0:
            raise BrokenSampleError(
                f"{name}: template, image and answer are {left} tokens longer than max_length ({self.max_length})"
            )
        if too_long > 0:
            self._report_cut(f"{name}: the text is {too_long} tokens too long and lost its end", cut)
        return [token for part in parts for token in part]

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it stands."""
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []

    def image_slots(self, count: int) -> list[int]:
        """What stands for an image of `count` tokens."""
        return [IMAGE_TOKEN_ID] * count

    def answer(self, text: str) -> list[int]:
        """Ids of an answer and the end of its turn."""
        return [*self.encode(text.strip()), self.end_id]

    def marker_id(self, marker: str) -> int:
        """The id of a marker; SettingsError if the tokenizer splits it, which means that it is the wrong one."""
        ids = self.encode(marker)
        if len(ids) != 1:
            raise SettingsError(f"the tokenizer splits {marker!r} into {len(ids)} tokens: {self.needs}")
        return ids[0]

    def _report_cut(self, message: str, cut: list[str] | None) -> None:
        if cut is not None:
            cut.append(message)
        if not self._warned:
            self._warned = True
            limits = f"max_length {self.max_length}"
            limits += f", max_caption {self.max_caption}" if self.max_caption is not None else ""
            warnings.warn(f"{message} (model.settings: {limits}); this is said once", stacklevel=4)

    def _caption_ids(
        self, caption: str, slots: int, name: str, longest: int | None, cut: list[str] | None = None
    ) -> list[int]:
        # `max_length` is meant for images of the processor's size: others leave the words as much room.
        reserved = self.num_image_tokens - slots
        return self.fit(self.caption(caption.strip(), slots), name, reserved=reserved, longest=longest, cut=cut)

    def _exchange(self, question: str, answer: str) -> Text:
        return self.encode(question.strip()), self.answer(answer)

    def _paired(self, texts: Sequence[Text], raw: Sequence[str], negatives: Sequence[Sequence[Text]]) -> PairedText:
        return paired_text(texts, raw, self.pad_id, self.max_length, negatives)


def _shown(text: str, length: int = 40) -> str:
    """A prompt as a name in messages."""
    return repr(text if len(text) <= length else text[:length] + "...")
