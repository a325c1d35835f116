"""How many tokens an image keeps, and which: against the formula, and against masks written as loops."""

import pytest
import torch

from infotok_lit.budgets import RunningMean, keep_spread, nearest_count
from infotok_lit.errors import SettingsError
from infotok_lit.objective.token_budget import TokenBudget, TokenBudgetConfig, distillation


def rates_of(*images: list[float], num_extra: int = 1) -> torch.Tensor:
    """Rates of places, behind those of tokens without a place, which must not matter."""
    return torch.tensor([[1e6] * num_extra + row for row in images])


@pytest.fixture
def budget() -> TokenBudget:
    """Images carry 8 nats on average."""
    found = TokenBudget(num_extra=1)
    found.observe(rates_of([4.0, 0.0, 0.0, 0.0], [4.0, 4.0, 2.0, 2.0]))
    return found


def test_share_follows_what_an_image_carries(budget) -> None:
    rates = rates_of([2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.1], [9.0, 9.0, 9.0, 9.0])
    expected = torch.tensor([0.5, 0.25, 1 / 16, 1.0])
    torch.testing.assert_close(budget.share(rates, 0.5), expected)
    keeps = torch.tensor([0.5, 1.0, 0.5, 0.25])
    torch.testing.assert_close(budget.share(rates, keeps), torch.tensor([0.5, 0.5, 1 / 16, 1.0]))


def test_the_highest_rates_are_kept_and_tokens_without_a_place_always(budget) -> None:
    rates = rates_of([1.0, 3.0, 2.5, 1.5], [0.1, 0.0, 0.3, 0.0])
    assert budget.kept(rates, 0.5).tolist() == [
        [True, False, True, True, False],
        [True, False, False, True, False],  # a share of 1/16 is still one token
    ]


def test_other_scores_keep_as_many(budget) -> None:
    rates = rates_of([1.0, 3.0, 2.5, 1.5])
    assert budget.kept(rates, 0.5, -rates).tolist() == [[True, True, False, False, True]]


def test_everything_is_kept_at_a_share_of_one(budget) -> None:
    assert bool(budget.kept(rates_of([2.0, 2.0, 2.0, 2.0]), 1.0).all())


def test_the_mean_is_corrected_for_its_start() -> None:
    """It starts from 0: uncorrected, it would be a hundredth of what it has seen."""
    found = TokenBudget(num_extra=0, config=TokenBudgetConfig(decay=0.99))
    for total in (8.0, 8.0, 8.0):
        found.observe(torch.full((2, 4), total / 4))
        assert float(found.mean.mean) == pytest.approx(8.0, rel=1e-5)
    found.observe(torch.full((2, 4), 4.0))
    weights = [0.99**3, 0.99**2, 0.99, 1.0]
    expected = sum(w * x for w, x in zip(weights, (8, 8, 8, 16), strict=True)) / sum(weights)
    assert float(found.mean.mean) == pytest.approx(expected, rel=1e-5)


def test_the_mean_is_state() -> None:
    found = TokenBudget(num_extra=0)
    found.observe(torch.ones(2, 4))
    other = TokenBudget(num_extra=0)
    other.load_state_dict(found.state_dict())
    assert torch.equal(other.mean.mean, found.mean.mean)
    assert isinstance(found.mean, RunningMean)


def test_training_draws_every_share_and_observes_only_while_training() -> None:
    torch.manual_seed(0)
    found = TokenBudget(num_extra=2)
    rates = torch.ones(400, 18)
    counts = found.draw(rates).sum(1) - 2
    assert {int(count) for count in counts} == {4, 8, 12, 16}
    assert all(70 < int((counts == count).sum()) < 130 for count in (4, 8, 12, 16))
    before = found.mean.mean.clone()
    found.eval().draw(3 * rates)
    assert torch.equal(found.mean.mean, before)


def test_random_order_keeps_as_many_at_random() -> None:
    torch.manual_seed(0)
    found = TokenBudget(num_extra=0, config=TokenBudgetConfig(keep=(0.5,), order="random"))
    rates = torch.arange(1.0, 17.0).expand(500, -1)
    kept = found.draw(rates)
    assert set(kept.sum(1).tolist()) == {8}
    assert float((kept.float().mean(0) - 0.5).abs().max()) < 0.1


def test_counts_are_the_nearest() -> None:
    share = torch.tensor([1 / 16, 0.2, 0.5, 0.55, 1.0])
    assert nearest_count(share, 10).tolist() == [1, 2, 5, 6, 10]


@pytest.mark.parametrize("length", [1, 7, 16])
def test_spread_tokens_lie_in_equal_steps(length) -> None:
    for count in range(length + 1):
        (kept,) = keep_spread(torch.tensor([count]), length)
        places = kept.nonzero().flatten().tolist()
        assert len(places) == count
        gaps = {later - earlier for earlier, later in zip(places, places[1:], strict=False)}
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_distillation_is_the_divergence_from_the_teacher() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    made, truth = (torch.distributions.Categorical(logits=logits) for logits in (student, teacher))
    expected = torch.distributions.kl_divergence(truth, made).mean()
    loss = distillation(student, teacher)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert teacher.grad is None
    assert float(distillation(student, student)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weight": -1.0}, "token_budget.weight is -1.0"),
        ({"keep": ()}, "token_budget.keep is"),
        ({"keep": (0.5, 1.5)}, "above 0 and up to 1"),
        ({"order": "norm"}, "choose out of rate, random"),
        ({"decay": 1.0}, "token_budget.decay is 1.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, said) -> None:
    with pytest.raises(SettingsError, match=said):
        TokenBudgetConfig(**settings)
