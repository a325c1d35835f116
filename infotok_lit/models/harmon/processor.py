"""Harmon's chat template, tokenisation and image geometry: samples -> batches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from infotok_lit.batch import (
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    GenerationBatch,
    GenerationSample,
    PairedText,
    Tokenizer,
    UnderstandingBatch,
    UnderstandingSample,
)
from infotok_lit.models.common.pixels import crop_to_square, pad_to_square, to_pixels
from infotok_lit.models.common.text_batch import Text, pad, paired_text
from infotok_lit.models.common.tokenizer import single_id

USER_START = "<|im_start|>user\n"
ASSISTANT_START = "<|im_end|>\n<|im_start|>assistant\n"
TURN_END = "<|im_end|>"
TURN_SEPARATOR = "\n"
DRAWING_PROMPT = "Generate an image: {caption}"
UNCONDITIONAL_PROMPT = "Generate an image."
PADDING_GREY = (127, 127, 127)


class HarmonProcessor:
    """Samples -> right-padded batches; prompts -> ids.

    Args:
        tokenizer: knows the Qwen chat markers.
        image_size: side of the square images, in pixels.
        num_image_tokens: language-model slots of one image: grid places and buffers.
        max_length: longest sequence; text is cut from the right, an image never is.
    """

    def __init__(self, tokenizer: Tokenizer, image_size: int, num_image_tokens: int, max_length: int = 2048) -> None:
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.num_image_tokens = num_image_tokens
        self.max_length = max_length
        # The markers come in every template, so an id count other than one means a wrong tokenizer.
        self.end_id = single_id(tokenizer, TURN_END, "Harmon needs a Qwen2.5 tokenizer")
        self.pad_id = self.end_id

    def understanding(self, samples: Sequence[UnderstandingSample], skipped: Sequence[str] = ()) -> UnderstandingBatch:
        """Collate samples to read."""
        sequences = [self._reading_sequence(sample) for sample in samples]
        ids, mask = pad([ids for ids, _ in sequences], self.pad_id)
        labels, _ = pad([labels for _, labels in sequences], IGNORE_INDEX)
        texts = [self._exchange(sample.question, sample.answer) for sample in samples]
        negatives = [[self._exchange(*exchange) for exchange in sample.negatives] for sample in samples]
        return UnderstandingBatch(
            torch.stack([to_pixels(pad_to_square(sample.image, PADDING_GREY), self.image_size) for sample in samples]),
            ids,
            mask,
            labels,
            self._paired_text(texts, [f"{sample.question}\n{sample.answer}" for sample in samples], negatives),
            [sample.question for sample in samples],
            [sample.answer for sample in samples],
            [sample.name for sample in samples],
            list(skipped),
        )

    def generation(self, samples: Sequence[GenerationSample], skipped: Sequence[str] = ()) -> GenerationBatch:
        """Collate samples to draw."""
        prompts = ["" if sample.drop_prompt else sample.caption.strip() for sample in samples]
        ids, mask = pad([self._drawing_ids(prompt) for prompt in prompts], self.pad_id)
        # What an image shows does not depend on whether the model was told: a dropped prompt keeps its paired text.
        captions = [sample.caption.strip() for sample in samples]
        negatives = [[(self._text(text), []) for text in sample.negatives] for sample in samples]
        return GenerationBatch(
            torch.stack([to_pixels(crop_to_square(s.image, s.crop_offset), self.image_size) for s in samples]),
            ids,
            mask,
            self._paired_text([(self._text(caption), []) for caption in captions], captions, negatives),
            captions,
            [sample.name for sample in samples],
            list(skipped),
        )

    def prompts_with_image(
        self, prompts: Sequence[str], num_image_tokens: int | None = None, pad_left: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T) of questions about one image each, up to where the answer starts."""
        count = self.num_image_tokens if num_image_tokens is None else num_image_tokens
        return pad([self._question_ids(prompt, count) for prompt in prompts], self.pad_id, pad_left)

    def prompts_to_draw(self, prompts: Sequence[str], unconditional: bool) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T) of drawing prompts; followed by as many unconditional ones if asked."""
        texts = [prompt.strip() for prompt in prompts] + [""] * (len(prompts) if unconditional else 0)
        return pad([self._drawing_ids(text) for text in texts], self.pad_id)

    def prompts_to_reconstruct(self, requests: Sequence[str], num_image_tokens: int) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T) of one image each and a request to describe it; "" gives the unconditional text."""
        slots = [IMAGE_TOKEN_ID] * num_image_tokens
        # The official code replaces the line break before the request together with it.
        texts = [f"\n{request}" if request else UNCONDITIONAL_PROMPT for request in requests]
        opening = self._encode(USER_START) + slots
        return pad([opening + self._encode(text + ASSISTANT_START) for text in texts], self.pad_id)

    def decode(self, ids: Tensor) -> list[str]:
        """Answers of generated ids (B, T), without anything from the end of the turn on."""
        return [self.tokenizer.decode(self._until_end(row), skip_special_tokens=True).strip() for row in ids.tolist()]

    def _reading_sequence(self, sample: UnderstandingSample) -> tuple[list[int], list[int]]:
        prompt = self._question_ids(sample.question, self.num_image_tokens)
        answer = self._encode(sample.answer.strip() + TURN_END)
        separator = self._encode(TURN_SEPARATOR)
        ids = prompt + answer + separator
        labels = [IGNORE_INDEX] * len(prompt) + answer + [IGNORE_INDEX] * len(separator)
        return ids[: self.max_length], labels[: self.max_length]

    def _question_ids(self, question: str, num_image_tokens: int) -> list[int]:
        slots = [IMAGE_TOKEN_ID] * num_image_tokens
        return self._encode(USER_START) + slots + self._encode(f"\n{question}{ASSISTANT_START}")

    def _drawing_ids(self, caption: str) -> list[int]:
        return self._encode(f"{USER_START}{self._drawing_prompt(caption)}{ASSISTANT_START}")[: self.max_length]

    def _drawing_prompt(self, caption: str) -> str:
        return DRAWING_PROMPT.format(caption=caption) if caption else UNCONDITIONAL_PROMPT

    def _exchange(self, question: str, answer: str) -> Text:
        return self._text(question), self._text(answer) + [self.end_id]

    def _paired_text(
        self, texts: Sequence[Text], raw: Sequence[str], negatives: Sequence[Sequence[Text]]
    ) -> PairedText:
        return paired_text(texts, raw, self.pad_id, self.max_length, negatives)

    def _text(self, text: str) -> list[int]:
        return self._encode(text.strip())

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _until_end(self, ids: list[int]) -> list[int]:
        return ids[: ids.index(self.end_id)] if self.end_id in ids else ids
