"""The trained objective lands on the information bottleneck curve of Gaussian variables, known in closed form."""

import math

import pytest
import torch
from branch_outputs import branch_output

from infotok_lit.batch import BranchOutput
from infotok_lit.objective.compactness import ProjectionConfig
from infotok_lit.objective.config import BranchWeights, ObjectiveConfig
from infotok_lit.objective.constraint import DualConfig
from infotok_lit.objective.infotok import InfoTok
from infotok_lit.objective.sufficiency import DecoderConfig
from infotok_lit.objective.term import Widths

CORRELATIONS = torch.tensor([0.95, 0.7])
TEST_BATCHES, TEST_BATCH_SIZE = 20, 1_000
TEST_SAMPLES = TEST_BATCHES * TEST_BATCH_SIZE


def gaussian_inputs(batch: int) -> BranchOutput:
    """Two dimensions of X in a token (the rest constant, so that a LayerNorm loses nothing); Y = rho X + noise."""
    x = torch.randn(batch, 1, 2)
    y = CORRELATIONS * x + (1 - CORRELATIONS**2).sqrt() * torch.randn(batch, 1, 2)
    constant = torch.tensor([1.0, -1.0]).repeat(32).expand(batch, 1, 64)
    no_text = torch.zeros(batch, 0, dtype=torch.bool)
    return branch_output(
        tokens=torch.cat([x, constant], dim=-1),
        token_index=torch.zeros(batch, 1, dtype=torch.int64),
        num_extra=0,
        grid=(1, 1),
        text_ids=no_text.long(),
        text_mask=no_text,
        target_mask=no_text,
        text_key=torch.zeros(batch, dtype=torch.int64),
        text_embedding=torch.zeros(1, 4),
        latents=y,
        latent_grid=(1, 1),
    )


def bottleneck_curve(beta: float) -> tuple[float, float, int]:
    """(I(Z; X), I(Z; Y)) in nats and the number of active dimensions that minimise I(Z; X) - beta I(Z; Y).

    Gaussian information bottleneck (Chechik et al., 2005): a dimension is used where beta > 1 / rho^2.
    """
    used = [rho**2 for rho in CORRELATIONS.tolist() if beta > 1 / rho**2]
    rate = sum(0.5 * math.log((beta - 1) * r / (1 - r)) for r in used)
    return rate, rate - sum(0.5 * math.log(beta * r) for r in used), len(used)


def most_relevance(rate: float) -> float:
    """The curve at a rate: the largest I(Z; Y) that any Z of that I(Z; X) can have."""
    low, high = 1.0, 1e6
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if bottleneck_curve(middle)[0] < rate else (low, middle)
    return bottleneck_curve(low)[1]


def train(beta: float, steps: int = 500, **others) -> tuple[InfoTok, dict[str, torch.Tensor]]:
    """Our own heads and terms, trained on fresh samples; then what is reported of 20,000 others."""
    torch.manual_seed(0)
    config = ObjectiveConfig(
        terms=("compactness", "sufficiency"),
        branches=("generation",),
        projection=ProjectionConfig(kind="linear", latent_width=2),
        decoder=DecoderConfig(width=16, depth=1, heads=2),
        generation=BranchWeights(lambda_=1.0, beta=beta, **others),
        dual=DualConfig(step_size=0.05),
    )
    infotok = InfoTok(config, {"generation": Widths(tokens=66, latents=2, text=4, num_extra=0)})
    optimizer = torch.optim.Adam(infotok.parameters(), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=steps)
    for step in range(steps):
        optimizer.zero_grad()
        infotok("generation", gaussian_inputs(256), step).loss.backward()
        optimizer.step()
        schedule.step()
    infotok.eval()
    with torch.no_grad():
        # In batches, as what is measured with another sample's tokens compares each sample with each.
        reports = [infotok("generation", gaussian_inputs(TEST_BATCH_SIZE), 0).report for _ in range(TEST_BATCHES)]
    return infotok, {name: torch.stack([report[name] for report in reports]).mean() for name in reports[0]}


def point(report: dict) -> tuple[float, float]:
    """(rate, relevance) in nats."""
    entropy = math.log(2 * math.pi * math.e)
    rate = report["rate_bits_per_image"].item() * math.log(2)
    return rate, entropy - report["sufficiency_nats_per_image"].item()


# None, one and both of the dimensions are worth their rate from 1 / 0.95^2 = 1.108 and 1 / 0.7^2 = 2.04 on.
@pytest.mark.parametrize("beta", [1.05, 1.5, 5.0, 40.0])
def test_training_reaches_the_analytic_curve_and_never_exceeds_it(beta):
    _, report = train(beta)
    rate, relevance = point(report)
    best_rate, _, active = bottleneck_curve(beta)
    assert report["active_units"] == active
    assert abs(rate - best_rate) < 0.08
    # In expectation never above. -log p of two Gaussian dimensions has a standard deviation of 1.
    assert relevance < most_relevance(rate) + 3 / TEST_SAMPLES**0.5
    assert relevance > 0.96 * most_relevance(rate) - 3 / TEST_SAMPLES**0.5


def test_a_rate_budget_ends_on_the_curve_with_its_slope_as_multiplier():
    """S * 5 + mu C subject to rate <= that of beta = 2: at the optimum mu / 5 is the curve's slope 1 / beta there."""
    budget, _, _ = bottleneck_curve(2.0)
    infotok, report = train(5.0, rate_budget_bits=budget / math.log(2))
    rate, relevance = point(report)
    assert abs(rate - budget) < 0.04
    assert relevance > 0.96 * most_relevance(rate) - 3 / TEST_SAMPLES**0.5
    assert infotok.constraints["generation"].multiplier(0).item() == pytest.approx(5 / 2, rel=0.15)
