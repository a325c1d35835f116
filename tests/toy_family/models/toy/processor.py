"""Toy's template, tokenisation and image geometry: samples -> batches."""

from collections.abc import Sequence

import torch
from torch import Tensor

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
from infotok_lit.models.common.text_batch import pad, paired_text
from infotok_lit.models.common.tokenizer import single_id

BLACK = (0, 0, 0)
MAX_TEXT = 256


class ToyProcessor:
    """An image, a question, an answer; or a prompt alone. Batches are right-padded."""

    def __init__(self, tokenizer: Tokenizer, image_size: int, num_image_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.num_image_tokens = num_image_tokens
        self.end_id = single_id(tokenizer, "<|im_end|>", "Toy needs a tokenizer of Qwen2")
        self.pad_id = single_id(tokenizer, "<|endoftext|>", "Toy needs a tokenizer of Qwen2")

    def understanding(self, samples: Sequence[UnderstandingSample], skipped: Sequence[str] = ()) -> UnderstandingBatch:
        """Collate samples to read."""
        texts = [(self._encode(s.question), [*self._encode(s.answer), self.end_id]) for s in samples]
        prompts = [self.question_ids(s.question) for s in samples]
        ids, mask = pad([prompt + answer for prompt, (_, answer) in zip(prompts, texts, strict=True)], self.pad_id)
        labels = [[IGNORE_INDEX] * len(prompt) + answer for prompt, (_, answer) in zip(prompts, texts, strict=True)]
        raw = [f"{s.question}\n{s.answer}" for s in samples]
        negatives = [[(self._encode(q), [*self._encode(a), self.end_id]) for q, a in s.negatives] for s in samples]
        return UnderstandingBatch(
            torch.stack([to_pixels(pad_to_square(s.image, BLACK), self.image_size) for s in samples]),
            ids,
            mask,
            pad(labels, IGNORE_INDEX)[0],
            paired_text(texts, raw, self.pad_id, MAX_TEXT, negatives),
            [s.question for s in samples],
            [s.answer for s in samples],
            [s.name for s in samples],
            list(skipped),
        )

    def generation(self, samples: Sequence[GenerationSample], skipped: Sequence[str] = ()) -> GenerationBatch:
        """Collate samples to draw."""
        captions = [s.caption.strip() for s in samples]
        negatives = [[(self._encode(text), []) for text in s.negatives] for s in samples]
        return GenerationBatch(
            torch.stack([to_pixels(crop_to_square(s.image, s.crop_offset), self.image_size) for s in samples]),
            *self.prompts(["" if s.drop_prompt else caption for s, caption in zip(samples, captions, strict=True)]),
            paired_text([(self._encode(text), []) for text in captions], captions, self.pad_id, MAX_TEXT, negatives),
            captions,
            [s.name for s in samples],
            list(skipped),
        )

    def prompts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T) of prompts to draw."""
        return pad([[*self._encode(text), self.end_id] for text in texts], self.pad_id)

    def question_ids(self, question: str) -> list[int]:
        """The slots of an image, and a question about it."""
        return [IMAGE_TOKEN_ID] * self.num_image_tokens + self._encode(question)

    def decode(self, ids: list[int]) -> str:
        """The answer in generated ids, up to its end."""
        kept = ids[: ids.index(self.end_id)] if self.end_id in ids else ids
        return self.tokenizer.decode(kept, skip_special_tokens=True).strip()

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text.strip(), add_special_tokens=False)
