"""`estimator: hsic`: the three terms as normalised HSIC with Gaussian kernels, the same objective without any head.

No decoder, no posterior and no parameter: a number from the distances within one batch. Gretton et al., 2005 (HSIC);
Song et al., 2012, JMLR 13 (the unbiased form); Cortes et al., 2012 (the normalisation, also known as CKA).

Shapes: B images, or n samples of any widths p and q.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infotok_lit.batch import Branch, BranchOutput
from infotok_lit.errors import SettingsError
from infotok_lit.objective.distributed import RowGatherer
from infotok_lit.objective.term import BranchObjective, Term, answer_words, mean_text

IMAGE_VECTOR_SIDE = 16
"""Fine enough to tell scenes apart, coarse enough that distances are not about noise."""

FEWEST_SAMPLES = 4
"""The unbiased form divides by n - 3."""


@dataclass(frozen=True)
class HSICConfig:
    """Settings of `estimator: hsic`.

    Args:
        unbiased: Use the unbiased form, whose value does not depend on the batch size. The biased form is smoother and
            never negative, but far from 0 for small batches of independent samples. Both need at least 4 images.
    """

    unbiased: bool = True


def normalised_hsic(x: Tensor, y: Tensor, unbiased: bool) -> Tensor:
    """HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)): (n, p), (n, q) -> scalar, dimensionless.

    1 says that one determines the other up to rotation, shift and scale. Biased: in [0, 1], never 0 for a finite batch,
    and the further from 0 the smaller the batch. Unbiased: 0 on average for independent samples whatever the batch, in
    [-1, 1]. 0 for fewer than four samples, and where all samples of X or of Y are equal.
    """
    if len(x) < FEWEST_SAMPLES:
        return (x.sum() + y.sum()) * 0.0
    centre = _u_centred if unbiased else _centred
    of_x, of_y = centre(gaussian_kernel(x)), centre(gaussian_kernel(y))
    scale = (of_x.square().sum() * of_y.square().sum()).clamp(min=torch.finfo(x.dtype).tiny).sqrt()
    return (of_x * of_y).sum() / scale


def gaussian_kernel(x: Tensor) -> Tensor:
    """(n, p) -> (n, n): exp(-d^2 / (2 sigma^2)) - 1, sigma the median distance (no gradient flows through it).

    The 1 goes, because centring would remove it anyway, and then all samples equal are exactly 0 and not rounding.
    The median is over pairs that differ: where most samples are copies, as short answers are, it would be 0 otherwise.
    """
    # Not by a matrix product: its rounding would make copies differ.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    apart = distance.detach().where(distance.detach() > 0, torch.nan)
    sigma = apart.nanmedian().nan_to_num(1.0)
    return torch.expm1(-distance.square() / (2 * sigma.square()))


def _centred(kernel: Tensor) -> Tensor:
    """H K H with H = I - 1/n: the sum of products of two such is (n - 1)^2 times the biased HSIC."""
    return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()


def _u_centred(kernel: Tensor) -> Tensor:
    """Zero diagonal -> rows that sum to 0: the sum of products of two such is n (n - 3) times the unbiased HSIC."""
    size = len(kernel)
    diagonal = torch.eye(size, dtype=torch.bool, device=kernel.device)
    rows = kernel.sum(1) / (size - 2)
    centred = kernel - rows - rows[:, None] + kernel.sum() / ((size - 1) * (size - 2))
    return centred.masked_fill(diagonal, 0.0)


class Partner(NamedTuple):
    """What the tokens are compared with: one vector per image, and where there is one."""

    vectors: Tensor
    """(B, width) float32, without a graph."""
    present: Tensor
    """(B,) bool."""


class DependenceTerms(nn.Module):
    """C = nHSIC(Z, I), S = 1 - nHSIC(Z, Y), A = 1 - nHSIC(Z, T): dimensionless costs, 0 at best.

    Z is the mean token of an image. Not all tokens side by side: a branch may show the encoder other places of every
    image, so entries would not correspond, and distances in a hundred thousand dimensions are all alike.
    I is the image as pixels, downsampled; Y the mean embedding of the answer's words (understanding) or all clean
    latents (generation); T the mean embedding of the paired text. Where Y says nearly what I says, as in generation, C
    and S pull on nearly the same number, and beta > 1 decides for S. All are over the global batch.

    Args:
        branch: which of the two targets Y is.
        terms: which terms act.
        unbiased: the form of HSIC.
    """

    def __init__(self, branch: Branch, terms: tuple[Term, ...], unbiased: bool) -> None:
        super().__init__()
        self.branch = branch
        self.terms = terms
        self.unbiased = unbiased
        self.gather = RowGatherer()

    def forward(self, tokens: Tensor, output: BranchOutput, pixel_values: Tensor | None) -> BranchObjective:
        """The terms of one batch; a collective call. A term with fewer than four pairs is not reported.

        Args:
            tokens: (B, N, D), those of `output` or a detached copy.
            pixel_values: (B, 3, height, width), for compactness.

        Raises:
            SettingsError: a training batch of fewer than four images.
            ValueError: a term needs the image or the latents, and there are none.
        """
        (means,) = self.gather((tokens.float().mean(1),), self.training)
        if self.training and len(means) < FEWEST_SAMPLES:
            raise SettingsError(
                f"estimator hsic compares the images of a batch, over all ranks; it needs {FEWEST_SAMPLES} or more and "
                f"got {len(means)}. Raise the batch size; accumulating gradients does not help."
            )
        costs: dict[Term, Tensor] = {}
        report: dict[str, Tensor] = {}
        for term in self.terms:
            vectors, present = self.gather(self._partner(term, output, pixel_values), self.training)
            compared = means[present]
            dependence = normalised_hsic(compared, vectors[present], self.unbiased)
            costs[term] = dependence if term == "compactness" else 1 - dependence
            if len(compared) >= FEWEST_SAMPLES:
                report[f"hsic_{term}"] = dependence.detach()
        return BranchObjective(costs, report)

    def _partner(self, term: Term, output: BranchOutput, pixel_values: Tensor | None) -> Partner:
        everywhere = torch.ones_like(output.text.key, dtype=torch.bool)
        if term == "compactness":
            if pixel_values is None:
                raise ValueError("estimator hsic compares the tokens with the image; give pixel_values.")
            return Partner(image_vector(pixel_values), everywhere)
        if term == "alignment":
            return Partner(mean_text(output, output.text.mask), output.text.mask.any(1))
        if term != "sufficiency":
            raise ValueError(f"estimator hsic does not know the term {term!r}; say in hsic.py what it compares.")
        if self.branch == "generation":
            if output.latents is None:
                raise ValueError("estimator hsic compares the tokens with the latents; give latents.")
            return Partner(output.latents.detach().float().flatten(1), everywhere)
        answer = answer_words(output)
        return Partner(mean_text(output, answer), answer.any(1))


def image_vector(pixel_values: Tensor) -> Tensor:
    """(B, 3, height, width) -> (B, 3 * 16 * 16) float32: mean colours of a 16 x 16 grid, the same for any size."""
    return F.adaptive_avg_pool2d(pixel_values.float(), IMAGE_VECTOR_SIDE).flatten(1)
