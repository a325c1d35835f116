"""OpenUni's chat templates and image geometry."""

from collections.abc import Sequence

from torch import Tensor

from infotok_lit.batch import BrokenSampleError, Tokenizer
from infotok_lit.models.common.processor import ChatProcessor, Prompt, Words
from infotok_lit.models.common.text import pad
from infotok_lit.models.openuni.family import IMAGE_END, IMAGE_START, OpenUniConfig

IMAGE_MARKER = "<image>"
"""Where in a question its image stands, in the manner of InternVL."""
KEEP_PROMPT = "Keep the image as it is."


class OpenUniProcessor(ChatProcessor):
    """Samples -> batches of OpenUni; the tokenizer is InternVL3's, as the family loads it."""

    needs = "OpenUni needs InternVL3's tokenizer"

    def __init__(self, config: OpenUniConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.max_caption = config.max_caption
        self.input_size = config.vision.input_side
        self.system = config.system
        self.image_start, self.image_end = self.marker_id(IMAGE_START), self.marker_id(IMAGE_END)
        self.assistant = self.encode(self.assistant_start)

    def question(self, question: str, num_image_tokens: int) -> Prompt:
        """The system prompt, and the question with the image at its marker, or before it where there is none."""
        system = f"<|im_start|>system\n{self.system}<|im_end|>\n" if self.system else ""
        return [self.encode(system), *self._turn(question, num_image_tokens)]

    def caption(self, caption: str, num_image_tokens: int) -> Prompt:
        """A request that ends with the caption."""
        text = Words(caption, lead=self.user_start + self.generation_prompt)
        unconditional = self.encode(self.user_start + self.unconditional_prompt)
        return [text if caption else unconditional, self.assistant, [self.image_start]]

    def editing_prompts(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T) of instructions to change one image each; right-padded."""
        turns = ([*self._turn(text, self.num_image_tokens), [self.image_start]] for text in instructions)
        return pad([self.fit(turn, repr(text)) for turn, text in zip(turns, instructions, strict=True)], self.pad_id)

    def reconstruction_prompts(self, requests: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T) of requests to describe one image each; "" gives the unconditional text."""
        return self.editing_prompts([request or self.unconditional_prompt for request in requests])

    def _turn(self, text: str, num_image_tokens: int) -> Prompt:
        """A turn of the user, with the image where its marker stands, or at the start where there is none."""
        parts = (text if IMAGE_MARKER in text else f"{IMAGE_MARKER}\n{text}").split(IMAGE_MARKER)
        if len(parts) > 2:
            raise BrokenSampleError(f"{text!r} has {len(parts) - 1} times {IMAGE_MARKER}, but there is one image")
        image = self.image_slots(num_image_tokens)
        return [Words(parts[0], lead=self.user_start), image, Words(parts[1]), self.assistant]

    def image_slots(self, count: int) -> list[int]:
        """One image between its markers."""
        return [self.image_start, *super().image_slots(count), self.image_end]
