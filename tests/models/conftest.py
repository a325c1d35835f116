"""What several files of tests of models show them."""

import pytest
import torch
from loud import PROMPTS
from torch import Tensor


@pytest.fixture(scope="session")
def images() -> Tensor:
    """One for each of PROMPTS."""
    return torch.rand(len(PROMPTS), 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
