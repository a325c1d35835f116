"""The inline bottleneck: noise on the tokens that the model consumes, rate on the same tokens."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from infotok_lit.objective.compactness import ProjectionConfig
from infotok_lit.objective.config import BranchWeights, ObjectiveConfig
from infotok_lit.objective.report import gradient_norms
from infotok_lit.objective.term import PAPER_TERMS

CONFIG = ObjectiveConfig(
    terms=PAPER_TERMS,
    bottleneck="inline",
    projection=ProjectionConfig(initial_std=0.2),
    understanding=BranchWeights(0.5),
    generation=BranchWeights(0.5),
)


def test_the_model_receives_noisy_tokens_of_the_stated_scale(make_infotok):
    tokens = torch.randn(64, 8, 16)
    noise = (make_infotok(CONFIG).path("generation", 0)(tokens) - tokens).flatten()
    assert abs(noise.mean()) < 4 * 0.2 / len(noise) ** 0.5
    assert abs(noise.std() - 0.2) < 4 * 0.2 / (2 * len(noise)) ** 0.5 + 0.001


def test_the_rate_is_that_of_the_tokens_themselves(make_infotok, make_inputs):
    infotok, inputs = make_infotok(CONFIG), make_inputs()
    path = infotok.path("understanding", 0, noise=torch.ones(3, 5, 16))
    std = path(inputs.tokens) - inputs.tokens
    report = infotok("understanding", inputs, step=0, path=path).report
    nats = kl_divergence(Normal(inputs.tokens, std), Normal(0.0, 1.0)).sum((1, 2)).mean()
    torch.testing.assert_close(report["rate_bits_per_image"], nats / math.log(2), rtol=1e-4, atol=0)


def test_sufficiency_is_the_models_own_loss_so_listing_it_changes_nothing(make_infotok, make_inputs):
    results = []
    for terms in (("compactness", "alignment"), PAPER_TERMS):
        infotok, inputs = make_infotok(ObjectiveConfig(terms=terms, bottleneck="inline")), make_inputs()
        path = infotok.path("generation", 0)
        path(inputs.tokens)
        results.append(infotok("generation", inputs, step=0, path=path))
    assert set(results[1].terms) == {"compactness", "alignment"}
    torch.testing.assert_close(results[0].loss, results[1].loss)


def test_gradients_of_the_models_loss_reach_tokens_and_variance(make_infotok, make_inputs):
    infotok, inputs = make_infotok(CONFIG), make_inputs()
    infotok.path("understanding", 0)(inputs.tokens).square().sum().backward()
    assert inputs.tokens.grad.any()
    assert infotok.heads["understanding"].projection.log_variance.bias.grad.all()


def test_rate_and_alignment_press_on_the_tokens_directly(make_infotok, make_inputs):
    infotok, inputs = make_infotok(CONFIG), make_inputs()
    path = infotok.path("understanding", 0)
    path(inputs.tokens)
    result = infotok("understanding", inputs, step=0, path=path)
    norms = gradient_norms(result.terms, inputs.tokens)
    torch.testing.assert_close(norms["compactness"], (0.5 * inputs.tokens / (3 * 8)).norm(), rtol=1e-4, atol=0)
    assert norms["alignment"] > 0


def test_half_precision_tokens_keep_their_type_and_the_rate_is_float32(make_infotok):
    path = make_infotok(CONFIG).path("generation", 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert path(torch.randn(2, 3, 16).bfloat16()).dtype == torch.bfloat16
    assert path.inline.posterior.kl().dtype == torch.float32


def test_there_is_a_path_only_where_it_acts(make_infotok):
    assert make_infotok(ObjectiveConfig(terms=PAPER_TERMS)).path("understanding", 0) is None
    one = make_infotok(ObjectiveConfig(terms=PAPER_TERMS, bottleneck="inline", branches=("generation",)))
    assert one.path("understanding", 0) is None and one.path("generation", 0) is not None


def test_the_objective_needs_the_path_that_the_model_was_given(make_infotok, make_inputs):
    infotok, inputs = make_infotok(CONFIG), make_inputs()
    for path in (None, infotok.path("generation", 0)):
        with pytest.raises(ValueError, match=r"pass path\('generation'\) to the model"):
            infotok("generation", inputs, step=0, path=path)


def test_tokens_of_another_pass_and_misplaced_noise_are_refused(make_infotok, make_inputs):
    infotok = make_infotok(CONFIG)
    path = infotok.path("generation", 0)
    path(make_inputs(tokens=4).tokens)
    with pytest.raises(ValueError, match="both must be of one forward pass"):
        infotok("generation", make_inputs(tokens=5), step=0, path=path)
    with pytest.raises(ValueError, match=r"give noise to path\(\) instead"):
        infotok("generation", make_inputs(), step=0, noise=torch.zeros(3, 5, 16))
