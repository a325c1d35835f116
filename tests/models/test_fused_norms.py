"""RMSNorm as one operation: against transformers' own, against the formula, and everywhere in the models."""

import warnings

import pytest
import torch
from tiny import FAMILIES
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from infotok_lit.models.common.language_model import RMSNorm
from infotok_lit.models.family import family

WIDTH, EPS = 48, 1e-6


def norms() -> tuple[Qwen2RMSNorm, RMSNorm]:
    theirs, ours = Qwen2RMSNorm(WIDTH, eps=EPS), RMSNorm(WIDTH, eps=EPS)
    for norm in (theirs, ours):
        norm.weight.data = 1 + torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)) / 4
    return theirs, ours


def rows() -> Tensor:
    return torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(1))


def test_numbers_and_gradients_are_those_of_transformers() -> None:
    found = []
    for norm in norms():
        x = rows().requires_grad_()
        y = norm(x)
        found.append((y, *torch.autograd.grad(y.pow(3).sum(), [x, norm.weight])))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("types", [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_the_wider_type_wins_and_torch_does_not_fall_back(types: tuple[str, str]) -> None:
    x_type, weight_type = (getattr(torch, name) for name in types)
    _, norm = norms()
    x, weight = rows().to(x_type), norm.weight.data.to(weight_type)
    norm.weight.data = weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = norm(x)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    assert y.dtype == torch.promote_types(x_type, weight_type)
    error = 2**-8 if y.dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(y.double(), exact, rtol=error, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_norm_of_transformers_is_left(name: str) -> None:
    model = family(name).fresh("scenes32")
    kinds = {type(module) for module in model.modules() if type(module).__name__.endswith("RMSNorm")}
    assert RMSNorm in kinds and not any(kind.__module__.startswith("transformers.") for kind in kinds)
