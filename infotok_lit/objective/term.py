"""The common currency of the terms: nats per image, and the two ways to reduce them."""

from dataclasses import dataclass

from torch import Tensor

from infotok_lit.objective.config import Reduction
from infotok_lit.objective.distributed import global_mean


@dataclass(frozen=True)
class TermNats:
    """One term on one local batch.

    Attributes:
        per_image: (B,) float32 nats per image, with its graph.
        elements: (B,) integers: how many elements of its own the term summed per image: tokens x dimensions for C,
            answer tokens or latent numbers for S, 1 (or 0 without a text) for A.
    """

    per_image: Tensor
    elements: Tensor

    def reduce(self, reduction: Reduction, num_places: int) -> Tensor:
        """Scalar, this rank's share of the global number.

        `tokens`: nats per image / N, the mean over the global batch, so that all terms share the unit nats/token.
        `mean`: nats per element of the term's own.
        """
        if reduction == "mean":
            return global_mean(self.per_image.sum(), self.elements.sum())
        return global_mean(self.per_image.sum() / num_places, len(self.per_image))
