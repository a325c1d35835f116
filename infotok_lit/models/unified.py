"""The interface that every base model implements.

A unified model reads images (understanding) and draws them (generation) through one shared visual encoder. This file
knows no objective and no trainer: a branch returns its own loss together with what an information-theoretic
regulariser needs to see, and the caller decides what to do with it.

Shapes: B samples, N shared tokens that are present, D token width, T sequence length, S text length,
L target positions, C target channels, H width of the LLM's input embeddings.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from infotok_lit.batch import (
    Branch,
    BranchOutput,
    GenerationBatch,
    Processor,
    ReconstructionOutput,
    UnderstandingBatch,
)
from infotok_lit.models.common.reconstruction import ReconstructionConfig

TokenTransform = Callable[[Tensor], Tensor]
"""A map (B, N, D) -> (B, N, D) applied to the shared tokens where they leave the encoder."""


class UnifiedModel(nn.Module, ABC):
    """A base model: everything that exists at inference, and nothing else."""

    family: str
    title: str
    """The family's name for people."""
    token_widths: dict[Branch, int]
    """D of each branch."""
    num_extras: dict[Branch, int]
    """How many shared tokens of each branch have no place in its grid."""
    latent_width: int
    """C."""
    text_width: int
    """H."""
    parts: Mapping[str, tuple[str, ...]]
    """Name for people -> prefixes of parameter names; gradient norms are logged for each."""
    token_parts: Mapping[Branch, tuple[str, ...]]
    """Which parts make the shared tokens of each branch."""
    processor: Processor
    config: Any
    """The family's configuration; its `image_size` and `drawing` are what calls fall back on."""
    reconstruction_defaults: ReconstructionConfig
    """How the family is trained to reconstruct, unless a call says otherwise."""
    official_aliases: tuple[str, ...] = ()
    """Official names that repeat another tensor; files that store a tensor once leave them out."""

    @abstractmethod
    def understanding(self, batch: UnderstandingBatch, transform: TokenTransform | None = None) -> BranchOutput:
        """Image-to-text loss: next-token cross entropy in nats, summed over label tokens."""

    @abstractmethod
    def generation(self, batch: GenerationBatch, transform: TokenTransform | None = None) -> BranchOutput:
        """Text-to-image loss of the base model, summed over the elements that it predicts."""

    @abstractmethod
    def reconstruction(
        self,
        batch: GenerationBatch,
        config: ReconstructionConfig,
        reading: TokenTransform | None = None,
        drawing: TokenTransform | None = None,
    ) -> ReconstructionOutput:
        """Loss of drawing the batch's images from what the model understands of them, not from their prompts.

        Args:
            config: what it leaves open is as in `reconstruction_defaults`.
            reading: applied to the shared tokens of the images that are understood.
            drawing: applied to the shared tokens of the images that are drawn.
        """

    @abstractmethod
    def describe(
        self, pixel_values: Tensor, prompts: Sequence[str], max_new_tokens: int, use_cache: bool = True
    ) -> list[str]:
        """Answer one prompt per image (B, 3, height, width) in [-1, 1], greedily.

        Args:
            use_cache: keep keys and values of earlier tokens; the answers are the same without, and take longer.
        """

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        drawing: Any = None,
        image_size: tuple[int, int] | None = None,
        progress: Callable[[int, int], None] | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Draw one image per prompt: (B, 3, height, width) float32 in [-1, 1].

        Image i depends on its prompt and on seed + i, not on the rest of the batch.

        Args:
            drawing: the family's DrawingConfig; default: the model's own.
            image_size: (height, width) in pixels; default: the size that the processor makes.
            progress: called with (iteration, iterations) after each iteration.
            use_cache: compute the prompts' keys and values once; the images are the same without, and take longer.
        """

    @abstractmethod
    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies to a parameter (by its name in this model) in the official recipe."""

    def description(self) -> dict[str, Any]:
        """What rebuilds this model, in primitives: the `config` entry of an exported folder's config.json."""
        return self.config.to_dict()

    @abstractmethod
    def official_weights(self) -> dict[str, dict[str, Tensor]]:
        """File stem -> weights under official names and shapes: everything that inference needs."""

    def save_tokenizer(self, folder: Path) -> None:
        """Write tokenizer.json and its configuration into an existing folder."""
        self.processor.tokenizer.save_pretrained(folder)

    @abstractmethod
    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass instead of storing them; the numbers do not change."""
