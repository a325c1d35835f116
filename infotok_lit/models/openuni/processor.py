"""OpenUni's chat templates, tokenisation and image geometry: samples -> batches."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from infotok_lit.batch import (
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    GenerationBatch,
    GenerationSample,
    Tokenizer,
    UnderstandingBatch,
    UnderstandingSample,
)
from infotok_lit.models.common.pixels import crop_to_square, pad_to_square, to_pixels
from infotok_lit.models.common.text_batch import Text, pad, paired_text
from infotok_lit.models.common.tokenizer import single_id

TURN = "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
IMAGE_MARKER = "<image>"
"""Where in a question its image stands, in the manner of InternVL."""
IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
DRAWING_PROMPT = "Generate an image: {caption}"
UNCONDITIONAL_PROMPT = "Generate an image."
KEEP_PROMPT = "Keep the image as it is."
PADDING_GREY = (127, 127, 127)
MAX_PAIRED_TEXT = 2048


def add_missing_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with the image tokens of InternVL3 that it lacks."""
    known = tokenizer.get_vocab()
    markers = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT)
    tokenizer.add_tokens([token for token in markers if token not in known], special_tokens=True)
    return tokenizer


class OpenUniProcessor:
    """Samples -> right-padded batches; prompts -> ids.

    Args:
        tokenizer: InternVL3's.
        image_size: side of the square images to draw, in pixels.
        reading_size: side of the square that the vision tower sees, in pixels.
        num_image_tokens: language-model slots of one image.
        max_caption: training prompts are cut to this many tokens.
        system: the system prompt of conversations about images; "" for none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_size: int,
        reading_size: int,
        num_image_tokens: int,
        max_caption: int,
        system: str,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.reading_size = reading_size
        self.num_image_tokens = num_image_tokens
        self.max_caption = max_caption
        self.system = system
        needs = "OpenUni needs InternVL3's tokenizer"
        self.end_id = single_id(tokenizer, END, needs)
        self.image_start, self.image_end = (single_id(tokenizer, m, needs) for m in (IMAGE_START, IMAGE_END))
        self.pad_id = single_id(tokenizer, "<|endoftext|>", needs)

    def understanding(self, samples: Sequence[UnderstandingSample], skipped: Sequence[str] = ()) -> UnderstandingBatch:
        """Collate samples to read; images are centred on a grey square."""
        texts = [self._exchange(sample.question, sample.answer) for sample in samples]
        negatives = [[self._exchange(*exchange) for exchange in sample.negatives] for sample in samples]
        prompts, answers = [self._question_ids(sample.question) for sample in samples], [answer for _, answer in texts]
        ids, mask = pad([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)], self.pad_id)
        labelled = [[IGNORE_INDEX] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
        raw = [f"{sample.question}\n{sample.answer}" for sample in samples]
        squares = [pad_to_square(sample.image, PADDING_GREY) for sample in samples]
        return UnderstandingBatch(
            torch.stack([to_pixels(square, self.reading_size) for square in squares]),
            ids,
            mask,
            pad(labelled, IGNORE_INDEX)[0],
            paired_text(texts, raw, self.pad_id, MAX_PAIRED_TEXT, negatives),
            [sample.question for sample in samples],
            [sample.answer for sample in samples],
            [sample.name for sample in samples],
            list(skipped),
        )

    def generation(self, samples: Sequence[GenerationSample], skipped: Sequence[str] = ()) -> GenerationBatch:
        """Collate samples to draw; the prompts are cut after their end is appended, as in the official code."""
        prompts = [self._drawing_ids("" if s.drop_prompt else s.caption)[: self.max_caption] for s in samples]
        ids, mask = pad(prompts, self.pad_id)
        captions = [sample.caption.strip() for sample in samples]
        texts = [(self._encode(caption), []) for caption in captions]
        negatives = [[(self._encode(text), []) for text in sample.negatives] for sample in samples]
        return GenerationBatch(
            torch.stack([to_pixels(crop_to_square(s.image, s.crop_offset), self.image_size) for s in samples]),
            ids,
            mask,
            paired_text(texts, captions, self.pad_id, MAX_PAIRED_TEXT, negatives),
            captions,
            [sample.name for sample in samples],
            list(skipped),
        )

    def prompts_with_image(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T) of questions about one image each, up to where the answer starts; left-padded."""
        return pad([self._question_ids(prompt) for prompt in prompts], self.pad_id, left=True)

    def prompts_to_draw(self, prompts: Sequence[str], negative: str | None) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T) of drawing prompts; right-padded.

        Args:
            negative: follows as many times as there are prompts; "" is the unconditional prompt, None for none.
        """
        texts = [*prompts, *([] if negative is None else [negative] * len(prompts))]
        return pad([self._drawing_ids(text) for text in texts], self.pad_id)

    def prompts_to_redraw(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T) of instructions to change one image each; right-padded."""
        return pad([self._redrawing_ids(instruction) for instruction in instructions], self.pad_id)

    def prompts_to_reconstruct(self, requests: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T) of requests to describe one image each; "" gives the unconditional text."""
        return self.prompts_to_redraw([request or UNCONDITIONAL_PROMPT for request in requests])

    def decode(self, ids: Tensor) -> list[str]:
        """Answers of generated ids (B, T), without anything from the end of the turn on."""
        return [self.tokenizer.decode(self._until_end(row), skip_special_tokens=True).strip() for row in ids.tolist()]

    def image_slots(self) -> list[int]:
        """One image inside a text."""
        return [self.image_start, *[IMAGE_TOKEN_ID] * self.num_image_tokens, self.image_end]

    def _question_ids(self, question: str) -> list[int]:
        before, after = self._around_image(question)
        opening = f"<|im_start|>system\n{self.system}<|im_end|>\n{before}" if self.system else before
        return self._encode(opening) + self.image_slots() + self._encode(after)

    def _around_image(self, text: str) -> tuple[str, str]:
        """A turn of the user, split where its image stands: at the marker, or at the start where there is none."""
        marked = text if IMAGE_MARKER in text else f"{IMAGE_MARKER}\n{text}"
        parts = TURN.format(text=marked).split(IMAGE_MARKER)
        if len(parts) > 2:
            raise ValueError(f"{text!r} has {len(parts) - 1} times {IMAGE_MARKER}, but there is one image")
        return parts[0], parts[1]

    def _redrawing_ids(self, instruction: str) -> list[int]:
        before, after = self._around_image(instruction)
        return self._encode(before) + self.image_slots() + self._encode(after + IMAGE_START)

    def _drawing_ids(self, caption: str) -> list[int]:
        text = DRAWING_PROMPT.format(caption=caption.strip()) if caption else UNCONDITIONAL_PROMPT
        return self._encode(TURN.format(text=text) + IMAGE_START)

    def _exchange(self, question: str, answer: str) -> Text:
        return self._encode(question.strip()), self._encode(answer.strip()) + [self.end_id]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _until_end(self, ids: list[int]) -> list[int]:
        return ids[: ids.index(self.end_id)] if self.end_id in ids else ids
