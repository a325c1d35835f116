"""Rates and masks against their definitions, written as loops."""

import pytest
import torch

from infotok_lit.budgets import (
    FLEX_BASES,
    RunningMean,
    block_rates,
    budget_rate,
    draw_bases,
    keep_first,
    keep_top,
    kept_count,
    rates_with_mean,
)
from infotok_lit.errors import SettingsError
from infotok_lit.video.rates import RateConfig
from infotok_lit.video.tokenizer import keep_clipwide


def test_without_ties_the_mask_is_the_official_quantile() -> None:
    generator = torch.Generator().manual_seed(0)
    for length in (2, 7, 36, 160):
        for rate in (1.0, 0.75, 0.5, 0.3, 0.25, 1 / 16):
            scores = torch.rand(1, length, generator=generator)
            above = scores > torch.quantile(scores, 1 - rate, dim=-1, keepdim=True)
            assert torch.equal(keep_top(scores, kept_count(torch.tensor([rate]), length)), above)


def test_of_tied_tokens_exactly_as_many_are_kept_as_the_budget_has() -> None:
    scores = torch.tensor([[0.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    kept = keep_top(scores, torch.tensor([2, 3]))
    assert kept.tolist() == [[False, True, True, False], [True, True, True, False]]


def test_each_clip_of_a_batch_has_its_own_rate() -> None:
    maps = torch.rand(3, 2, 4, 4)
    rates = torch.tensor([1.0, 0.5, 0.1])
    together = keep_clipwide(maps, rates)
    for i in range(3):
        assert torch.equal(together[i : i + 1], keep_clipwide(maps[i : i + 1], rates[i : i + 1]))


def test_a_kept_token_is_never_worse_than_a_dropped_one() -> None:
    scores = torch.rand(5, 50)
    kept = keep_top(scores, torch.tensor([1, 10, 25, 49, 50]))
    assert kept.sum(1).tolist() == [1, 10, 25, 49, 50]
    for row, mask in zip(scores[:4], kept[:4], strict=True):
        assert row[mask].min() >= row[~mask].max()


def test_the_first_tokens_are_dealt_out_over_the_block() -> None:
    rate = torch.tensor([[0.5]])
    assert keep_first(rate, 8).tolist() == [[[True] * 5 + [False] * 3]]
    dealt = keep_first(rate, 8, stride=4)[0, 0]
    # Position i of the block lies at row i // 2 of 4 rows; reading columns first deals neighbours two apart.
    expected = [True, True, True, False, True, True, False, False]
    assert dealt.tolist() == expected
    assert dealt.sum() == 5


def test_budgets_are_proportional_to_complexity_and_bounded() -> None:
    complexity = torch.tensor([0.1, 0.2, 0.4, 10.0, 0.0])
    rates = budget_rate(complexity, 0.2, 0.5)
    assert torch.allclose(rates, torch.tensor([0.25, 0.5, 1.0, 1.0, 1 / 16]))
    assert budget_rate(complexity[:1], 0.2, 0.6, steps=4).item() == 0.25


@pytest.mark.parametrize("mean", [0.1, 0.25, 0.5, 0.9, 1.0])
def test_clipped_rates_keep_their_mean(mean: float) -> None:
    complexity = torch.cat((torch.rand(30) + 0.01, torch.tensor([5.0, 9.0])))
    rates = rates_with_mean(complexity, mean)
    assert rates.mean().item() == pytest.approx(mean, abs=1e-4)
    free = (rates > 1 / 16 + 1e-6) & (rates < 1 - 1e-6)
    ratio = rates[free] / complexity[free]
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-4) if free.any() else mean == 1


@pytest.mark.parametrize("kind", ["map", "first", "jump", "random"])
def test_every_kind_of_mask_keeps_the_same_number(kind: str) -> None:
    maps, rates = torch.rand(3, 2, 4, 8), torch.tensor([1.0, 0.5, 0.1])
    mask = keep_clipwide(maps, rates, kind)
    assert mask.flatten(1).sum(1).tolist() == kept_count(rates, 64).tolist()
    half = mask[1].flatten(1)
    if kind == "first":
        assert half[:, :15].all() and half[:, 17:].sum() == 0
    if kind == "jump":
        assert half.unflatten(1, (8, 4))[..., 2:].sum() == 0


def test_blocks_share_out_the_base_rate() -> None:
    scores = torch.rand(4, 6, 3, 3) + 0.5
    base = torch.tensor([0.25, 0.5, 0.75, 1.0])
    rates = block_rates(scores, base)
    assert torch.allclose(rates.mean(1), base, atol=1e-4)
    order = scores.mean((2, 3)).argsort(1)
    assert torch.equal(rates[:3].argsort(1), order[:3])
    assert rates.max() <= 1 and torch.allclose(rates[3], torch.ones(6))


@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_corrected_mean_is_the_weighted_mean_of_what_was_seen(count: int) -> None:
    values = torch.rand(count, dtype=torch.float64) + 0.1
    mean = RunningMean(factor=0.9)
    for value in values:
        mean.update(value.float())
    weights = 0.9 ** torch.arange(count - 1, -1, -1, dtype=torch.float64)
    assert mean.mean.item() == pytest.approx((weights * values).sum().item() / weights.sum().item(), rel=1e-5)
    assert torch.allclose(mean.history[:count], values.flip(0).float())


def test_a_constant_is_its_own_mean_at_every_step() -> None:
    mean = RunningMean(factor=0.99)
    for _ in range(300):
        mean.update(torch.tensor(2.0))
        assert mean.mean.item() == pytest.approx(2.0, rel=1e-4)
    uncorrected = RunningMean(factor=0.99, bias_correction=False)
    uncorrected.update(torch.tensor(2.0))
    assert uncorrected.mean.item() == pytest.approx(0.02)


def test_one_bad_value_does_not_spoil_the_mean() -> None:
    mean = RunningMean(factor=0.9)
    for value in (1.0, float("nan"), 1.0):
        mean.update(torch.tensor(value))
    assert mean.mean.item() == pytest.approx(1.0)


def test_rates_are_drawn_as_the_strategy_says() -> None:
    maps = torch.rand(64, 2, 4, 4) + 0.5
    mean = RunningMean()
    mean.update(maps.mean())
    assert torch.equal(RateConfig("static").draw(maps, mean), torch.ones(64))
    uniform = RateConfig("uniform").draw(maps, mean)
    assert uniform.min() >= 1 / 16 and uniform.max() < 1 and uniform.unique().numel() > 50
    drawn = RateConfig("elbo").draw(maps, mean)
    assert all(min(abs(rate - base) for base in FLEX_BASES) < 1e-3 for rate in drawn.tolist())
    fixed = RateConfig("elboema", bases=(0.5,)).draw(maps, mean)
    assert torch.allclose(fixed, 0.5 * maps.flatten(1).mean(1) / maps.mean(), rtol=1e-5)
    assert set(draw_bases((0.25, 0.5), 100, torch.device("cpu")).tolist()) == {0.25, 0.5}


@pytest.mark.parametrize("settings", [{"bases": ()}, {"bases": (0.01,)}, {"mean_factor": 1.0}])
def test_rates_that_cannot_be_are_refused(settings: dict) -> None:
    with pytest.raises(SettingsError):
        RateConfig(**settings)
