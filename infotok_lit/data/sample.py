"""One image with its text, before any model's template: what every data source yields."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL.Image import Image

from infotok_lit.errors import ExplainedError

Branch = Literal["understanding", "generation"]


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
