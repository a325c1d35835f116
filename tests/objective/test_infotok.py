"""The objective as a whole: units, Eq. 10 by hand, per-branch switches, what is reported."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from branch_outputs import changed, parts

from infotok_lit.objective.balance import BalanceConfig, Shares
from infotok_lit.objective.config import BranchWeights, ObjectiveConfig
from infotok_lit.objective.infotok import InfoTok
from infotok_lit.objective.report import collapse_message, gradient_norms
from infotok_lit.objective.term import PAPER_TERMS, Widths

BRANCHES = ("understanding", "generation")
CONFIG = ObjectiveConfig(
    terms=PAPER_TERMS,
    understanding=BranchWeights(0.3, alpha=2.0, beta=3.0),
    generation=BranchWeights(0.3, alpha=5.0, beta=7.0),
)
WEIGHTS = {"understanding": (2.0, 3.0), "generation": (5.0, 7.0)}
NUM_PLACES = 2 + 2 * 3


@pytest.mark.parametrize("branch", BRANCHES)
def test_loss_is_equation_10_per_token_of_the_full_canvas(branch, make_inputs, make_infotok):
    result = make_infotok(CONFIG)(branch, make_inputs(tokens=5), step=0)
    alpha, beta = WEIGHTS[branch]
    rate = result.report["rate_bits_per_image"] * math.log(2)
    by_hand = rate + beta * result.report["sufficiency_nats_per_image"] + alpha * result.report["alignment_nats"]
    torch.testing.assert_close(result.loss, 0.3 * by_hand / NUM_PLACES)
    torch.testing.assert_close(sum(result.terms.values()), result.loss)


@pytest.mark.parametrize("branch", BRANCHES)
def test_reduction_mean_takes_each_terms_own_mean(branch, make_inputs, make_infotok):
    result = make_infotok(replace(CONFIG, reduction="mean"))(branch, make_inputs(), step=0)
    alpha, beta = WEIGHTS[branch]
    rate = result.report["rate_bits_per_dim"] * math.log(2)
    by_hand = rate + beta * result.report["sufficiency_nats_per_element"] + alpha * result.report["alignment_nats"]
    torch.testing.assert_close(result.loss, 0.3 * by_hand)


def test_warmup_scales_every_term(make_inputs, make_infotok):
    infotok = make_infotok(replace(CONFIG, warmup_steps=4))
    inputs, noise = make_inputs(), torch.randn(3, 5, 64)
    full, quarter = (infotok("understanding", inputs, step=step, noise=noise) for step in (4, 1))
    for name, term in full.terms.items():
        torch.testing.assert_close(quarter.terms[name], term / 4)
        torch.testing.assert_close(full.report[f"weighted_{name}"], term)


def test_every_reported_number_is_documented_and_has_no_graph(make_inputs, make_infotok):
    documented = (Path(__file__).parents[2] / "docs" / "objective.md").read_text()
    inputs, pixels = (
        changed(make_inputs(batch=4), noise_level=torch.tensor([0.1, 0.3, 0.6, 0.9])),
        torch.rand(4, 3, 8, 8),
    )
    shares = Shares(0.1, 0.1, 0.1)
    limited = BranchWeights(rate_budget_bits=3.0)
    for changes in (
        {"understanding": limited, "generation": limited},
        {"balance": BalanceConfig(shares, shares)},
        {"estimator": "hsic"},
    ):
        infotok = make_infotok(replace(CONFIG, **changes))
        reports = [infotok(branch, inputs, step=0, pixel_values=pixels).report for branch in BRANCHES]
        assert set(reports[0]) == set(reports[1])
        for name, value in reports[0].items():
            assert not value.requires_grad and value.ndim == 0
            assert f"`{name.split('/')[0]}`" in documented, name


def test_twice_the_tokens_carry_twice_the_bits_per_image_at_the_same_rate(make_inputs, make_infotok):
    infotok = make_infotok(ObjectiveConfig(terms=("compactness",)))
    inputs = make_inputs(tokens=4)
    doubled = replace(
        inputs, tokens=torch.cat([inputs.tokens] * 2, 1), token_index=torch.cat([inputs.token_index] * 2, 1)
    )
    once, twice = (infotok("understanding", i, step=0).report for i in (inputs, doubled))
    torch.testing.assert_close(twice["rate_bits_per_image"], 2 * once["rate_bits_per_image"])
    for name in ("rate_bits_per_token", "rate_bits_per_dim", "active_units"):
        torch.testing.assert_close(twice[name], once[name])


def test_twice_the_batch_changes_no_number(make_inputs, make_infotok):
    infotok = make_infotok(ObjectiveConfig(terms=("compactness", "sufficiency"), branches=("generation",)))
    inputs, noise = make_inputs(), torch.randn(3, 5, 64)
    names = ("tokens", "token_index", "text_ids", "text_mask", "target_mask", "text_key", "latents")
    doubled = changed(inputs, **{name: torch.cat([parts(inputs)[name]] * 2) for name in names})
    once = infotok("generation", inputs, step=0, noise=noise)
    twice = infotok("generation", doubled, step=0, noise=torch.cat([noise] * 2))
    torch.testing.assert_close(twice.loss, once.loss)
    torch.testing.assert_close(twice.report, once.report)


def test_token_rates_are_bits_and_sum_to_the_rate_of_the_image(make_inputs, make_infotok):
    result = make_infotok(CONFIG)("generation", make_inputs(), step=0)
    assert result.token_rates.shape == (3, 5) and not result.token_rates.requires_grad
    torch.testing.assert_close(result.token_rates.sum(1).mean(), result.report["rate_bits_per_image"])


def test_active_units_are_counted_over_the_batch(make_inputs, make_infotok):
    config = ObjectiveConfig(terms=("compactness",), projection=replace(CONFIG.projection, kind="linear"))
    infotok = make_infotok(config)
    projection = infotok.heads["understanding"].projection
    torch.nn.init.zeros_(projection.mean.weight)
    torch.nn.init.zeros_(projection.mean.bias)
    torch.nn.init.constant_(projection.log_variance.bias, 0.0)
    with torch.no_grad():
        projection.mean.bias[:3] = 0.15  # KL 0.15 ** 2 / 2 = 0.011 nats
        projection.mean.bias[3:8] = 0.13  # 0.0085 nats
    report = infotok("understanding", make_inputs(), step=0).report
    assert report["active_units"] == 3
    torch.testing.assert_close(report["active_units_fraction"].item(), 3 / 64)
    torch.testing.assert_close(
        report["rate_bits_per_token"].item(), (3 * 0.15**2 + 5 * 0.13**2) / 2 / math.log(2), rtol=1e-3, atol=1e-4
    )


def test_gradient_norms_are_those_of_the_terms_alone(make_inputs, make_infotok):
    result_inputs = make_inputs()
    result = make_infotok(CONFIG)("generation", result_inputs, step=0)
    norms = gradient_norms({**result.terms, "all": result.loss}, result_inputs.tokens)
    for name, term in {**result.terms, "all": result.loss}.items():
        result_inputs.tokens.grad = None
        term.backward(retain_graph=True)
        torch.testing.assert_close(norms[name], result_inputs.tokens.grad.norm())
        assert norms[name] > 0


def test_gradient_norm_into_a_frozen_encoder_is_zero(make_inputs, make_infotok):
    inputs = make_inputs()
    inputs.tokens.requires_grad_(False)
    result = make_infotok(CONFIG)("generation", inputs, step=0)
    assert [float(norm) for norm in gradient_norms(result.terms, inputs.tokens).values()] == [0.0, 0.0, 0.0]


def test_under_autocast_the_terms_are_those_of_the_rounded_tokens_in_float32(make_inputs, make_infotok):
    infotok, inputs, noise = make_infotok(CONFIG), make_inputs(), torch.randn(3, 5, 64)
    rounded = inputs.tokens.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        half = infotok("generation", changed(inputs, tokens=rounded), step=0, noise=noise)
    reference = infotok("generation", changed(inputs, tokens=rounded.float()), step=0, noise=noise)
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.report, reference.report, rtol=1e-6, atol=1e-6)
    exact = infotok("generation", inputs, step=0, noise=noise)
    torch.testing.assert_close(
        half.report["rate_bits_per_token"], exact.report["rate_bits_per_token"], rtol=2**-8, atol=0
    )


def test_a_branch_that_is_off_costs_and_reports_nothing(make_inputs, make_infotok):
    result = make_infotok(replace(CONFIG, branches=("generation",)))("understanding", make_inputs(), step=0)
    assert result.terms == {} and result.report == {} and result.token_rates is None


def test_inputs_of_another_layout_are_refused(make_inputs, make_infotok):
    with pytest.raises(ValueError, match="the tokens have 1 extra places; the heads were built for 2"):
        make_infotok(CONFIG)("understanding", make_inputs(num_extra=1), step=0)
    with pytest.raises(ValueError, match="N >= 1"):
        make_infotok(CONFIG)("understanding", make_inputs(tokens=0), step=0)
    short = changed(make_inputs(), target_mask=torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"target_mask must have shape \(3, 5\), not \(3, 4\)"):
        make_infotok(CONFIG)("understanding", short, step=0)


def test_branches_of_different_width_and_layout(make_inputs):
    """As in OpenUni: a grid of patches to understand, meta queries without a place to generate."""
    widths = {"understanding": Widths(10, 3, 12, num_extra=0), "generation": Widths(16, 5, 12, num_extra=7)}
    infotok = InfoTok(CONFIG, widths)
    grid = changed(make_inputs(num_extra=0), tokens=torch.randn(3, 5, 10))
    queries = changed(make_inputs(num_extra=1), num_extra=7, grid=(0, 0))
    shown = queries.token_index.clone()
    for branch, inputs in (("understanding", grid), ("generation", queries)):
        result = infotok(branch, inputs, step=0)
        result.loss.backward()
        rate = result.report["rate_bits_per_image"] * math.log(2)
        torch.testing.assert_close(result.terms["compactness"], 0.3 * rate / (6 if branch == "understanding" else 7))
    assert all(p.grad is not None for p in infotok.parameters())
    used = infotok.heads["generation"].decoder.memory.extra_places.grad.abs().sum(1) > 0
    assert used.nonzero().flatten().tolist() == shown.unique().tolist()
    with pytest.raises(ValueError, match="the tokens have 7 extra places; the heads were built for 0"):
        infotok("understanding", queries, step=0)


def test_a_canvas_without_any_place_is_refused(make_inputs, make_infotok):
    with pytest.raises(ValueError, match="no place at all"):
        make_infotok(CONFIG, num_extra=0)("generation", changed(make_inputs(), num_extra=0, grid=(0, 0)), step=0)


def test_canvas_without_extra_tokens(make_inputs, make_infotok):
    infotok = make_infotok(CONFIG, num_extra=0)
    for branch in BRANCHES:
        infotok(branch, make_inputs(num_extra=0), step=0).loss.backward()
    assert all(p.grad is not None and p.numel() for p in infotok.parameters())


def test_collapse_is_reported_in_words():
    def report(rate: float, active: float) -> dict[str, torch.Tensor]:
        return {"rate_bits_per_token": torch.tensor(rate), "active_units": torch.tensor(active)}

    assert collapse_message("generation", report(0.06, 1.0)) is None
    assert collapse_message("generation", {}) is None
    for collapsed in (report(0.04, 1.0), report(0.06, 0.0)):
        message = collapse_message("generation", collapsed)
        assert (
            "generation: the posterior has collapsed" in message
            and "Raise generation.beta" in message
            and "free_bits" in message
        )
