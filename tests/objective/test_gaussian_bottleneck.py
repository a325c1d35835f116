"""The trained objective lands on the information bottleneck curve of Gaussian variables, known in closed form."""

import math

import pytest
import torch

from infotok_lit.objective.config import BranchWeights, DecoderConfig, ObjectiveConfig, ProjectionConfig
from infotok_lit.objective.infotok import InfoTok
from infotok_lit.objective.inputs import BranchInputs

CORRELATIONS = torch.tensor([0.95, 0.7])


def gaussian_inputs(batch: int) -> BranchInputs:
    """Two dimensions of X in a token (the rest constant, so that a LayerNorm loses nothing); Y = rho X + noise."""
    x = torch.randn(batch, 1, 2)
    y = CORRELATIONS * x + (1 - CORRELATIONS**2).sqrt() * torch.randn(batch, 1, 2)
    constant = torch.tensor([1.0, -1.0]).repeat(32).expand(batch, 1, 64)
    no_text = torch.zeros(batch, 0, dtype=torch.bool)
    return BranchInputs(
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


@pytest.mark.parametrize("beta", [2.0, 5.0])
def test_training_reaches_the_analytic_curve(beta):
    torch.manual_seed(0)
    config = ObjectiveConfig(
        terms=("compactness", "sufficiency"),
        branches=("generation",),
        projection=ProjectionConfig(kind="linear", latent_width=2),
        decoder=DecoderConfig(width=16, depth=1, heads=2),
        weight=1.0,
        generation=BranchWeights(beta=beta),
    )
    infotok = InfoTok(config, token_width=66, latent_channels=2, text_width=4, num_extra=0)
    optimizer = torch.optim.Adam(infotok.parameters(), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=500)
    for step in range(500):
        optimizer.zero_grad()
        infotok("generation", gaussian_inputs(256), step).loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        report = infotok("generation", gaussian_inputs(20_000), 0).report
    rate, relevance, active = bottleneck_curve(beta)
    entropy = math.log(2 * math.pi * math.e)
    assert report["active_units"] == active
    assert abs(report["rate_bits_per_image"].item() * math.log(2) - rate) < 0.08
    assert relevance - 0.05 < entropy - report["sufficiency_nats_per_image"].item() < relevance + 0.03
