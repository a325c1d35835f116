"""Compiled layers: the same losses and gradients, under the same names.

The backend traces as any other does, but generates no code, so that no C++ compiler is needed.
"""

import pytest
import torch
from tiny import FAMILIES, tiny_model
from torch._dynamo.utils import counters

from infotok_lit.batch import BRANCHES
from infotok_lit.models.common.language_model import compile_blocks
from infotok_lit.models.unified import UnifiedModel
from infotok_lit.scenes import Scenes


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def losses_and_gradients(model: UnifiedModel) -> dict[str, torch.Tensor]:
    scenes = Scenes(num_samples=4)
    samples = {branch: [scenes.sample(branch, number) for number in range(4)] for branch in BRANCHES}
    model.zero_grad()
    found = {}
    for branch in BRANCHES:
        torch.manual_seed(1)
        output = getattr(model, branch)(getattr(model.processor, branch)(samples[branch]))
        found[branch] = output.loss_sum / output.loss_count
        found[branch].backward()
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_give_the_same_numbers(family: str) -> None:
    model = tiny_model(family)
    names = list(model.state_dict())
    expected = losses_and_gradients(model)
    compile_blocks(model, backend="aot_eager")
    found = losses_and_gradients(model)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert list(model.state_dict()) == names
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
