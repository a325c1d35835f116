"""What the objective reads from one branch of a unified model. It knows no model: a caller translates."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE_VECTOR_SIDE = 16
"""Fine enough to tell scenes apart, coarse enough that distances are not about noise."""


@dataclass(frozen=True)
class BranchInputs:
    """One branch, one batch.

    B images, N shared tokens that are present, D token width, S text length, H text width, L x C image latents. The
    canvas has `num_extra` places without a position, then a raster `grid`, which is (0, 0) where no token has a place.

    Raises:
        ValueError: shapes that do not belong together.
    """

    tokens: Tensor
    """(B, N, D): the shared tokens Z as they leave the encoder, without noise."""
    token_index: Tensor
    """(B, N) int64: the place of each token in the canvas."""
    num_extra: int
    grid: tuple[int, int]
    text_ids: Tensor
    """(B, S) int64, right-padded; anything at padding."""
    text_mask: Tensor
    """(B, S) bool, False at padding. A row may have no text at all."""
    target_mask: Tensor
    """(B, S) bool, True at answer tokens."""
    text_key: Tensor
    """(B,) int64: equal exactly for identical texts."""
    text_embedding: Tensor
    """(vocabulary, H): the LLM's input embeddings. No gradient is ever sent into them."""
    negative_ids: Tensor | None = None
    """(B, M, S'): texts that are false of the image, for alignment alone; None where there are none."""
    negative_mask: Tensor | None = None
    """(B, M, S') bool, False at padding; a row without any True is no text."""
    latents: Tensor | None = None
    """(B, L, C): what generation predicts; None for understanding."""
    latent_grid: tuple[int, int] | None = None
    noise_level: Tensor | None = None
    """(B,): time t in [0, 1] of a flow model at which Z was computed, 0 pure noise, 1 clean; None where nothing is
    noisy."""
    image: Tensor | None = None
    """(B, F): the image itself as a vector, see `image_vector`; only `estimator: hsic` reads it."""

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3 or self.tokens.shape[1] == 0:
            raise ValueError(f"tokens must be (B, N, D) with N >= 1, not {tuple(self.tokens.shape)}.")
        if self.num_places == 0:
            raise ValueError("the canvas has no place at all: num_extra is 0 and grid is (0, 0).")
        texts = (self.tokens.shape[0], *self.text_ids.shape[1:])
        expected = {
            "token_index": self.tokens.shape[:2],
            "text_ids": texts,
            "text_mask": texts,
            "target_mask": texts,
            "text_key": self.tokens.shape[:1],
        }
        if self.noise_level is not None:
            expected["noise_level"] = self.tokens.shape[:1]
        if self.negative_ids is not None:
            expected["negative_ids"] = (self.tokens.shape[0], *self.negative_ids.shape[1:3])
            expected["negative_mask"] = expected["negative_ids"]
        if self.image is not None:
            expected["image"] = (self.tokens.shape[0], *self.image.shape[1:2])
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(getattr(self, name).shape)}.")

    @property
    def num_places(self) -> int:
        """N of the objective: the tokens of the full canvas, present or not."""
        return self.num_extra + self.grid[0] * self.grid[1]

    def embedded_text(self) -> Tensor:
        """(B, S, H) float32: the detached embeddings of the text; those of id 0 at padding."""
        return self._embedded(self.text_ids, self.text_mask)

    def mean_text(self, words: Tensor) -> Tensor:
        """(B, H): the mean embedding of the chosen words (B, S) of each text, detached; 0 for a row without any."""
        return _mean(self.embedded_text(), words)

    def mean_negatives(self, count: int) -> tuple[Tensor, Tensor]:
        """The first texts that are false of each image: their mean embeddings (B, m, H), and where there is one (B, m).

        m is at most `count`, and 0 where the inputs hold none.
        """
        if self.negative_ids is None:
            nothing = self.tokens.new_zeros(len(self.tokens), 0, dtype=torch.bool)
            return self.text_embedding.new_zeros(*nothing.shape, self.text_embedding.shape[1]).float(), nothing
        ids, mask = self.negative_ids[:, :count], self.negative_mask[:, :count]
        return _mean(self._embedded(ids, mask), mask), mask.any(-1)

    def _embedded(self, ids: Tensor, mask: Tensor) -> Tensor:
        return F.embedding(ids.masked_fill(~mask, 0), self.text_embedding.detach()).float()


def _mean(embedded: Tensor, words: Tensor) -> Tensor:
    mask = words[..., None].float()
    return (embedded * mask).sum(-2) / mask.sum(-2).clamp(min=1)


def image_vector(pixel_values: Tensor) -> Tensor:
    """(B, 3, height, width) -> (B, 3 * 16 * 16) float32: mean colours of a 16 x 16 grid, the same for any size."""
    return F.adaptive_avg_pool2d(pixel_values.float(), IMAGE_VECTOR_SIDE).flatten(1)
