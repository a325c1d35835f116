"""DPM-Solver++ on tokens, against the exact solution for Gaussian data."""

import pytest
import torch
from torch import Tensor

from infotok_lit.errors import SettingsError
from infotok_lit.models.harmon.diffusion import make_schedule
from infotok_lit.models.harmon.family import SamplingConfig
from infotok_lit.models.harmon.sampling import SOLVER_STEPS_FROM, sample_tokens, solve_tokens

MEAN, STD = 0.7, 0.3
SIGNAL = make_schedule().alphas_cumprod.sqrt()


def gaussian(x: Tensor, t: Tensor, mean: float = MEAN) -> Tensor:
    """The perfect network for tokens from N(mean, STD^2), with a variance in the middle of its range."""
    signal = SIGNAL[t].float().unsqueeze(1)
    noise = (1 - signal**2).sqrt()
    predicted = noise * (x - signal * mean) / (signal**2 * STD**2 + noise**2)
    return torch.cat([predicted, torch.zeros_like(predicted)], dim=1)


def exact(noise: Tensor, mean: float = MEAN) -> Tensor:
    """Where the probability-flow equation leads from noise at the solver's first timestep: a linear map."""
    signal = float(SIGNAL[SOLVER_STEPS_FROM - 1])
    return mean + STD * (noise - signal * mean) / (signal**2 * STD**2 + 1 - signal**2) ** 0.5


def error(steps: int) -> float:
    noise = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    return float((solve_tokens(gaussian, lambda count: noise[None], steps) - exact(noise)).abs().max())


def test_the_solver_converges_to_the_exact_solution() -> None:
    """Of second order: twice the steps, a quarter of the error. A first-order one at best halves it."""
    assert error(20) < 0.02
    assert error(80) < error(40) / 3 < error(20) / 9


def test_the_solver_asks_the_network_once_a_step_and_for_one_draw() -> None:
    asked: list[float] = []
    draws: list[int] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return gaussian(x, t)

    def draw(count: int) -> Tensor:
        draws.append(count)
        return torch.zeros(count, 2, 4)

    solve_tokens(network, draw, 6)
    assert draws == [1]
    assert len(asked) == 6 and asked == sorted(asked, reverse=True) and asked[0] == SOLVER_STEPS_FROM - 1


@pytest.mark.parametrize("sampler", ["solver", "chain"])
def test_guidance_mixes_the_predictions_of_both_halves(sampler: str) -> None:
    """For equal variances, mixed predictions are the prediction for mixed means: -0.5 + 3 (0.7 + 0.5)."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(31, 8, 4, generator=generator)

    def both(x: Tensor, t: Tensor) -> Tensor:
        assert torch.equal(x[:8], x[8:])
        return torch.cat([gaussian(x[:8], t), gaussian(x[8:], t, mean=-0.5)])

    def mixed(x: Tensor, t: Tensor) -> Tensor:
        return gaussian(x, t, mean=3.1)

    def sampled(network, guidance: float) -> Tensor:
        if sampler == "solver":
            return solve_tokens(network, lambda count: noise[:count], 10, guidance)
        return sample_tokens(network, lambda count: noise[:count], make_schedule("30"), 1.0, guidance)

    torch.testing.assert_close(sampled(both, 3.0), sampled(mixed, 1.0), rtol=1e-3, atol=1e-3)


def test_a_temperature_without_noise_is_refused() -> None:
    SamplingConfig(temperature=0.5)
    with pytest.raises(SettingsError, match="temperature is 0.5, but DPM-Solver"):
        SamplingConfig(temperature=0.5, solver_steps=10)
