"""Linear CKA between two sets of features of the same samples: exact, in one pass, in any number of batches or ranks.

Kornblith et al., 2019 (arXiv 1905.00414); debiased by the unbiased HSIC of Song et al., 2012 (JMLR 13).
Shapes: n samples, p and q features.
"""

from dataclasses import dataclass, fields
from functools import reduce

import torch
from torch import Tensor
from torchmetrics import Metric

FEWEST_SAMPLES = 4
"""The debiased form divides by n - 3."""


@dataclass(frozen=True)
class PairSums:
    """What CKA needs to know of paired rows x (n, p) and y (n, q), all in float64; u = |x|^2, v = |y|^2 per row."""

    x: Tensor
    """(p,) sum of x."""
    y: Tensor
    """(q,) sum of y."""
    xy: Tensor
    """(p, q) sum of x y^T."""
    u: Tensor
    v: Tensor
    uv: Tensor
    uy: Tensor
    """(q,) sum of u y."""
    vx: Tensor
    """(p,) sum of v x."""

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> "PairSums":
        """The sums over rows (n, p), (n, q)."""
        u, v = x.square().sum(1), y.square().sum(1)
        return cls(x.sum(0), y.sum(0), x.T @ y, u.sum(), v.sum(), u @ v, u @ y, v @ x)

    def plus(self, other: "PairSums") -> "PairSums":
        """The sums over the rows of both."""
        return PairSums(*(mine + theirs for mine, theirs in zip(self.tensors(), other.tensors(), strict=True)))

    def tensors(self) -> tuple[Tensor, ...]:
        """The sums, in the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def moved(self, count: Tensor, by_x: Tensor, by_y: Tensor) -> "PairSums":
        """The sums of x - by_x (p,) and y - by_y (q,) over the same `count` rows."""
        x2, y2 = by_x @ by_x, by_y @ by_y
        u = self.u - 2 * by_x @ self.x + count * x2
        v = self.v - 2 * by_y @ self.y + count * y2
        u_times_v = (
            (self.uv - 2 * by_y @ self.uy + y2 * self.u)
            - 2 * (by_x @ self.vx - 2 * by_x @ self.xy @ by_y + y2 * by_x @ self.x)
            + x2 * v
        )
        return PairSums(
            x=self.x - count * by_x,
            y=self.y - count * by_y,
            xy=self.xy - torch.outer(self.x, by_y) - torch.outer(by_x, self.y) + count * torch.outer(by_x, by_y),
            u=u,
            v=v,
            uv=u_times_v,
            uy=self.uy - 2 * by_x @ self.xy + x2 * self.y - by_y * u,
            vx=self.vx - 2 * self.xy @ by_y + y2 * self.x - by_x * v,
        )

    def biased(self) -> Tensor:
        """|x^T y|^2 of centred rows: (n - 1)^2 times the biased HSIC."""
        return self.xy.square().sum()

    def debiased(self, count: Tensor) -> Tensor:
        """Of centred rows: n (n - 3) times the unbiased HSIC."""
        return self.biased() - count / (count - 2) * self.uv + self.u * self.v / ((count - 1) * (count - 2))


PAIRS = ("xy", "xx", "yy")
SUMS = tuple(field.name for field in fields(PairSums))


class LinearCKA(Metric):
    """How alike two representations of the same samples are, up to rotation, shift and one common scale.

    No batch approximation: the value is that of all rows at once, whatever the batches, their order and the ranks.
    Sums are in float64, of rows from which a shift near their mean was taken off first, so that features whose mean is
    large against their spread lose nothing. Memory: (p^2 + q^2 + p q) float64, times the number of ranks while they
    are merged. Pool tokens over valid places only, and let no sampler repeat rows to even out ranks.

    Args:
        width_x: p.
        width_y: q.
        sync_on_compute: Merge the ranks' sums; False where every rank is given all rows.
    """

    # The sums of two batches do not add up where their shifts differ, so torchmetrics must not add them.
    full_state_update = True
    count: Tensor
    shift_x: Tensor
    shift_y: Tensor

    def __init__(self, width_x: int, width_y: int, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.widths = {"x": width_x, "y": width_y}
        self._add("count", ())
        for side, width in self.widths.items():
            self._add(f"shift_{side}", (width,))
        for pair in PAIRS:
            first, second = (self.widths[side] for side in pair)
            shapes = {"x": (first,), "y": (second,), "xy": (first, second), "uy": (second,), "vx": (first,)}
            for name in SUMS:
                self._add(f"{pair}_{name}", shapes.get(name, ()))

    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds rows (B, p) and (B, q) of the same B samples, of any floating type.

        Raises:
            ValueError: other shapes.
        """
        wanted = (len(x), self.widths["x"]), (len(x), self.widths["y"])
        if (tuple(x.shape), tuple(y.shape)) != wanted:
            raise ValueError(f"expected features of shapes {wanted}, got {tuple(x.shape)} and {tuple(y.shape)}")
        if not len(x):
            return
        rows = {"x": x.detach().double(), "y": y.detach().double()}
        if self.count == 0:
            self.shift_x, self.shift_y = rows["x"].mean(0), rows["y"].mean(0)
        rows = {"x": rows["x"] - self.shift_x, "y": rows["y"] - self.shift_y}
        for pair in PAIRS:
            new = PairSums.of(rows[pair[0]], rows[pair[1]])
            for name, value in zip(SUMS, new.tensors(), strict=True):
                setattr(self, f"{pair}_{name}", getattr(self, f"{pair}_{name}") + value)
        self.count = self.count + len(x)

    def compute(self) -> dict[str, Tensor]:
        """Scalars; nan where there is nothing to compare.

        Returns:
            biased: Kornblith's CKA in [0, 1]; for few samples or many features far above 0 for unrelated features.
            debiased: about 0 for unrelated features, and may be slightly negative; nan for fewer than four samples.
            shuffled: what `biased` is on average over all ways to pair the rows wrongly or rightly, in closed form:
                its chance level. That of `debiased` is exactly 0.
            rank_x, rank_y: effective dimension of each side, the participation ratio (tr S)^2 / tr S^2.
            top_channel_x, top_channel_y: share of the variance in the largest channel. Near 1, one outlier channel
                decides everything.
        """
        count, sums = self._centred()
        alike, of_x, of_y = (sums[pair] for pair in PAIRS)
        scale = (of_x.biased() * of_y.biased()).sqrt()
        debiased_scale = (of_x.debiased(count) * of_y.debiased(count)).sqrt()
        debiased = alike.debiased(count) / debiased_scale
        values = {
            "biased": alike.biased() / scale,
            "debiased": torch.where(count >= FEWEST_SAMPLES, debiased, torch.nan),
            # E over permutations P of tr(K P L P^T) = tr K tr L / (n - 1) for centred Gram matrices.
            "shuffled": alike.u * alike.v / ((count - 1) * scale),
        }
        for side, own in (("x", of_x), ("y", of_y)):
            values[f"rank_{side}"] = own.u.square() / own.biased()
            values[f"top_channel_{side}"] = own.xy.diagonal().max() / own.u
        return values

    def _centred(self) -> tuple[Tensor, dict[str, PairSums]]:
        """The number of rows, and the sums over all of them from their own mean. After a sync, states are stacked."""
        counts = self.count.reshape(-1)
        shifts = {side: getattr(self, f"shift_{side}").reshape(len(counts), -1) for side in "xy"}
        states = {pair: {name: getattr(self, f"{pair}_{name}") for name in SUMS} for pair in PAIRS}
        if self.count.ndim == 0:
            states = {pair: {name: value[None] for name, value in state.items()} for pair, state in states.items()}
        # Each rank's mean is its shift and what is left; the mean of all is in reach of all of them.
        means = {side: (counts @ shifts[side] + states[side * 2]["x"].sum(0)) / counts.sum() for side in "xy"}
        centred = {}
        for pair in PAIRS:
            parts = [PairSums(*(states[pair][name][rank] for name in SUMS)) for rank in range(len(counts))]
            moves = [[means[side] - shifts[side][rank] for side in pair] for rank in range(len(counts))]
            moved = [part.moved(count, *move) for part, count, move in zip(parts, counts, moves, strict=True)]
            centred[pair] = reduce(PairSums.plus, moved)
        return counts.sum(), centred

    def _add(self, name: str, shape: tuple[int, ...]) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx=None)
