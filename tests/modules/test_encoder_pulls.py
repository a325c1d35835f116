"""What terms ask of the encoder, where its tokens have 16 bits."""

import pytest
import torch

from infotok_lit.modules.gradients import encoder_pulls
from infotok_lit.objective.config import ObjectiveConfig
from infotok_lit.objective.infotok import InfoTok
from infotok_lit.objective.term import BranchObjective


def test_small_gradients_at_tokens_of_float16_are_not_lost() -> None:
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"encoder": torch.nn.Linear(4, 8)})
    images = torch.randn(2, 3, 4)
    tokens = base["encoder"](images).half()
    seen = tokens.float()
    small = 1e-9 * seen.square().sum()
    task = tokens.float().sin().sum()
    objective = BranchObjective({"alignment": small}, tokens=seen)
    found = encoder_pulls(task, tokens, objective, base, InfoTok(ObjectiveConfig(terms=()), {}), ("encoder.",))

    exact = base["encoder"](images)
    weights = list(base.parameters())
    asked, wanted = (
        torch.cat([part.flatten() for part in torch.autograd.grad(value, weights, retain_graph=True)])
        for value in (1e-9 * exact.square().sum(), exact.sin().sum())
    )
    assert found["rho/alignment"].item() == pytest.approx((asked.norm() / wanted.norm()).item(), rel=0.01)
    cosine = torch.nn.functional.cosine_similarity(asked, wanted, dim=0).item()
    assert found["cosine/alignment"].item() == pytest.approx(cosine, abs=0.01)
