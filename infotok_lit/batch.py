"""What flows through the system: samples from data, batches into a model, and what a model's branch gives back.

Everything that several layers speak of is defined here, once. This file knows torch and none of the layers.

Shapes: B samples, N shared tokens that are present, D token width, T sequence length, S text length,
L target positions, C target channels, H width of the LLM's input embeddings.
"""

# Annotations stay text, so that help and typing errors, which need these types, are answered without importing torch.
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from infotok_lit.errors import ExplainedError, SettingsError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from PIL.Image import Image
    from torch import Tensor, nn

Branch = Literal["understanding", "generation"]
BRANCHES: tuple[Branch, ...] = ("understanding", "generation")


@dataclass(frozen=True)
class UnderstandingSample:
    """An image to read: the model is asked `question` and must answer `answer`."""

    image: Image
    """RGB."""
    question: str
    answer: str
    name: str
    """Where the sample comes from (file, row, scene index), for logs and errors."""
    negatives: tuple[tuple[str, str], ...] = ()
    """Questions with answers that are nearly true of the image, and false."""


@dataclass(frozen=True)
class GenerationSample:
    """An image to draw from its caption. All randomness is already drawn, so that collating is deterministic."""

    image: Image
    """RGB."""
    caption: str
    name: str
    crop_offset: float = 0.5
    """Where a square crop starts along the longer side, as a fraction of the free room, in [0, 1)."""
    drop_prompt: bool = False
    """Train this sample on the unconditional prompt (classifier-free guidance)."""
    negatives: tuple[str, ...] = ()
    """Captions that are nearly true of the image, and false."""


Sample = UnderstandingSample | GenerationSample


class BrokenSampleError(ValueError):
    """A sample cannot be used (unreadable, too small, no text); the message names the sample and the reason."""


class TooManyBrokenSamplesError(ExplainedError, ValueError):
    """So many samples cannot be used that training on the rest would not be what was asked for."""


class Source(ABC):
    """Images with text. A sample is a pure function of `index` and `rng`: no hidden state, any worker, any order."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample(self, branch: Branch, index: int, rng: np.random.Generator) -> Sample:
        """The index-th sample of a branch; BrokenSampleError if it cannot be used, which loaders report."""

    def hard_negatives(self, branch: Branch, index: int) -> Sequence[str] | Sequence[tuple[str, str]]:
        """Texts that are nearly true of a sample's image and false: captions, or questions with answers.

        A source that knows such texts overrides this; which of them a sample brings is drawn anew in each epoch.
        """
        return ()

    def branch_length(self, branch: Branch) -> int:
        """How many samples serve a branch; a source in which not every row serves both overrides this."""
        return len(self)

    def order(self, branch: Branch, rng: np.random.Generator, block: int) -> np.ndarray:
        """The order (length,) in which one pass draws the samples of a branch; here any is equally likely.

        Args:
            block: how many samples one process draws before the next process draws.
        """
        return rng.permutation(self.branch_length(branch))

    def lookahead(self, branch: Branch, block: int) -> int:
        """So many samples before one is drawn, in the order of all processes, `prefetch` is told of it; 0: never."""
        return 0

    def prefetch(self, branch: Branch, index: int) -> None:  # noqa: B027 - most sources have all at hand
        """Get ready for a sample that will soon be drawn, in the background; here nothing is done."""

    def replacement(self, branch: Branch, index: int, attempt: int, rng: np.random.Generator) -> int:
        """The sample that is drawn where one cannot be used; here any is equally likely.

        Args:
            attempt: how many samples could not be used in its place so far, itself among them.
        """
        return int(rng.integers(self.branch_length(branch)))

    def split(self, share: float) -> tuple[Source, Source]:
        """The source without a share of its images, and with that share alone; always the same, whatever the order.

        Raises:
            SettingsError: it cannot be split.
        """
        raise SettingsError(f"{type(self).__name__} cannot be split: give it a validation source of its own")


# Batches and what a forward pass gives


class NegativeTexts(NamedTuple):
    """Texts that are nearly true of each image and false, at most M per image; right-padded."""

    ids: Tensor
    """(B, M, S) int64 token ids."""
    mask: Tensor
    """(B, M, S) bool, False at padding; a row without any True is no text."""


class PairedText(NamedTuple):
    """The text paired with each image, without template tokens; right-padded."""

    ids: Tensor
    """(B, S) int64 token ids: question and answer, or the prompt."""
    mask: Tensor
    """(B, S) bool, False at padding."""
    target_mask: Tensor
    """(B, S) bool, True where the token is an answer token (all False for generation)."""
    key: Tensor
    """(B,) int64 digest of the text: equal exactly for identical texts, on every machine."""
    negatives: NegativeTexts | None = None
    """None where no image of the batch has any."""
    target_places: Tensor | None = None
    """(n,) int64: where the flattened target mask is true, found while tensors lie on the host; None: not yet."""


class UnderstandingBatch(NamedTuple):
    """Images to read, in the base model's chat template; right-padded."""

    pixel_values: Tensor
    """(B, 3, height, width) float32 in [-1, 1]."""
    input_ids: Tensor
    """(B, T) int64; IMAGE_TOKEN_ID at the image slots."""
    attention_mask: Tensor
    """(B, T) bool."""
    labels: Tensor
    """(B, T) int64; IGNORE_INDEX where no loss is taken."""
    text: PairedText
    questions: list[str]
    answers: list[str]
    names: list[str]
    skipped: list[str]
    """One message per broken sample that was replaced while this batch was made."""
    cut: Sequence[str] = ()
    """One message per text that lost its end because it was longer than the model's limit."""
    label_places: Tensor | None = None
    """(n,) int64: where the flattened labels are tokens, found while tensors lie on the host; None: not yet."""
    encoded: Tensor | None = None
    """(B, c, h, w) float32: what the frozen autoencoder makes of the images; None where nobody has asked it yet."""
    step_labels: float | None = None
    """Labels of a batch in the mean over those that make one optimiser step with this one; None where it is alone."""

    def count_labels(self) -> int:
        """How many tokens the loss is taken on; nothing predicts the first of a row. To be asked on the host."""
        return int((self.labels[:, 1:] >= 0).sum()) if self.label_places is None else len(self.label_places)


class GenerationBatch(NamedTuple):
    """Images to draw, with their prompts in the base model's chat template; right-padded."""

    pixel_values: Tensor
    """(B, 3, height, width) float32 in [-1, 1]."""
    input_ids: Tensor
    """(B, T) int64."""
    attention_mask: Tensor
    """(B, T) bool."""
    text: PairedText
    captions: list[str]
    names: list[str]
    skipped: list[str]
    """One message per broken sample that was replaced while this batch was made."""
    cut: Sequence[str] = ()
    """One message per text that lost its end because it was longer than the model's limit."""
    encoded: Tensor | None = None
    """(B, c, h, w) float32: what the frozen autoencoder makes of the images; None where nobody has asked it yet."""


Batch = UnderstandingBatch | GenerationBatch

IMAGE_TOKEN_ID = -200
IGNORE_INDEX = -100


@dataclass(frozen=True)
class TokenLayout:
    """Where shared tokens live: a canvas of `num_extra` tokens without a place, then a raster grid."""

    num_extra: int
    grid: tuple[int, int]

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the full canvas: the constant N of the objective."""
        return self.num_extra + self.grid[0] * self.grid[1]


class TokenCodes(NamedTuple):
    """The codes of shared tokens that are discrete."""

    codes: Tensor
    """(B, N) int64."""
    num_codes: int
    loss: Tensor | None
    """Scalar: what the quantiser itself asks to be minimised, already weighted."""

    def entropy_bits(self) -> Tensor:
        """Scalar: entropy of the codes' frequencies, in bits; 2 to its power is the perplexity."""
        frequency = self.codes.flatten().bincount(minlength=self.num_codes).double() / self.codes.numel()
        used = frequency[frequency > 0]
        return -(used * used.log2()).sum()

    def usage_fraction(self) -> Tensor:
        """Scalar: the share of all codes that occur."""
        return (self.codes.flatten().bincount(minlength=self.num_codes) > 0).double().mean()


@dataclass
class BranchOutput:
    """What one forward pass of one branch gives."""

    loss_sum: Tensor
    """Scalar: the branch's own loss summed over its elements (label tokens, or hidden image tokens)."""
    loss_count: Tensor
    """Scalar: how many elements were summed; the branch's loss is sum / count over the global batch."""
    tokens: Tensor
    """(B, N, D): the shared tokens Z as they leave the encoder."""
    token_index: Tensor
    """(B, N) int64: the place of each token in the canvas of `layout`."""
    layout: TokenLayout
    text: PairedText
    text_embedding: nn.Embedding
    """The LLM's input embedding table (vocabulary, H)."""
    latents: Tensor | None = None
    """(B, L, C): the clean image latents that generation predicts; None for understanding."""
    latent_grid: tuple[int, int] | None = None
    noise_level: Tensor | None = None
    """(B,) in [0, 1]: at what time the tokens saw a noisy image, 0 pure noise and 1 clean; None where all is clean."""
    codes: TokenCodes | None = None
    """None for continuous tokens."""


@dataclass
class ReconstructionOutput:
    """What drawing images from what is understood of them costs."""

    loss_sum: Tensor
    """Scalar: the base model's own drawing loss, summed over the elements that it predicts."""
    loss_count: Tensor
    """Scalar: how many elements were summed."""
    quantiser_loss: Tensor | None = None
    """Scalar: what the quantiser itself asks to be minimised, already weighted; None for continuous tokens."""


@dataclass(frozen=True)
class Encoding:
    """Which frozen autoencoder makes latents of a model's images: a cache of latents belongs to one."""

    family: str
    image_size: int
    """Pixels per side."""
    autoencoder: str
    """What kind it is."""
    digest: str
    """Of its settings and weights."""
    branches: tuple[Branch, ...]
    """Whose images it encodes."""


# What turns samples into batches


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str: ...

    def save_pretrained(self, save_directory: Path) -> object: ...


class Processor(Protocol):
    """Turns samples into a base model's batches: its chat template, tokenizer and image geometry. Deterministic."""

    tokenizer: Tokenizer
    end_id: int
    """The token that ends an answer."""
    pad_id: int

    def pixels(self, images: Sequence[Image]) -> Tensor:
        """RGB images to understand -> (B, 3, height, width) float32 in [-1, 1]."""

    def check(self, sample: Sample) -> None:
        """BrokenSampleError if a sample cannot be used however much of its text is cut."""

    def decode(self, ids: Tensor) -> list[str]:
        """Answers of generated ids (B, T), without anything from the end of the turn on."""

    def understanding(
        self, samples: Sequence[UnderstandingSample], skipped: Sequence[str] = ()
    ) -> UnderstandingBatch: ...

    def generation(self, samples: Sequence[GenerationSample], skipped: Sequence[str] = ()) -> GenerationBatch: ...
