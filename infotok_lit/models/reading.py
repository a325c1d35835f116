"""How a language model reads images: all shared tokens of understanding, or some of them.

Shapes: B samples, I images, N shared tokens that are present, D token width, T sequence length, S text length, H width
of the language model's input embeddings, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LogitsProcessorList, PreTrainedModel

from infotok_lit.batch import IGNORE_INDEX, IMAGE_TOKEN_ID, Processor, UnderstandingBatch
from infotok_lit.errors import SettingsError
from infotok_lit.models.common.answering import answer_after_prefix, shorten, split_after_image
from infotok_lit.models.common.language_model import CAUSAL, next_labels, places_where, required, take_rows, text_loss
from infotok_lit.models.common.reconstruction import scale_gradient

TokenTransform = Callable[[Tensor], Tensor]
"""A map (B, N, D) -> (B, N, D) applied to the shared tokens where they leave the encoder."""


class ImageReader(nn.Module, ABC):
    """The part of a base model that makes shared tokens of images, and answers of tokens and questions."""

    config: Any
    processor: Processor
    slots_before_tokens = 0
    """How many positions an image has before those of its tokens."""
    seen_after_image = 0
    """How many positions after an image belong to what its positions see."""
    in_step = False
    """Whether processes compute with weights that they share out, so that none may stop before the others."""

    @property
    def language_model(self) -> PreTrainedModel:
        """What reads and writes text, with its head."""
        return self.llm

    @property
    def text_embedding(self) -> nn.Embedding:
        """The language model's input embedding table, (vocabulary, H)."""
        return self.language_model.get_input_embeddings()

    @property
    def text_body(self) -> nn.Module:
        """The language model without its head: embeddings -> last hidden states."""
        return self.llm.model

    @torch.no_grad()
    def last_hidden_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, S, H): what the language model makes of right-padded texts (B, S) alone; padding holds no meaning."""
        seen = mask.bool()[:, None, None] & mask.new_ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
        # A padded row sees itself, so that no softmax is over nothing.
        seen = seen | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
        return self.text_body(inputs_embeds=self.text_embedding(ids), attention_mask=seen).last_hidden_state

    def embed_with_images(self, input_ids: Tensor, visual: Tensor) -> Tensor:
        """Embeddings (B, T, H) of ids whose image slots are filled with `visual` (n, N, H), in order.

        Raises:
            SettingsError: if there are not as many slots as tokens.
        """
        slots = input_ids == IMAGE_TOKEN_ID
        num_slots, num_visual = slots.sum(), visual.shape[0] * visual.shape[1]
        embeds = required(
            self.text_embedding(input_ids.masked_fill(slots, 0)),
            num_slots == num_visual,
            lambda: (
                f"the text has {num_slots} image slots for {num_visual} visual tokens: the image size and the "
                "processor's disagree"
            ),
        )
        # By place: the gradient of a masked scatter would wait for the device.
        (places,) = places_where(slots.view(1, -1), num_visual)
        filled = embeds.flatten(0, 1).index_copy(0, places, visual.flatten(0, 1).to(embeds.dtype))
        return filled.view_as(embeds)

    # Shared tokens

    @abstractmethod
    def understood_tokens(self, pixel_values: Tensor, encoded: Tensor | None = None) -> Tensor:
        """Images (B, 3, height, width) in [-1, 1] -> the shared tokens of understanding (B, N, D), untransformed.

        Args:
            encoded: what the autoencoder makes of them, if that is known.
        """

    def project_for_llm(self, tokens: Tensor, transform: TokenTransform | None = None) -> Tensor:
        """Shared tokens of understanding (B, N, D) -> what the language model reads, (B, N, H); here the same."""
        return transformed(tokens, transform)

    def reading_order(self, places: Tensor) -> Tensor:
        """What belongs to the tokens of understanding (B, N, ...), in the order of `project_for_llm`: here as is."""
        return places

    def reading_mask(self, ids: Tensor) -> Tensor | None:
        """(B, 1, T, T) bool: which positions of samples (B, T) see which in training; None: earlier ones."""
        return None

    def answer_loss(
        self, batch: UnderstandingBatch, tokens: Tensor, transform: TokenTransform | None = None
    ) -> tuple[Tensor, Tensor]:
        """Next-token cross entropy (nats) of a batch's answers given the shared tokens (B, N, D) of its images.

        Summed over answer tokens, and their number; the head runs on these positions alone.
        """
        hidden = self._read(self._embed(batch, tokens, transform))
        return text_loss(self.language_model.lm_head, hidden, batch.labels, batch.label_places)

    def answer_logits(
        self, batch: UnderstandingBatch, tokens: Tensor, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits (M, V) of a batch's answer tokens given the shared tokens (B, N, D) of its images; and the M ids.

        Args:
            kept: (B, N) bool: which tokens are read; the others are dropped before the language model. Default: all.
        """
        embeds, mask, places = self._embed(batch, tokens), self.reading_mask(batch.input_ids), None
        # An image's own positions may have to predict the marker behind it, and may be dropped.
        wanted = next_labels(batch.labels).masked_fill(batch.input_ids == IMAGE_TOKEN_ID, IGNORE_INDEX)
        if kept is not None:
            rows = shorten(self._left_of(batch.input_ids, batch.attention_mask, kept))
            embeds, places = take_rows(embeds, rows.source), rows.source
            wanted = take_rows(wanted, rows.source).masked_fill(~rows.real, IGNORE_INDEX)
            mask = None if mask is None else rows.seen(mask)
        labelled = wanted >= 0
        return self.language_model.lm_head(self._read(embeds, places, mask)[labelled]), wanted[labelled]

    def _embed(self, batch: UnderstandingBatch, tokens: Tensor, transform: TokenTransform | None = None) -> Tensor:
        seen = scale_gradient(self.project_for_llm(tokens, transform), self.config.grad_scale)
        return self.embed_with_images(batch.input_ids, seen)

    def _read(self, embeds: Tensor, places: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Last hidden states. Padding is on the right, so that causal attention alone hides it from every answer."""
        seen = CAUSAL if mask is None else mask
        return self.text_body(
            inputs_embeds=embeds, attention_mask=seen, position_ids=places, use_cache=False
        ).last_hidden_state

    def _left_of(self, input_ids: Tensor, real: Tensor, kept: Tensor) -> Tensor:
        """(B, T) bool: what is left of ids that are `real` (B, T) where only those tokens are `kept` (B, N)."""
        slots = input_ids == IMAGE_TOKEN_ID
        read = F.pad(self.reading_order(kept), (self.slots_before_tokens, 0), value=True)
        return real.bool() & ~slots.masked_scatter(slots, ~read)

    # Answers

    @torch.no_grad()
    def describe(
        self,
        pixel_values: Tensor,
        prompts: Sequence[str],
        max_new_tokens: int = 64,
        use_cache: bool = True,
        image_of: Sequence[int] | None = None,
    ) -> list[str]:
        """Answer prompts about images greedily; prompts may differ in length, and no answer knows its batch.

        Args:
            pixel_values: (I, 3, height, width) in [-1, 1], as `processor.pixels` makes them.
            use_cache: keep keys and values of earlier tokens; the answers are the same without, and take longer.
            image_of: for each prompt, which image it is about; default: one prompt per image, in order. An image is
                encoded once, however many prompts are about it.
        """
        tokens = self.tokens_to_describe(pixel_values)
        return self.describe_tokens(tokens, prompts, max_new_tokens, use_cache, image_of)

    @torch.no_grad()
    def describe_tokens(
        self,
        tokens: Tensor,
        prompts: Sequence[str],
        max_new_tokens: int = 64,
        use_cache: bool = True,
        image_of: Sequence[int] | None = None,
        kept: Tensor | None = None,
    ) -> list[str]:
        """`describe` from the shared tokens (I, N, D) of its images; `kept` (I, N) is as for `answer_logits`."""
        if kept is not None:
            image_of = range(len(tokens)) if image_of is None else image_of
        visual = self.project_for_llm(tokens)
        ids, mask = self.processor.understanding_prompts(prompts, num_image_tokens=visual.shape[1])
        ids, mask = ids.to(visual.device), mask.to(visual.device)
        shared = None if image_of is None or not use_cache else split_after_image(ids, mask, self.seen_after_image)
        if kept is not None and shared is None:
            raise SettingsError("a token budget needs a cache, and prompts that are equal before their image")
        if shared is not None:
            prefix_ids = shared.prefix.expand(len(visual), -1)
            left = None if kept is None else self._left_of(prefix_ids, torch.ones_like(prefix_ids), kept)
            found = answer_after_prefix(
                self,
                self.embed_with_images(prefix_ids, visual),
                image_of,
                shared.questions,
                max_new_tokens,
                prefix_mask=self.prefix_mask(prefix_ids),
                prefix_left=left,
            )
        else:
            visual = visual if image_of is None else visual[list(image_of)]
            found = self.answer_prompts(ids, mask, visual, max_new_tokens, use_cache)
        return self.processor.decode(found)

    def tokens_to_describe(self, pixel_values: Tensor) -> Tensor:
        """`understood_tokens`, without anything random."""
        return self.understood_tokens(pixel_values)

    def prefix_mask(self, ids: Tensor) -> Tensor | None:
        """(I, 1, P, P) bool: which positions of what comes before questions see which; None: earlier ones."""
        return None

    def answer_prompts(self, ids: Tensor, mask: Tensor, visual: Tensor, max_new_tokens: int, use_cache: bool) -> Tensor:
        """Answer ids (B, at most max_new_tokens) to left-padded prompts (B, T), each with its image (B, N, H)."""
        return self.answer(self.embed_with_images(ids, visual), mask, max_new_tokens, use_cache)

    @torch.no_grad()
    def answer(self, embeds: Tensor, mask: Tensor, max_new_tokens: int, use_cache: bool = True) -> Tensor:
        """Greedy continuation ids (B, at most max_new_tokens) of left-padded embeddings (B, T, H)."""
        return self.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=mask.long(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=use_cache,
            synced_gpus=self.in_step,
            logits_processor=self.adjust_logits,
            eos_token_id=self.processor.end_id,
            pad_token_id=self.processor.pad_id,
        )

    @property
    def adjust_logits(self) -> LogitsProcessorList:
        """What changes the logits that an answer is chosen by, given its ids so far; here nothing does."""
        return LogitsProcessorList()


def transformed(tokens: Tensor, transform: TokenTransform | None) -> Tensor:
    """The tokens, through a transform if there is one."""
    return tokens if transform is None else transform(tokens)
