"""Balance: the pulls against plain autograd, what does not change the weights, and what a checkpoint keeps."""

from dataclasses import replace

import pytest
import torch

from infotok_lit.objective.balance import Balance, BalanceConfig, Shares
from infotok_lit.objective.config import BranchWeights, ObjectiveConfig
from infotok_lit.objective.infotok import InfoTok
from infotok_lit.objective.term import PAPER_TERMS

SHARES = Shares(compactness=0.03, sufficiency=0.1, alignment=0.3)
RHO = {"compactness": 0.03, "sufficiency": 0.1, "alignment": 0.3}
CONFIG = ObjectiveConfig(terms=PAPER_TERMS, balance=BalanceConfig(SHARES, SHARES))
NOISE = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(5))


def task_of(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.sin().square().sum()


def steps(infotok: InfoTok, inputs, count: int, first: int = 0, scale: float = 1.0, branch: str = "generation"):
    """Steps on one batch that train nothing; the last objective."""
    for step in range(first, first + count):
        path = infotok.path(branch, step)
        seen = inputs.tokens if path is None else path(inputs.tokens)
        objective = infotok(branch, inputs, step=step, path=path, noise=NOISE)
        (scale * (task_of(seen) + objective.loss)).backward()
        infotok.finish_step()
    return objective


def pull(scalar: torch.Tensor, tokens: torch.Tensor) -> float:
    return torch.autograd.grad(scalar, tokens, retain_graph=True)[0].norm().item()


def shares_of(infotok: InfoTok, inputs, step: int) -> dict[str, float]:
    """What each weighted term pulls as a share of the task, by plain autograd."""
    objective = infotok("generation", inputs, step=step, noise=NOISE)
    task = pull(task_of(inputs.tokens), inputs.tokens)
    return {term: pull(value, inputs.tokens) / task for term, value in objective.terms.items()}


def test_after_one_measurement_every_term_pulls_its_share(make_infotok, make_inputs):
    infotok, inputs = make_infotok(CONFIG), make_inputs()
    first = steps(infotok, inputs, 1)
    assert all(value == 0 for value in first.terms.values()), "nothing is known yet"
    assert shares_of(infotok, inputs, step=1) == pytest.approx(RHO, rel=1e-4)


def test_the_report_says_what_the_weights_amount_to(make_infotok, make_inputs):
    infotok, inputs = make_infotok(CONFIG), make_inputs()
    report = steps(infotok, inputs, 2).report
    for term, share in RHO.items():
        assert report[f"rho_{term}"].item() == pytest.approx(share, rel=1e-4)
    assert report["pull_task"].item() == pytest.approx(pull(task_of(inputs.tokens), inputs.tokens), rel=1e-4)
    found = {name: report[f"equivalent_{name}"].item() for name in ("lambda", "alpha", "beta")}
    by_hand = BranchWeights(found["lambda"], found["alpha"], found["beta"])
    constants = make_infotok(ObjectiveConfig(terms=PAPER_TERMS, generation=by_hand))
    assert shares_of(constants, inputs, 1) == pytest.approx(RHO, rel=1e-3)
    assert infotok.equivalents()["generation"] == pytest.approx(found, rel=1e-4)


def test_a_thousand_times_a_term_leaves_the_settled_step_unchanged(make_infotok, make_inputs, monkeypatch):
    gradients = []
    for factor in (1.0, 1000.0):
        infotok, inputs = make_infotok(CONFIG), make_inputs()
        decoder = infotok.heads["generation"].decoder
        original = decoder.forward
        monkeypatch.setattr(
            decoder,
            "forward",
            lambda *given, original=original, factor=factor: replace(
                (nats := original(*given)), per_image=factor * nats.per_image
            ),
        )
        steps(infotok, inputs, 3)
        infotok.zero_grad()
        inputs.tokens.grad = None
        steps(infotok, inputs, 1, first=3)
        gradients.append([inputs.tokens.grad, *(p.grad for p in infotok.heads["generation"].parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scale", [1 / 8, 65536.0])
def test_how_the_backward_pass_is_scaled_does_not_matter(make_infotok, make_inputs, scale):
    """By accumulation, or by a GradScaler."""
    infotok, inputs = make_infotok(CONFIG), make_inputs()
    steps(infotok, inputs, 2, scale=scale)
    assert shares_of(infotok, inputs, step=2) == pytest.approx(RHO, rel=1e-4)


@pytest.mark.parametrize("bottleneck", ["projected", "inline"])
def test_small_gradients_at_tokens_of_16_bits_are_measured_as_in_float32(bottleneck, make_infotok, make_inputs):
    """As with the many tokens of a full size, whose gradients float16 rounds to zero without a GradScaler's factor."""
    found, shares = [], Shares(compactness=0.03, alignment=0.3)
    config = replace(CONFIG, bottleneck=bottleneck, terms=("compactness", "alignment"))
    config = replace(config, balance=BalanceConfig(shares, shares, highest=1e12))
    for dtype in (torch.float32, torch.float16):
        infotok, inputs = make_infotok(config), make_inputs()
        inputs.tokens = inputs.tokens.detach().half().to(dtype).requires_grad_()
        inputs.layout = replace(inputs.layout, grid=(2**12, 2**12))
        path = infotok.path("generation", 0, noise=torch.zeros(3, 5, 16))
        task = 2.0**10 * task_of(path(inputs.tokens).float())
        (task + 2.0**10 * infotok("generation", inputs, step=0, path=path).loss).backward()
        infotok.finish_step()
        found.append({term: value.item() for term, value in infotok.balances["generation"].factors().items()})
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_accumulated_passes_count_together_and_old_steps_fade(make_infotok, make_inputs):
    infotok = make_infotok(replace(CONFIG, balance=replace(CONFIG.balance, decay=0.75)))
    balance, squares = infotok.balances["generation"], []
    for step, seeds in enumerate([(0, 1), (2,)]):
        squares.append(0.0)
        for seed in seeds:
            inputs = make_inputs(seed=seed)
            path = infotok.path("generation", step)
            seen = path(inputs.tokens)
            objective = infotok("generation", inputs, step=step, path=path, noise=NOISE)
            ((task_of(seen) + objective.loss) / len(seeds)).backward()
            squares[-1] += pull(task_of(inputs.tokens) / len(seeds), inputs.tokens) ** 2
        infotok.finish_step()
    expected = (0.75 * squares[0] + squares[1]) / 1.75
    assert balance.pulls()[0].item() ** 2 == pytest.approx(expected, rel=1e-4)


def test_backward_passes_that_are_not_the_steps_own_are_not_measured() -> None:
    """The task's gradient is 3 at each of 6 entries, and the term's 2."""
    balance, tokens = Balance({"alignment": 0.3}, BalanceConfig()), torch.ones(1, 2, 3, requires_grad=True)
    task, term = 3 * balance.watch_task(tokens).sum(), 2 * tokens.sum()
    loss = task + term + balance.watch_terms({"alignment": term}, tokens)
    with balance.unheard():
        loss.backward(retain_graph=True)
    loss.backward()
    assert balance.squares_of_step().tolist() == [1, 6 * 3**2, 6 * 2**2]


def test_it_is_measured_now_and_then(make_infotok):
    balance = make_infotok(CONFIG).balances["generation"]
    assert all(balance.measures(step) for step in range(20))
    assert [step for step in range(20, 33) if balance.measures(step)] == [20, 24, 28, 32]
    assert not balance.eval().measures(0)


def test_a_step_that_is_not_finite_teaches_nothing(make_infotok, make_inputs):
    infotok, inputs = make_infotok(CONFIG), make_inputs()
    steps(infotok, inputs, 2)
    before = {name: value.clone() for name, value in infotok.balances.state_dict().items()}
    steps(infotok, inputs, 1, first=2, scale=float("nan"))
    torch.testing.assert_close(infotok.balances.state_dict(), before, rtol=0, atol=0)


def test_a_resumed_run_goes_on_with_the_same_weights(make_infotok, make_inputs):
    first, second, inputs = make_infotok(CONFIG), make_infotok(CONFIG), make_inputs()
    steps(first, inputs, 3)
    second.load_state_dict(first.state_dict())
    ours, theirs = (steps(infotok, inputs, 2, first=3).terms for infotok in (first, second))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_warm_up_scales_the_share(make_infotok, make_inputs):
    infotok, inputs = make_infotok(replace(CONFIG, warmup_steps=8, compactness_warmup_steps=16)), make_inputs()
    steps(infotok, inputs, 1)
    expected = {"compactness": 0.03 * 2 / 16, "sufficiency": 0.1 * 2 / 8, "alignment": 0.3 * 2 / 8}
    assert shares_of(infotok, inputs, step=2) == pytest.approx(expected, rel=1e-4)


def test_terms_without_a_share_keep_their_constants(make_infotok, make_inputs):
    only = BalanceConfig(generation=Shares(alignment=0.3))
    constant = ObjectiveConfig(terms=PAPER_TERMS, generation=BranchWeights(0.2, 3.0, 4.0))
    balanced, plain = make_infotok(replace(constant, balance=only)), make_infotok(constant)
    inputs = make_inputs()
    steps(balanced, inputs, 2)
    assert shares_of(balanced, inputs, 2)["alignment"] == pytest.approx(0.3, rel=1e-4)
    ours, theirs = (infotok("generation", inputs, step=2, noise=NOISE).terms for infotok in (balanced, plain))
    for term in ("compactness", "sufficiency"):
        torch.testing.assert_close(ours[term], theirs[term], rtol=0, atol=0)


def test_a_share_of_0_switches_a_term_off(make_infotok):
    config = replace(CONFIG, balance=BalanceConfig(generation=replace(SHARES, sufficiency=0.0)))
    assert config.active_terms("generation") == ("compactness", "alignment")
    assert make_infotok(config).heads["generation"].decoder is None


def test_weights_stay_in_their_bounds(make_infotok, make_inputs):
    bounds = replace(CONFIG.balance, lowest=0.5, highest=0.6)
    infotok, inputs = make_infotok(replace(CONFIG, balance=bounds)), make_inputs()
    steps(infotok, inputs, 1)
    assert all(0.5 <= value <= 0.6 for value in infotok.balances["generation"].factors().values())


def test_a_task_that_pulls_on_nothing_is_said(make_infotok, make_inputs):
    infotok, inputs = make_infotok(CONFIG), make_inputs()
    balance = infotok.balances["generation"]
    assert balance.silent_task_message("generation") is None
    for step in range(2):
        path = infotok.path("generation", step)
        objective = infotok("generation", inputs, step=step, path=path, noise=NOISE)
        objective.loss.backward()
        infotok.finish_step()
    assert all(objective.report[f"rho_{term}"].isnan() for term in RHO), "a share of nothing is no number"
    assert "generation: the task sends no gradient into the shared tokens" in balance.silent_task_message("generation")


def test_a_placebo_measures_the_pulls_and_sends_none(make_infotok, make_inputs):
    infotok, inputs = make_infotok(replace(CONFIG, placebo=True)), make_inputs()
    balanced, alike = make_infotok(CONFIG), make_inputs()
    steps(infotok, inputs, 3)
    steps(balanced, alike, 3)
    torch.testing.assert_close(infotok.balances.state_dict(), balanced.balances.state_dict())
    (once,) = torch.autograd.grad(task_of(inputs.tokens), inputs.tokens)
    torch.testing.assert_close(inputs.tokens.grad, once + once + once, rtol=0, atol=0)
    assert all(p.grad is not None for p in infotok.heads["generation"].parameters())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Shares(alignment=-0.1), "the share of alignment is -0.1"),
        (lambda: BalanceConfig(decay=1.0), "balance.decay is 1.0"),
        (lambda: BalanceConfig(every=0), "balance.every is 0"),
        (lambda: BalanceConfig(lowest=2.0, highest=1.0), "set 0 < lowest < highest"),
        (
            lambda: replace(CONFIG, generation=BranchWeights(rate_budget_bits=1.0)),
            "dual ascent finds the factor of compactness, so balance cannot.*balance.generation.compactness to null",
        ),
        (
            lambda: replace(CONFIG, understanding=BranchWeights(sufficiency_target_nats=1.0)),
            "dual ascent finds the factor of sufficiency",
        ),
        (lambda: replace(CONFIG, placebo=True, bottleneck="inline"), "a placebo needs bottleneck projected"),
    ],
)
def test_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
