"""The posterior against torch.distributions and Monte Carlo."""

import torch
from torch.distributions import Normal, kl_divergence

from infotok_lit.objective.compactness import Posterior, soft_clamp


def random_posterior() -> Posterior:
    random = torch.Generator().manual_seed(0)
    return Posterior(torch.randn(2, 3, 4, generator=random), torch.randn(2, 3, 4, generator=random) * 2 - 2)


def test_kl_equals_torch_distributions():
    posterior = random_posterior()
    q = Normal(posterior.mean, (posterior.log_variance / 2).exp())
    torch.testing.assert_close(posterior.kl(), kl_divergence(q, Normal(0.0, 1.0)), rtol=1e-5, atol=1e-6)


def test_kl_keeps_its_digits_near_the_prior():
    posterior = Posterior(torch.zeros(1, 1, 1), torch.full((1, 1, 1), 1e-3))
    exact = 0.5 * (1e-3**2 / 2 + 1e-3**3 / 6)
    torch.testing.assert_close(posterior.kl().item(), exact, rtol=1e-3, atol=0)


def test_kl_equals_monte_carlo():
    torch.manual_seed(0)
    one = Posterior(torch.tensor([[[0.7, -0.3]]]), torch.tensor([[[-1.0, 0.5]]]))
    many = Posterior(one.mean.expand(200_000, 1, 2), one.log_variance.expand(200_000, 1, 2))
    sample = many.rsample()
    log_ratio = Normal(one.mean, (one.log_variance / 2).exp()).log_prob(sample) - Normal(0.0, 1.0).log_prob(sample)
    error = log_ratio.std(0) / 200_000**0.5
    assert ((log_ratio.mean(0) - one.kl()[0]).abs() < 4 * error).all()


def test_sample_with_given_noise_is_exact_and_reparameterised():
    mean = torch.tensor([[[1.0]]], requires_grad=True)
    log_variance = torch.tensor([[[0.4]]], requires_grad=True)
    sample = Posterior(mean, log_variance).rsample(torch.tensor([[[2.0]]]))
    sample.sum().backward()
    std = torch.tensor(0.4).div(2).exp().item()
    torch.testing.assert_close(sample.item(), 1 + 2 * std)
    torch.testing.assert_close(mean.grad.item(), 1.0)
    torch.testing.assert_close(log_variance.grad.item(), 2 * std / 2)


def test_soft_clamp_stays_in_range_is_the_identity_inside_and_keeps_a_gradient():
    value = torch.tensor([-20.0, -4.0, 10.0], requires_grad=True)
    clamped = soft_clamp(value, -12.0, 4.0)
    clamped.sum().backward()
    assert (clamped > -12.0 - 1e-5).all() and (clamped < 4.0 + 1e-5).all()
    torch.testing.assert_close(clamped[1].item(), -4.0, rtol=0, atol=1e-3)
    assert (value.grad > 0).all()
