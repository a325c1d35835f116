"""Captioning: its value and gradient against the reader's own, where the gradient goes, and how it is balanced."""

import pytest
import torch

from infotok_lit.objective.balance import BalanceConfig, Shares
from infotok_lit.objective.config import BranchWeights, ObjectiveConfig

CONFIG = ObjectiveConfig(terms=("captioning",), generation=BranchWeights(lambda_=0.5, delta=4.0))


class Reader:
    """A model that reads: its weights may be trained by something else."""

    def __init__(self) -> None:
        self.weight = torch.randn(16, generator=torch.Generator().manual_seed(3), requires_grad=True)

    def __call__(self, tokens):
        return (tokens @ self.weight).square().sum(1), torch.tensor([3, 1, 4])


def test_value_and_gradient_are_the_readers_and_the_reader_gets_none(make_infotok, make_inputs):
    infotok, inputs, read = make_infotok(CONFIG), make_inputs(), Reader()
    result = infotok("generation", inputs, step=0, read_caption=read)
    nats, _ = read(inputs.tokens)
    # Nats per image over the 8 places of the canvas, lambda 0.5 and delta 4.
    expected = 0.5 * 4.0 * nats.mean() / 8
    torch.testing.assert_close(result.loss, expected)
    assert result.report["captioning_nats_per_token"].item() == pytest.approx(nats.sum().item() / 8, rel=1e-5)
    (gradient,) = torch.autograd.grad(expected, inputs.tokens)
    result.loss.backward()
    torch.testing.assert_close(inputs.tokens.grad, gradient)
    assert read.weight.grad is None


def test_a_placebo_measures_it_and_sends_nothing(make_infotok, make_inputs):
    infotok, inputs, read = make_infotok(ObjectiveConfig(terms=("captioning",), placebo=True)), make_inputs(), Reader()
    result = infotok("generation", inputs, step=0, read_caption=read)
    assert torch.autograd.grad(result.loss, result.tokens)[0].any()
    assert inputs.tokens.grad is None and read.weight.grad is None and result.tokens is not inputs.tokens


def test_without_gradients_the_value_is_the_same(make_infotok, make_inputs):
    infotok, inputs, read = make_infotok(CONFIG), make_inputs(), Reader()
    with torch.no_grad():
        result = infotok("generation", inputs, step=0, read_caption=read)
    torch.testing.assert_close(result.loss, infotok("generation", inputs, step=0, read_caption=read).loss.detach())


def test_it_acts_in_generation_alone_and_has_no_head(make_infotok):
    infotok = make_infotok(CONFIG)
    assert list(infotok.heads) == ["generation"] and not list(infotok.parameters())


@pytest.mark.parametrize("passes", [1, 3])
def test_it_is_balanced_like_the_others_also_over_accumulated_passes(make_infotok, make_inputs, passes):
    balance = BalanceConfig(generation=Shares(captioning=0.25))
    infotok, read = make_infotok(ObjectiveConfig(terms=("captioning",), balance=balance)), Reader()
    for step in range(2):
        pulls = {"task": 0.0, "term": 0.0}
        for number in range(passes):
            inputs = make_inputs(seed=number)
            path = infotok.path("generation", step)
            task = path(inputs.tokens).pow(4).mean()
            objective = infotok("generation", inputs, step=step, path=path, read_caption=read)
            pulls["task"] += torch.autograd.grad(inputs.tokens.pow(4).mean(), inputs.tokens)[0].square().sum()
            pulls["term"] += torch.autograd.grad(objective.loss, inputs.tokens, retain_graph=True)[0].square().sum()
            ((task + objective.loss) / passes).backward()
        infotok.finish_step()
    # With the weight of the first step, which saw the same tokens, the term pulls a quarter as hard as the task.
    assert (pulls["term"] / pulls["task"]).sqrt().item() == pytest.approx(0.25, rel=1e-4)
    assert "equivalent_delta" in objective.report


def test_it_is_refused_in_words_where_it_cannot_be_measured(make_infotok, make_inputs):
    with pytest.raises(ValueError, match="give read_caption"):
        make_infotok(CONFIG)("generation", make_inputs(), step=0)
    with pytest.raises(ValueError, match="hsic does not measure captioning"):
        ObjectiveConfig(terms=("compactness", "captioning"), estimator="hsic")
