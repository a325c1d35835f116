"""The task projections: what they hold, where they start."""

import pytest
import torch

from infotok_lit.objective.compactness import Projection, ProjectionConfig

KINDS = ("mlp", "linear", "identity")


def project(kind: str, with_variance: bool = True) -> Projection:
    torch.manual_seed(0)
    return Projection(ProjectionConfig(kind, hidden_width=11, latent_width=7, initial_std=0.05), 16, with_variance)


@pytest.mark.parametrize("kind", KINDS)
def test_widths(kind):
    posterior = project(kind)(torch.randn(2, 3, 16))
    width = 16 if kind == "identity" else 7
    assert posterior.mean.shape == posterior.log_variance.shape == (2, 3, width)


@pytest.mark.parametrize("kind", KINDS)
def test_posterior_starts_narrow_everywhere(kind):
    std = (project(kind)(10 * torch.randn(4, 5, 16)).log_variance / 2).exp()
    torch.testing.assert_close(std, torch.full_like(std, 0.05), rtol=0.01, atol=0)


def test_identity_leaves_the_tokens_as_means():
    tokens = torch.randn(2, 3, 16)
    assert torch.equal(project("identity")(tokens).mean, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_without_variance_there_is_nothing_that_computes_one(kind):
    projection = project(kind, with_variance=False)
    assert projection(torch.randn(2, 3, 16)).log_variance is None
    assert not any("log_variance" in name for name, _ in projection.named_parameters())
    assert (kind == "identity") == (not list(projection.parameters()))


def test_mlp_has_one_hidden_layer_and_linear_none():
    def weights(kind: str) -> list[tuple[int, ...]]:
        return sorted(tuple(p.shape) for p in project(kind).parameters() if p.ndim == 2)

    assert weights("mlp") == sorted([(11, 16), (7, 11), (7, 11)])
    assert weights("linear") == sorted([(7, 16), (7, 16)])
    assert weights("identity") == [(16, 16)]


def test_log_variance_stays_finite_for_extreme_tokens():
    projection = project("linear")
    torch.nn.init.normal_(projection.log_variance.weight, std=100.0)
    posterior = projection(torch.randn(2, 3, 16))
    assert torch.isfinite(posterior.kl()).all()
    assert posterior.log_variance.min() >= -12.001 and posterior.log_variance.max() <= 6.001
