"""Streaming CKA against loops over all the data at once."""

import math
from itertools import permutations
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import run_forked
from torch import Tensor

from infotok_lit.metrics.cka import LinearCKA


def features(n: int, p: int = 5, q: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n, p, generator=random, dtype=torch.float64) + 2
    mix = torch.randn(p, q, generator=random, dtype=torch.float64)
    return x, x @ mix + torch.randn(n, q, generator=random, dtype=torch.float64) - 5


def gram_loop(rows: Tensor) -> list[list[float]]:
    """Centred inner products as plain sums."""
    table = rows.tolist()
    n = len(table)
    mean = [sum(row[c] for row in table) / n for c in range(len(table[0]))]
    centred = [[value - m for value, m in zip(row, mean, strict=True)] for row in table]
    return [[sum(a * b for a, b in zip(r, s, strict=True)) for s in centred] for r in centred]


def hsic_loop(k: list[list[float]], other: list[list[float]], debiased: bool) -> float:
    """tr(K L), or Song et al.'s Eq. 5 written out over indices."""
    n = range(len(k))
    if not debiased:
        return sum(k[i][j] * other[i][j] for i in n for j in n)
    same = sum(k[i][j] * other[i][j] for i in n for j in n if i != j)
    sum_k, sum_other = (sum(m[i][j] for i in n for j in n if i != j) for m in (k, other))
    rows = sum(sum(k[i][j] for j in n if j != i) * sum(other[i][j] for j in n if j != i) for i in n)
    size = len(k)
    return same + sum_k * sum_other / ((size - 1) * (size - 2)) - 2 / (size - 2) * rows


def cka_loop(x: Tensor, y: Tensor, debiased: bool) -> float:
    k, other = gram_loop(x), gram_loop(y)
    scale = math.sqrt(hsic_loop(k, k, debiased) * hsic_loop(other, other, debiased))
    return hsic_loop(k, other, debiased) / scale


def streamed(x: Tensor, y: Tensor, *sizes: int) -> dict[str, float]:
    metric = LinearCKA(x.shape[1], y.shape[1])
    for a, b in zip(x.split(list(sizes)), y.split(list(sizes)), strict=True):
        metric.update(a, b)
    return {name: value.item() for name, value in metric.compute().items()}


@pytest.mark.parametrize("sizes", [(12,), (5, 1, 6), (1,) * 12])
def test_any_batches_give_what_loops_over_everything_give(sizes):
    x, y = features(12)
    values = streamed(x, y, *sizes)
    assert values["biased"] == pytest.approx(cka_loop(x, y, False), abs=1e-12)
    assert values["debiased"] == pytest.approx(cka_loop(x, y, True), abs=1e-12)


def test_order_of_the_batches_does_not_matter():
    x, y = features(40)
    order = torch.randperm(40)
    assert streamed(x[order], y[order], 7, 20, 13) == pytest.approx(streamed(x, y, 30, 10), abs=1e-12)


def test_shuffled_is_the_exact_mean_over_all_pairings_and_that_of_debiased_is_zero():
    x, y = features(5)
    by_pairing = [streamed(x, y[list(p)], 3, 2) for p in permutations(range(5))]
    biased, debiased = (sum(v[name] for v in by_pairing) / len(by_pairing) for name in ("biased", "debiased"))
    assert by_pairing[0]["shuffled"] == pytest.approx(biased, abs=1e-12)
    assert debiased == pytest.approx(0.0, abs=1e-12)


def test_unrelated_features_score_their_chance_level():
    """EVALUATION.md section 16: isotropic features of p = q dimensions reach about p / (n + p) by chance."""
    torch.manual_seed(0)
    x, y = torch.randn(400, 100), torch.randn(400, 100)
    values = streamed(x, y, 128, 128, 144)
    assert values["biased"] == pytest.approx(100 / 500, abs=0.01)
    assert values["biased"] == pytest.approx(values["shuffled"], abs=0.01)
    assert abs(values["debiased"]) < 0.01


def test_rotation_shift_and_scale_do_not_matter_and_single_channels_do():
    x, _ = features(30)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    values = streamed(x, 4 * x @ rotation + 100, 10, 20)
    assert values["biased"] == pytest.approx(1.0) and values["debiased"] == pytest.approx(1.0)
    outlier = x * torch.tensor([200.0, 1, 1, 1, 1])
    values = streamed(x, outlier, 30)
    assert values["biased"] < 0.9
    variance = outlier.var(0)
    assert values["top_channel_y"] == pytest.approx((variance[0] / variance.sum()).item())


def test_ranks_are_participation_ratios():
    x, y = features(50)
    values = streamed(x, y, 25, 25)
    for side, rows in (("x", x), ("y", y)):
        spectrum = torch.linalg.eigvalsh(torch.cov(rows.T))
        assert values[f"rank_{side}"] == pytest.approx((spectrum.sum() ** 2 / spectrum.square().sum()).item())


def test_a_mean_far_above_the_spread_loses_no_digits():
    """In float32, or in float64 without the shift, these offsets leave nothing but rounding."""
    x, y = features(40)
    values = streamed(x + 1e7, y - 1e7, 3, 17, 20)
    assert values == pytest.approx(streamed(x, y, 40), rel=1e-6)


def test_half_precision_features_are_summed_in_float64():
    x, y = (part.bfloat16() for part in features(64))
    metric = LinearCKA(5, 3)
    metric.update(x, y)
    assert metric.xy_xy.dtype == torch.float64
    assert metric.compute()["biased"].item() == pytest.approx(cka_loop(x.double(), y.double(), False), abs=1e-12)


def test_forward_returns_the_batch_and_keeps_the_whole():
    x, y = features(20)
    metric = LinearCKA(5, 3)
    first, second = metric(x[:8], y[:8]), metric(x[8:], y[8:])
    assert first["biased"].item() == pytest.approx(cka_loop(x[:8], y[:8], False), abs=1e-12)
    assert second["biased"].item() == pytest.approx(cka_loop(x[8:], y[8:], False), abs=1e-12)
    assert metric.compute()["biased"].item() == pytest.approx(cka_loop(x, y, False), abs=1e-12)


def test_too_little_is_nan_and_wrong_shapes_are_refused():
    metric = LinearCKA(5, 3)
    metric.update(torch.zeros(0, 5), torch.zeros(0, 3))
    with pytest.warns(UserWarning, match="before the ``update`` method|called before"):
        assert all(math.isnan(value) for value in LinearCKA(5, 3).compute().values())
    x, y = features(3)
    values = streamed(x, y, 3)
    assert math.isnan(values["debiased"]) and 0 < values["biased"] <= 1
    with pytest.raises(ValueError, match=r"expected features of shapes \(\(3, 5\), \(3, 3\)\)"):
        metric.update(x, y[:2])


def one_rank(rank: int, folder: Path, x: Tensor, y: Tensor) -> None:
    dist.init_process_group("gloo")
    metric, idle = LinearCKA(5, 3), LinearCKA(5, 3)
    own = slice(0, 7) if rank == 0 else slice(7, 20)
    metric.update(x[own], y[own])
    merged = metric.compute()
    alone = {name: value.clone() for name, value in metric.metric_state.items() if name == "count"}
    if rank == 1:
        idle.update(x, y)
    torch.save((merged, alone["count"], idle.compute()), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_of_unequal_share_equal_one(tmp_path):
    x, y = features(20)
    x = torch.cat([x[:7] + 50, x[7:]])  # the ranks' shifts are far apart
    expected = streamed(x, y, 20)
    assert expected["biased"] == pytest.approx(cka_loop(x, y, False), abs=1e-12)
    run_forked(one_rank, 2, tmp_path, x, y)
    for rank in range(2):
        merged, count, idle = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert {name: value.item() for name, value in merged.items()} == pytest.approx(expected, abs=1e-11)
        assert {name: value.item() for name, value in idle.items()} == pytest.approx(expected, abs=1e-11)
        assert count == (7, 13)[rank]  # the sync is undone, so that a rank goes on with its own rows
