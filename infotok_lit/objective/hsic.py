"""The Hilbert-Schmidt independence criterion (HSIC) with Gaussian kernels: what two sets of vectors say of each other.

No decoder, no posterior and no parameter: a number from the distances within one batch. Gretton et al., 2005 (HSIC);
Song et al., 2012, JMLR 13 (the unbiased form); Cortes et al., 2012 (the normalisation, also known as CKA).

Shapes: n samples, of any widths p and q.
"""

import torch
from torch import Tensor

FEWEST_SAMPLES = 4
"""The unbiased form divides by n - 3."""


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
    apart = distance.detach()[distance.detach() > 0]
    sigma = apart.median() if len(apart) else distance.new_ones(())
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
