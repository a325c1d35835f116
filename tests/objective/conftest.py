"""A small random branch: what a model would hand to the objective."""

from collections.abc import Callable

import pytest
import torch
from branch_outputs import branch_output

from infotok_lit.batch import BranchOutput
from infotok_lit.objective.infotok import InfoTok
from infotok_lit.objective.term import Widths

TOKEN_WIDTH, LATENT_CHANNELS, TEXT_WIDTH, VOCABULARY = 16, 5, 12, 20


def random_inputs(batch: int = 3, tokens: int = 5, num_extra: int = 2, seed: int = 0) -> BranchOutput:
    """Text rows are one question token, then answers of 1, 2, 3, 1, 2, ... tokens, then padding; keys are distinct."""
    random = torch.Generator().manual_seed(seed)
    grid, latent_grid, length = (2, 3), (4, 3), 5
    places = [torch.randperm(num_extra + 6, generator=random)[:tokens] for _ in range(batch)]
    position = torch.arange(length).expand(batch, length)
    answer_length = 1 + torch.arange(batch)[:, None] % 3
    text_mask = position < 1 + answer_length
    return branch_output(
        tokens=torch.randn(batch, tokens, TOKEN_WIDTH, generator=random).requires_grad_(),
        token_index=torch.stack(places),
        num_extra=num_extra,
        grid=grid,
        text_ids=torch.randint(VOCABULARY, (batch, length), generator=random),
        text_mask=text_mask,
        target_mask=text_mask & (position > 0),
        text_key=torch.arange(batch),
        text_embedding=torch.randn(VOCABULARY, TEXT_WIDTH, generator=random),
        latents=torch.randn(batch, 12, LATENT_CHANNELS, generator=random),
        latent_grid=latent_grid,
    )


@pytest.fixture
def make_inputs() -> Callable[..., BranchOutput]:
    return random_inputs


@pytest.fixture
def make_infotok() -> Callable[..., InfoTok]:
    """Builds InfoTok for the inputs above from a config."""

    def build(config, num_extra: int = 2, seed: int = 0) -> InfoTok:
        torch.manual_seed(seed)
        widths = Widths(TOKEN_WIDTH, LATENT_CHANNELS, TEXT_WIDTH, num_extra)
        return InfoTok(config, {"understanding": widths, "generation": widths})

    return build
