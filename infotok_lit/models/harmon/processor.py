"""Harmon's chat template and image geometry."""

from collections.abc import Sequence

from torch import Tensor

from infotok_lit.batch import Tokenizer
from infotok_lit.models.common.processor import ChatProcessor, Prompt, Words
from infotok_lit.models.common.text import pad
from infotok_lit.models.harmon.family import HarmonConfig


class HarmonProcessor(ChatProcessor):
    """Samples -> batches of Harmon; the slots of an image are its grid places, then MAR's buffers."""

    needs = "Harmon needs a Qwen2.5 tokenizer"
    pad_marker = "<|im_end|>"
    after_answer = "\n"

    def __init__(self, config: HarmonConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.user, self.assistant = self.encode(self.user_start), self.encode(self.assistant_start)

    def question(self, question: str, num_image_tokens: int) -> Prompt:
        """The image, a line break and the question."""
        return [self.user + self.image_slots(num_image_tokens), Words(question, lead="\n"), self.assistant]

    def caption(self, caption: str, num_image_tokens: int) -> Prompt:
        """A request that ends with the caption."""
        text = Words(caption, lead=self.generation_prompt) if caption else self.encode(self.unconditional_prompt)
        return [self.user, text, self.assistant]

    def reconstruction_prompts(self, requests: Sequence[str], num_image_tokens: int) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T) of one image each and a request to describe it; "" gives the unconditional text."""
        opening = self.user + self.image_slots(num_image_tokens)
        # The official code replaces the line break before the request together with it.
        texts = [self.encode(f"\n{request}" if request else self.unconditional_prompt) for request in requests]
        return pad([opening + text + self.assistant for text in texts], self.pad_id)
