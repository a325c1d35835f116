"""Show-o2's tokens, prompts and image geometry: samples -> batches."""

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from infotok_lit.batch import (
    IGNORE_INDEX,
    GenerationBatch,
    GenerationSample,
    Tokenizer,
    UnderstandingBatch,
    UnderstandingSample,
)
from infotok_lit.models.common.pixels import to_pixels
from infotok_lit.models.common.text_batch import Text, pad, paired_text
from infotok_lit.models.common.tokenizer import single_id
from infotok_lit.models.showo2.config import PromptConfig
from infotok_lit.models.showo2.layouts import (
    Chat,
    Layout,
    Markers,
    captioning,
    chat,
    chat_prompt,
    clean_caption,
    drawing,
    image,
    official_prompt,
    pretraining,
    reconstructing,
)

START, END = "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE_END = "<|vision_start|>", "<|vision_end|>"
PAD = "[PAD]"
ADDED_TOKENS = ("<image>", "<|vid_start|>", "<|vid_end|>")
"""What the official code adds to Qwen2.5's tokenizer after [PAD]; only their rows in the vocabulary matter."""
BLACK = (0, 0, 0)


def add_missing_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with the tokens of Show-o2 that it lacks, in the official order."""
    known = tokenizer.get_vocab()
    vision = [token for token in (IMAGE_START, IMAGE_END, "<|image_pad|>") if token not in known]
    tokenizer.add_tokens(vision, special_tokens=True)
    if PAD not in known:
        tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.add_tokens([token for token in ADDED_TOKENS if token not in known])
    return tokenizer


class Showo2Processor:
    """Samples -> right-padded batches; prompts -> ids.

    Args:
        tokenizer: Qwen2.5's, completed by `add_missing_tokens`.
        image_size: side of the square images, in pixels.
        num_image_tokens: slots of one image: its time, then its tokens.
    """

    def __init__(self, tokenizer: Tokenizer, image_size: int, num_image_tokens: int, prompts: PromptConfig) -> None:
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.num_image_tokens = num_image_tokens
        self.prompts = prompts
        needs = "Show-o2 needs a Qwen2.5 tokenizer with the tokens that its loader adds"
        self.markers = Markers(*(single_id(tokenizer, m, needs) for m in (START, END, IMAGE_START, IMAGE_END)))
        self.pad_id = single_id(tokenizer, PAD, needs)
        self.end_id = self.markers.end
        self.chat = Chat(
            self._encode(f"system\n{prompts.system}{END}"),
            self._encode(f"\n{START}user\n"),
            self._encode(f"\n{START}assistant\n"),
        )

    def understanding(self, samples: Sequence[UnderstandingSample], skipped: Sequence[str] = ()) -> UnderstandingBatch:
        """Collate samples to read."""
        layouts = [self._reading(sample) for sample in samples]
        ids, mask = pad([layout.ids for layout in layouts], self.pad_id)
        labels, _ = pad([layout.labels for layout in layouts], IGNORE_INDEX)
        texts = [self._exchange(sample.question, sample.answer) for sample in samples]
        negatives = [[self._exchange(*exchange) for exchange in sample.negatives] for sample in samples]
        raw = [f"{sample.question}\n{sample.answer}" for sample in samples]
        return UnderstandingBatch(
            torch.stack([to_pixels(fit_on_square(s.image, self.image_size), self.image_size) for s in samples]),
            ids,
            mask,
            labels,
            paired_text(texts, raw, self.pad_id, 2 * self.prompts.max_text, negatives),
            [sample.question for sample in samples],
            [sample.answer for sample in samples],
            [sample.name for sample in samples],
            list(skipped),
        )

    def generation(self, samples: Sequence[GenerationSample], skipped: Sequence[str] = ()) -> GenerationBatch:
        """Collate samples to draw; images are cropped at the centre, as in the official code."""
        ids, mask = self._drawing_batch(["" if s.drop_prompt else s.caption for s in samples], None)
        captions = [sample.caption.strip() for sample in samples]
        texts = [(self._text(caption), []) for caption in captions]
        negatives = [[(self._text(text), []) for text in sample.negatives] for sample in samples]
        return GenerationBatch(
            torch.stack([to_pixels(centre_crop(s.image, self.image_size), self.image_size) for s in samples]),
            ids,
            mask,
            paired_text(texts, captions, self.pad_id, self.prompts.max_caption, negatives),
            captions,
            [sample.name for sample in samples],
            list(skipped),
        )

    def prompts_with_image(self, prompts: Sequence[str], num_image_tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T) of questions about one image each, up to where the answer starts; right-padded."""
        slots = num_image_tokens or self.num_image_tokens
        return pad([self._question(prompt, slots) for prompt in prompts], self.pad_id)

    def prompts_to_draw(
        self, prompts: Sequence[str], unconditional: bool, num_image_tokens: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T) of drawing prompts, followed by as many unconditional ones if asked; right-padded."""
        return self._drawing_batch([*prompts, *[""] * (len(prompts) if unconditional else 0)], num_image_tokens)

    def prompts_to_reconstruct(
        self, requests: Sequence[str], condition_slots: int, slots: int
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T) of images that are understood, requests to describe them, and the images to draw."""
        texts = [self._encode(request) for request in requests]
        layouts = [reconstructing(self.markers, self.chat, text, condition_slots, slots) for text in texts]
        return pad([layout.ids for layout in layouts], self.pad_id)

    def decode(self, ids: Tensor) -> list[str]:
        """Answers of generated ids (B, T), without anything from the end of the turn on."""
        return [self.tokenizer.decode(self._until_end(row), skip_special_tokens=True).strip() for row in ids.tolist()]

    def _reading(self, sample: UnderstandingSample) -> Layout:
        answer = self._text(sample.answer)
        if self.prompts.reading == "caption":
            return captioning(self.markers, answer, self.num_image_tokens)
        if self.prompts.reading == "pretraining":
            return pretraining(self.markers, answer, self.num_image_tokens)
        question = self._encode(f"\n{sample.question}")[: self.prompts.max_text]
        return chat(self.markers, self.chat, [(question, answer)], self.num_image_tokens)

    def _question(self, prompt: str, slots: int) -> list[int]:
        if self.prompts.describing == "official":
            return official_prompt(self.markers, self.chat, self._encode(prompt), slots)
        if self.prompts.reading == "chat":
            return chat_prompt(self.markers, self.chat, self._encode(f"\n{prompt}"), slots)
        return [self.markers.start, *image(self.markers, slots)]

    def _drawing_batch(self, captions: Sequence[str], slots: int | None) -> tuple[Tensor, Tensor]:
        slots = slots or self.num_image_tokens
        texts = [self._encode(clean_caption(caption.strip()))[: self.prompts.max_caption] for caption in captions]
        return pad([drawing(self.markers, text, slots).ids for text in texts], self.pad_id)

    def _exchange(self, question: str, answer: str) -> Text:
        return self._text(question), self._text(answer) + [self.end_id]

    def _text(self, text: str) -> list[int]:
        return self._encode(text.strip())[: self.prompts.max_text]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []

    def _until_end(self, ids: list[int]) -> list[int]:
        return ids[: ids.index(self.end_id)] if self.end_id in ids else ids


def fit_on_square(picture: Image.Image, size: int) -> Image.Image:
    """Resize an image until it fits, and centre it on a black square: nothing of it is lost."""
    scale = size / max(picture.size)
    width, height = (min(size, math.ceil(side * scale)) for side in picture.size)
    square = Image.new("RGB", (size, size), BLACK)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(resized, ((size - width) // 2, (size - height) // 2))
    return square


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """Resize an image until its shorter side fits, and cut the square at its centre."""
    shorter = min(picture.size)
    width, height = (int(size * side / shorter) for side in picture.size)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return resized.crop((left, top, left + size, top + size))
