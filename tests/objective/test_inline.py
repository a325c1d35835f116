"""The inline bottleneck: noise on the tokens that the model consumes, rate on the same tokens."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from infotok_lit.objective.config import ObjectiveConfig, ProjectionConfig
from infotok_lit.objective.report import gradient_norms

CONFIG = ObjectiveConfig(bottleneck="inline", projection=ProjectionConfig(initial_std=0.2), weight=0.5)


def test_the_model_receives_noisy_tokens_of_the_stated_scale(make_infotok):
    tokens = torch.randn(64, 8, 16)
    noise = (make_infotok(CONFIG).transform("generation")(tokens) - tokens).flatten()
    assert abs(noise.mean()) < 4 * 0.2 / len(noise) ** 0.5
    assert abs(noise.std() - 0.2) < 4 * 0.2 / (2 * len(noise)) ** 0.5 + 0.001


def test_the_rate_is_that_of_the_tokens_themselves(make_infotok, make_inputs):
    infotok, inputs = make_infotok(CONFIG), make_inputs()
    transform = infotok.transform("understanding", noise=torch.ones(3, 5, 16))
    std = transform(inputs.tokens) - inputs.tokens
    report = infotok("understanding", inputs, step=0).report
    nats = kl_divergence(Normal(inputs.tokens, std), Normal(0.0, 1.0)).sum((1, 2)).mean()
    torch.testing.assert_close(report["rate_bits_per_image"], nats / math.log(2), rtol=1e-4, atol=0)


def test_sufficiency_is_the_models_own_loss_so_listing_it_changes_nothing(make_infotok, make_inputs):
    results = []
    for terms in (("compactness", "alignment"), ("compactness", "sufficiency", "alignment")):
        infotok, inputs = make_infotok(ObjectiveConfig(terms=terms, bottleneck="inline")), make_inputs()
        infotok.transform("generation")(inputs.tokens)
        results.append(infotok("generation", inputs, step=0))
    assert set(results[1].terms) == {"compactness", "alignment"}
    torch.testing.assert_close(results[0].loss, results[1].loss)


def test_gradients_of_the_models_loss_reach_tokens_and_variance(make_infotok, make_inputs):
    infotok, inputs = make_infotok(CONFIG), make_inputs()
    infotok.transform("understanding")(inputs.tokens).square().sum().backward()
    assert inputs.tokens.grad.any()
    assert infotok.heads["understanding"].projection.log_variance.bias.grad.all()


def test_rate_and_alignment_press_on_the_tokens_directly(make_infotok, make_inputs):
    infotok, inputs = make_infotok(CONFIG), make_inputs()
    infotok.transform("understanding")(inputs.tokens)
    result = infotok("understanding", inputs, step=0)
    norms = gradient_norms(result.terms, inputs.tokens)
    torch.testing.assert_close(norms["compactness"], (0.5 * inputs.tokens / (3 * 8)).norm(), rtol=1e-4, atol=0)
    assert norms["alignment"] > 0


def test_half_precision_tokens_keep_their_type_and_the_rate_is_float32(make_infotok):
    transform = make_infotok(CONFIG).transform("generation")
    with torch.autocast("cpu", torch.bfloat16):
        assert transform(torch.randn(2, 3, 16).bfloat16()).dtype == torch.bfloat16
    assert transform.posterior.kl().dtype == torch.float32


def test_there_is_a_transform_only_where_it_acts(make_infotok):
    assert make_infotok(ObjectiveConfig()).transform("understanding") is None
    one = make_infotok(ObjectiveConfig(bottleneck="inline", branches=("generation",)))
    assert one.transform("understanding") is None and one.transform("generation") is not None


def test_each_forward_needs_its_own_pass_of_the_model(make_infotok, make_inputs):
    infotok, inputs = make_infotok(CONFIG), make_inputs()
    with pytest.raises(ValueError, match=r"pass transform\('generation'\) to the model"):
        infotok("generation", inputs, step=0)
    infotok.transform("generation")(inputs.tokens)
    infotok("generation", inputs, step=0)
    with pytest.raises(ValueError, match=r"pass transform\('generation'\) to the model"):
        infotok("generation", inputs, step=0)


def test_tokens_of_another_pass_and_misplaced_noise_are_refused(make_infotok, make_inputs):
    infotok = make_infotok(CONFIG)
    infotok.transform("generation")(make_inputs(tokens=4).tokens)
    with pytest.raises(ValueError, match="both must be of one forward pass"):
        infotok("generation", make_inputs(tokens=5), step=0)
    with pytest.raises(ValueError, match=r"give noise to transform\(\) instead"):
        infotok("generation", make_inputs(), step=0, noise=torch.zeros(3, 5, 16))
