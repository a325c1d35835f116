"""Self-alignment against a loop over tokens; where it acts, and what it trains."""

import pytest
import torch
from branch_outputs import changed

from infotok_lit.objective.balance import BalanceConfig, Shares
from infotok_lit.objective.config import BranchWeights, ObjectiveConfig

CONFIG = ObjectiveConfig(terms=("self_alignment",), generation=BranchWeights(lambda_=0.5, gamma=4.0))


def test_every_token_is_compared_with_the_one_at_its_place(make_infotok, make_inputs):
    infotok, inputs = make_infotok(CONFIG), make_inputs(tokens=5)
    understood = torch.randn(3, 8, 16, requires_grad=True)
    result = infotok("generation", inputs, step=0, understood=understood)
    mapped = infotok.heads["generation"].self_alignment.map(inputs.tokens)
    distance = 0.0
    for image in range(3):
        for token, place in enumerate(inputs.token_index[image].tolist()):
            cosine = torch.cosine_similarity(mapped[image, token], understood[image, place], dim=0)
            distance += 1 - cosine.item()
    assert result.loss.item() == pytest.approx(0.5 * 4.0 * distance / 3 / 8, rel=1e-5)
    assert result.report["self_alignment_cosine"].item() == pytest.approx(1 - distance / 15, rel=1e-4, abs=1e-6)
    result.loss.backward()
    assert understood.grad is None and inputs.tokens.grad.any()


def test_tokens_without_common_places_are_compared_by_their_means(make_infotok, make_inputs):
    infotok = make_infotok(CONFIG, num_extra=7)
    queries = changed(make_inputs(num_extra=1), num_extra=7, grid=(0, 0))
    understood = torch.randn(3, 7, 16)
    result = infotok("generation", queries, step=0, understood=understood)
    mapped = infotok.heads["generation"].self_alignment.map(queries.tokens).mean(1)
    cosine = torch.cosine_similarity(mapped, understood.mean(1), dim=-1)
    torch.testing.assert_close(result.report["self_alignment_cosine"], cosine.mean().detach())


def test_it_acts_in_generation_alone_and_has_its_own_head_only(make_infotok):
    infotok = make_infotok(CONFIG)
    assert list(infotok.heads) == ["generation"]
    assert [infotok.needs_understood(branch) for branch in ("understanding", "generation")] == [False, True]
    assert {name.split(".")[2] for name, _ in infotok.named_parameters()} == {"self_alignment"}
    assert not make_infotok(ObjectiveConfig()).needs_understood("generation")


def test_it_is_balanced_like_the_others(make_infotok, make_inputs):
    balance = BalanceConfig(generation=Shares(self_alignment=0.25))
    infotok, inputs = make_infotok(ObjectiveConfig(terms=("self_alignment",), balance=balance)), make_inputs()
    understood = torch.randn(3, 8, 16)
    for step in range(2):
        path = infotok.path("generation", step)
        task = path(inputs.tokens).square().sum()
        objective = infotok("generation", inputs, step=step, path=path, understood=understood)
        (task + objective.loss).backward()
        infotok.finish_step()
    assert objective.report["rho_self_alignment"].item() == pytest.approx(0.25, rel=1e-4)
    assert "equivalent_gamma" in objective.report


def test_the_target_must_be_given(make_infotok, make_inputs):
    with pytest.raises(ValueError, match="give understood"):
        make_infotok(CONFIG)("generation", make_inputs(), step=0)
    with pytest.raises(ValueError, match="hsic does not measure self_alignment"):
        ObjectiveConfig(terms=("compactness", "self_alignment"), estimator="hsic")
