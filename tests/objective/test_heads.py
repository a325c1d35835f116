"""Heads exist exactly for the terms that are on, and every one of their parameters is trained."""

from itertools import product

import pytest
import torch

from infotok_lit.objective.compactness import ProjectionConfig
from infotok_lit.objective.config import BranchWeights, ObjectiveConfig
from infotok_lit.objective.term import PAPER_TERMS

C, S, A = "compactness", "sufficiency", "alignment"
FEATURES, MEAN, VARIANCE = "projection.features", "projection.mean", "projection.log_variance"
MAPPED = {
    (): set(),
    (C,): {FEATURES, MEAN, VARIANCE},
    (S,): {FEATURES, MEAN, VARIANCE, "decoder"},
    (A,): {FEATURES, MEAN, "alignment"},
    (C, S): {FEATURES, MEAN, VARIANCE, "decoder"},
    (C, A): {FEATURES, MEAN, VARIANCE, "alignment"},
    (S, A): {FEATURES, MEAN, VARIANCE, "decoder", "alignment"},
    (C, S, A): {FEATURES, MEAN, VARIANCE, "decoder", "alignment"},
}
IDENTITY = {
    (): set(),
    (C,): {FEATURES, VARIANCE},
    (S,): {FEATURES, VARIANCE, "decoder"},
    (A,): {"alignment"},
    (C, S): {FEATURES, VARIANCE, "decoder"},
    (C, A): {FEATURES, VARIANCE, "alignment"},
    (S, A): {FEATURES, VARIANCE, "decoder", "alignment"},
    (C, S, A): {FEATURES, VARIANCE, "decoder", "alignment"},
}
INLINE = {
    (): set(),
    (C,): {FEATURES, VARIANCE},
    (C, S): {FEATURES, VARIANCE},
    (C, A): {FEATURES, VARIANCE, "alignment"},
    (C, S, A): {FEATURES, VARIANCE, "alignment"},
}
CASES = [
    *(("projected", kind, terms, heads) for kind, (terms, heads) in product(("mlp", "linear"), MAPPED.items())),
    *(("projected", "identity", terms, heads) for terms, heads in IDENTITY.items()),
    *(("inline", kind, terms, heads) for kind, (terms, heads) in product(("mlp", "identity"), INLINE.items())),
]


def run(infotok, branch, inputs):
    path = infotok.path(branch, step=0)
    if path is not None:
        path(inputs.tokens)
    return infotok(branch, inputs, step=0, path=path)


def heads_of(infotok, branch) -> set[str]:
    names = [name.removeprefix(f"heads.{branch}.") for name, _ in infotok.named_parameters() if branch in name]
    return {".".join(name.split(".")[: 2 if name.startswith("projection") else 1]) for name in names}


@pytest.mark.parametrize(("bottleneck", "kind", "terms", "heads"), CASES)
def test_heads_are_those_of_the_terms_and_all_are_trained(bottleneck, kind, terms, heads, make_inputs, make_infotok):
    projection = ProjectionConfig(kind, hidden_width=8, latent_width=4)
    infotok = make_infotok(ObjectiveConfig(terms=terms, bottleneck=bottleneck, projection=projection))
    for branch in ("understanding", "generation"):
        assert heads_of(infotok, branch) == heads
        objective = run(infotok, branch, make_inputs())
        assert bool(objective.terms) == bool(terms)
        if terms:
            objective.loss.backward()
    untrained = [name for name, parameter in infotok.named_parameters() if parameter.grad is None]
    assert untrained == []


def test_no_terms_no_parameters_no_state(make_infotok):
    infotok = make_infotok(ObjectiveConfig(terms=()))
    assert list(infotok.parameters()) == [] and infotok.state_dict() == {}


def test_heads_follow_branches_and_weights(make_infotok):
    config = ObjectiveConfig(
        terms=PAPER_TERMS, branches=("understanding",), understanding=BranchWeights(alpha=0.0, beta=1.0)
    )
    infotok = make_infotok(config)
    assert heads_of(infotok, "understanding") == {FEATURES, MEAN, VARIANCE, "decoder"}
    assert heads_of(infotok, "generation") == set()


def test_a_training_step_moves_what_starts_at_zero(make_inputs, make_infotok):
    infotok = make_infotok(ObjectiveConfig(terms=PAPER_TERMS))
    optimizer = torch.optim.SGD(infotok.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        sum(run(infotok, branch, make_inputs()).loss for branch in ("understanding", "generation")).backward()
        optimizer.step()
    still = [name for name, parameter in infotok.named_parameters() if not parameter.grad.any()]
    assert still == []
