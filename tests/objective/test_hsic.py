"""HSIC against its definitions as loops and traces, against a permutation null, and as estimator of the three terms."""

import math
from dataclasses import replace
from itertools import permutations
from itertools import product as cartesian
from statistics import median

import pytest
import torch
from branch_outputs import changed, parts

from infotok_lit.objective.config import BranchWeights, ObjectiveConfig
from infotok_lit.objective.hsic import DependenceTerms, HSICConfig, gaussian_kernel, image_vector, normalised_hsic
from infotok_lit.objective.term import PAPER_TERMS

BRANCHES = ("understanding", "generation")
CONFIG = ObjectiveConfig(
    terms=PAPER_TERMS,
    estimator="hsic",
    understanding=BranchWeights(0.5, alpha=2.0, beta=3.0),
    generation=BranchWeights(0.5, alpha=2.0, beta=3.0),
)


def loop_kernel(rows) -> torch.Tensor:
    pairs = [[math.dist(a, b) for b in rows.tolist()] for a in rows.tolist()]
    above = sorted(pairs[i][j] for i in range(len(rows)) for j in range(i) if pairs[i][j] > 0)
    sigma = above[(len(above) - 1) // 2]  # torch's median, the lower of two middle values
    assert len(above) % 2 == 0 or sigma == median(above)
    return torch.tensor([[math.exp(-(d**2) / (2 * sigma**2)) for d in row] for row in pairs]).double()


def trace_hsic(k, l, unbiased: bool) -> float:  # noqa: E741
    """Gretton et al. 2005 (biased); Song et al. 2012, Eq. 5 (unbiased)."""
    n = len(k)
    if not unbiased:
        h = torch.eye(n, dtype=k.dtype) - 1 / n
        return (torch.trace(k @ h @ l @ h) / (n - 1) ** 2).item()
    k, l = k - torch.diag(k.diag()), l - torch.diag(l.diag())  # noqa: E741
    one = torch.ones(n, dtype=k.dtype)
    parts = (
        torch.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ l @ one
    )
    return (parts / (n * (n - 3))).item()


def by_definition(x, y, unbiased: bool) -> float:
    k, l = loop_kernel(x), loop_kernel(y)  # noqa: E741
    return trace_hsic(k, l, unbiased) / math.sqrt(trace_hsic(k, k, unbiased) * trace_hsic(l, l, unbiased))


def dependent(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Uncorrelated, so that only a kernel sees it: y is the square of x, and both have a little of their own."""
    x = torch.randn(n, 1)
    return torch.cat([x, 0.2 * torch.randn(n, 2)], 1), torch.cat([x.square(), 0.2 * torch.randn(n, 1)], 1)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("n", [4, 9])
def test_equals_the_definition(n, unbiased):
    torch.manual_seed(n)
    x, y = dependent(n)
    assert normalised_hsic(x, y, unbiased).item() == pytest.approx(by_definition(x, y, unbiased), rel=1e-4, abs=1e-5)


def loop_hsic(k, l, distinct: bool) -> float:  # noqa: E741
    """The estimators as what they are: means over pairs, triples and quadruples of samples, with or without repeats."""

    def mean(size: int, product) -> float:
        everyone = range(len(k))
        indices = permutations(everyone, size) if distinct else cartesian(everyone, repeat=size)
        values = [product(*index) for index in indices]
        return sum(values) / len(values)

    return (
        mean(2, lambda i, j: k[i][j] * l[i][j])
        - 2 * mean(3, lambda i, j, q: k[i][j] * l[i][q])
        + mean(4, lambda i, j, q, r: k[i][j] * l[q][r])
    )


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("n", [4, 7])
def test_equals_loops_over_the_samples(n, unbiased):
    torch.manual_seed(n)
    x, y = dependent(n)
    k, l = loop_kernel(x).tolist(), loop_kernel(y).tolist()  # noqa: E741
    both, of_x, of_y = (loop_hsic(*pair, distinct=unbiased) for pair in ((k, l), (k, k), (l, l)))
    assert normalised_hsic(x, y, unbiased).item() == pytest.approx(both / math.sqrt(of_x * of_y), rel=1e-4, abs=1e-5)


def test_the_sum_over_all_pairings_vanishes_for_the_unbiased_form_only():
    """The exact permutation null of Song et al.: on average over all pairings nothing is measured."""
    torch.manual_seed(0)
    x, y = dependent(5)
    pairings = [list(p) for p in permutations(range(5))]
    unbiased, biased = (torch.stack([normalised_hsic(x, y[p], u) for p in pairings]).mean() for u in (True, False))
    assert abs(unbiased) < 1e-5 and biased > 0.2


def test_dependence_stands_out_of_the_permutation_null_and_independence_does_not():
    torch.manual_seed(0)
    x, y = dependent(64)
    independent = torch.randn(64, 2)

    def share_above(target: torch.Tensor) -> float:
        null = torch.stack([normalised_hsic(x, target[torch.randperm(64)], True) for _ in range(200)])
        return (null >= normalised_hsic(x, target, True)).float().mean().item()

    assert share_above(y) == 0.0
    assert 0.02 < share_above(independent) < 0.98


@pytest.mark.parametrize("unbiased", [True, False])
def test_the_permutation_null_rejects_independence_as_often_as_it_says(unbiased):
    """At a level of 1 in 10: 120 pairs of independent samples, each among 39 pairings of its own."""
    torch.manual_seed(0)
    rejected = 0
    for _ in range(120):
        x, y = torch.randn(12, 2), torch.randn(12, 3)
        values = [normalised_hsic(x, y[order], unbiased) for order in (torch.randperm(12) for _ in range(39))]
        rejected += sum(value >= normalised_hsic(x, y, unbiased) for value in values) < 4
    assert abs(rejected - 12) < 4 * math.sqrt(120 * 0.1 * 0.9)


def test_the_unbiased_form_does_not_depend_on_the_batch_size_and_the_biased_one_does():
    torch.manual_seed(0)
    means = {
        unbiased: [
            torch.stack([normalised_hsic(torch.randn(n, 8), torch.randn(n, 8), unbiased) for _ in range(300)]).mean()
            for n in (6, 24)
        ]
        for unbiased in (True, False)
    }
    assert max(abs(mean) for mean in means[True]) < 0.04
    assert means[False][0] > means[False][1] + 0.2 > 0.4


@pytest.mark.parametrize("unbiased", [True, False])
def test_of_a_set_with_itself_up_to_rotation_shift_and_scale_is_one(unbiased):
    torch.manual_seed(0)
    x = torch.randn(12, 5)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5))
    assert normalised_hsic(x, 3 * x @ rotation + 7, unbiased).item() == pytest.approx(1.0, abs=1e-4)


def test_copies_do_not_make_the_kernel_degenerate():
    answers = torch.tensor([[0.0]] * 7 + [[1.0]] * 2)
    kernel = gaussian_kernel(answers)
    torch.testing.assert_close(kernel, torch.where(answers == answers.T, 0.0, math.exp(-0.5) - 1))


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("n", [0, 3, 8])
def test_nothing_to_compare_is_zero_with_finite_gradients(n, unbiased):
    x = torch.randn(n, 3, requires_grad=True)
    value = normalised_hsic(x, torch.ones(n, 2), unbiased)
    value.backward()
    assert value == 0 and torch.isfinite(x.grad).all()


def test_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    x, y = (part.double() for part in dependent(7))
    sigma = torch.pdist(x).median()
    x.requires_grad_()
    value = normalised_hsic(x, y, True)
    (gradient,) = torch.autograd.grad(value, x)
    # The median carries no gradient: moving a sample that is not part of the median pair does not move it either.
    step = torch.zeros_like(x)
    pairs = torch.combinations(torch.arange(7))
    still = next(i for i in range(7) if i not in pairs[(torch.pdist(x.detach()) - sigma).abs().argmin()].tolist())
    step[still, 1] = 1e-6
    change = normalised_hsic(x.detach() + step, y, True) - normalised_hsic(x.detach() - step, y, True)
    assert gradient[still, 1].item() == pytest.approx(change.item() / 2e-6, rel=1e-4)


def hsic_inputs(make_inputs, batch: int = 6):
    """A branch, and its images."""
    return make_inputs(batch=batch), torch.rand(batch, 3, 32, 48)


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_terms_are_dependences_of_the_mean_token(branch, make_inputs, make_infotok):
    inputs, pixels = hsic_inputs(make_inputs)
    result = make_infotok(CONFIG)(branch, inputs, step=0, pixel_values=pixels)
    tokens = inputs.tokens.detach().mean(1)
    table, text = inputs.text_embedding.weight, inputs.text
    words = [table[ids[mask]].mean(0) for ids, mask in zip(text.ids, text.mask, strict=True)]
    answers = [table[ids[mask]].mean(0) for ids, mask in zip(text.ids, text.target_mask, strict=True)]
    target = inputs.latents.flatten(1) if branch == "generation" else torch.stack(answers)
    expected = {
        "compactness": by_definition(tokens, image_vector(pixels), True),
        "sufficiency": by_definition(tokens, target, True),
        "alignment": by_definition(tokens, torch.stack(words), True),
    }
    for term, value in expected.items():
        assert result.report[f"hsic_{term}"].item() == pytest.approx(value, abs=1e-4)
    by_hand = expected["compactness"] + 3 * (1 - expected["sufficiency"]) + 2 * (1 - expected["alignment"])
    assert result.loss.item() == pytest.approx(0.5 * by_hand, abs=1e-3)
    assert result.token_rates is None


@pytest.mark.parametrize("branch", BRANCHES)
def test_images_without_text_are_left_out(branch, make_inputs, make_infotok):
    inputs, pixels = hsic_inputs(make_inputs)
    inputs.text.mask[2] = False
    names = ("tokens", "token_index", "text_ids", "text_mask", "target_mask", "text_key", "latents")
    rows = [0, 1, 3, 4, 5]
    kept = changed(inputs, **{name: parts(inputs)[name][rows] for name in names}), pixels[rows]
    with_gap, without = (
        make_infotok(CONFIG)(branch, i, step=0, pixel_values=p).report for i, p in ((inputs, pixels), kept)
    )
    torch.testing.assert_close(with_gap["hsic_alignment"], without["hsic_alignment"])


def test_there_are_no_heads_and_gradients_reach_the_tokens(make_inputs, make_infotok):
    infotok, (inputs, pixels) = make_infotok(CONFIG), hsic_inputs(make_inputs)
    assert list(infotok.parameters()) == [] and infotok.state_dict() == {}
    for term in infotok("generation", inputs, step=0, pixel_values=pixels).terms.values():
        (gradient,) = torch.autograd.grad(term, inputs.tokens, retain_graph=True)
        assert gradient.any()


def test_descent_lowers_compactness_and_raises_the_others(make_inputs, make_infotok):
    infotok = make_infotok(replace(CONFIG, hsic=HSICConfig(unbiased=False)))
    inputs, pixels = hsic_inputs(make_inputs, batch=12)
    before = infotok("understanding", inputs, step=0, pixel_values=pixels)
    for term, sign in (("compactness", -1), ("sufficiency", 1), ("alignment", 1)):
        (gradient,) = torch.autograd.grad(before.terms[term], inputs.tokens, retain_graph=True)
        moved = changed(inputs, tokens=inputs.tokens - 0.5 * gradient / gradient.norm())
        after = infotok("understanding", moved, step=0, pixel_values=pixels)
        assert sign * (after.report[f"hsic_{term}"] - before.report[f"hsic_{term}"]) > 1e-4


def test_too_small_a_batch_is_refused_in_training_and_not_reported_in_validation(make_inputs, make_infotok):
    infotok, (inputs, pixels) = make_infotok(CONFIG), hsic_inputs(make_inputs, batch=3)
    with pytest.raises(ValueError, match="needs 4 or more and got 3"):
        infotok("generation", inputs, step=0, pixel_values=pixels)
    report = infotok.eval()("generation", inputs, step=0, pixel_values=pixels).report
    assert not any(name.startswith("hsic") for name in report)


def test_a_missing_partner_is_named(make_inputs, make_infotok):
    inputs, pixels = hsic_inputs(make_inputs)
    with pytest.raises(ValueError, match="compares the tokens with the image; give pixel_values"):
        make_infotok(CONFIG)("understanding", inputs, step=0)
    with pytest.raises(ValueError, match="compares the tokens with the latents; give latents"):
        make_infotok(CONFIG)("generation", changed(inputs, latents=None), step=0, pixel_values=pixels)


def test_a_fourth_term_is_refused_instead_of_measured_as_another(make_inputs):
    inputs, pixels = hsic_inputs(make_inputs)
    terms = DependenceTerms("generation", ("compactness", "novelty"), unbiased=True)
    with pytest.raises(ValueError, match="does not know the term 'novelty'"):
        terms(inputs.tokens, inputs, pixels)


def test_the_image_vector_holds_mean_colours():
    pixels = torch.rand(2, 3, 32, 64)
    vector = image_vector(pixels).view(2, 3, 16, 16)
    torch.testing.assert_close(vector[1, 2, 3, 5], pixels[1, 2, 6:8, 20:24].mean())
