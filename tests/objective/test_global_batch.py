"""Two ranks with half the batch each give the numbers and gradients of one process with the whole batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from branch_outputs import branch_output, changed, parts
from forked import run_forked

from infotok_lit.batch import BranchOutput
from infotok_lit.objective.alignment import NegativesConfig
from infotok_lit.objective.balance import BalanceConfig, Shares
from infotok_lit.objective.compactness import ProjectionConfig
from infotok_lit.objective.config import BranchWeights, ObjectiveConfig
from infotok_lit.objective.constraint import DualConfig
from infotok_lit.objective.distributed import gather_rows, global_mean
from infotok_lit.objective.hsic import HSICConfig
from infotok_lit.objective.infotok import InfoTok
from infotok_lit.objective.sufficiency import DecoderConfig
from infotok_lit.objective.term import PAPER_TERMS, Widths

BRANCHES = ("understanding", "generation")
VARIANTS = {
    "tokens": {},
    "mean": {"reduction": "mean"},
    "hsic": {"estimator": "hsic"},
    "hsic biased": {"estimator": "hsic", "hsic": HSICConfig(unbiased=False)},
    "negatives": {"negatives": NegativesConfig(queue_size=4, limit=6, kept="nearest")},
    "from data": {"negatives": NegativesConfig(from_data=2)},
    "balance": {"balance": BalanceConfig(Shares(0.1, 0.2, 0.3), Shares(0.1, 0.2, 0.3))},
    "budget": {
        "understanding": BranchWeights(rate_budget_bits=2.0),
        "generation": BranchWeights(beta=2.0, sufficiency_target_nats=1.2),
        "dual": DualConfig(step_size=0.5),
    },
}
TEXT = ("text_ids", "text_mask", "target_mask", "text_key", "negative_ids", "negative_mask")
ROWS = ("tokens", "token_index", *TEXT, "latents", "noise_level")


def build(variant: str) -> InfoTok:
    torch.manual_seed(0)
    small = {"projection": ProjectionConfig(hidden_width=8, latent_width=6), "decoder": DecoderConfig(16, 1, 2)}
    return InfoTok(
        ObjectiveConfig(terms=PAPER_TERMS, **small, **VARIANTS[variant]),
        dict.fromkeys(BRANCHES, Widths(16, 5, 12, num_extra=2)),
    )


def rows(inputs: BranchOutput, chosen: slice) -> BranchOutput:
    own = {name: parts(inputs)[name][chosen].detach() for name in ROWS}
    own["tokens"].requires_grad_()
    return changed(inputs, **own)


def gradients(inputs: BranchOutput, noise: torch.Tensor, pixels: torch.Tensor) -> dict:
    """Reports, and gradients of parameters and tokens, of the second of two steps, for every variant and branch."""
    result = {}
    for variant in VARIANTS:
        infotok = build(variant)
        for branch in BRANCHES:
            own = rows(inputs, slice(None))
            # What is kept from step to step then matters: the queue, the multiplier. The texts change, the queue's not.
            other = changed(own, text_key=own.text.key + 10, text_ids=(own.text.ids + 1) % 20)
            path = infotok.path(branch, 0)
            objective = infotok(branch, other, step=0, path=path, noise=noise, pixel_values=pixels)
            if path is not None:
                (path(other.tokens).square().sum((1, 2)).mean() + objective.loss).backward()
                infotok.finish_step()
            infotok.zero_grad()
            own.tokens.grad = None
            objective = infotok(branch, own, step=1, noise=noise, pixel_values=pixels)
            objective.loss.backward()
            grads = {name: p.grad.clone() for name, p in infotok.named_parameters() if p.grad is not None}
            result[variant, branch] = (objective.report, grads, own.tokens.grad)
    return result


def one_rank(rank: int, folder: Path, flat: dict, noise: torch.Tensor, pixels: torch.Tensor) -> None:
    dist.init_process_group("gloo")
    half = slice(3 * rank, 3 * rank + 3)
    result = gradients(rows(branch_output(**flat), half), noise[half], pixels[half])
    for _, grads, _ in result.values():
        for gradient in grads.values():
            dist.all_reduce(gradient)
            gradient /= 2
    share = global_mean(torch.tensor([1.0, 5.0])[rank], (rank + 1) * 2)
    try:
        gather_rows(torch.zeros(rank + 1, 2))
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    torch.save((result, share, refusal), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def whole() -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Six images; answers of unequal number per rank, and one text that both ranks hold."""
    random = torch.Generator().manual_seed(3)
    text_mask = torch.ones(6, 4, dtype=torch.bool)
    text_mask[4:, 2:] = False
    target_mask = text_mask.clone()
    target_mask[:, 0] = False
    target_mask[5] = False
    ids = torch.randint(20, (6, 4), generator=random)
    ids[3] = ids[1]
    inputs = dict(
        tokens=torch.randn(6, 4, 16, generator=random),
        token_index=torch.arange(4).repeat(6, 1),
        num_extra=2,
        grid=(2, 3),
        text_ids=ids,
        text_mask=text_mask,
        target_mask=target_mask,
        text_key=torch.tensor([0, 1, 2, 1, 4, 5]),
        text_embedding=torch.randn(20, 12, generator=random),
        negative_ids=torch.randint(20, (6, 3, 4), generator=random),
        negative_mask=torch.arange(72).view(6, 3, 4) % 12 < 9,
        latents=torch.randn(6, 6, 5, generator=random),
        latent_grid=(2, 3),
        noise_level=torch.tensor([0.1, 0.2, 0.2, 0.2, 0.6, 1.0]),
    )
    return inputs, torch.randn(6, 4, 6, generator=random), torch.rand(6, 3, 16, 16, generator=random)


@pytest.fixture(scope="module")
def ranks(whole, tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("ranks")
    run_forked(one_rank, 2, folder, *whole)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def whole_result(whole) -> dict:
    flat, noise, pixels = whole
    return gradients(branch_output(**flat), noise, pixels)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("branch", BRANCHES)
def test_two_halves_equal_one_whole(variant, branch, whole_result, ranks):
    report, grads, token_gradient = whole_result[variant, branch]
    halves = [result[variant, branch] for result, _, _ in ranks]
    for half_report, half_grads, _ in halves:
        torch.testing.assert_close(half_report, report, rtol=1e-4, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(half_grads, grads, rtol=1e-4, atol=1e-6)
    # The encoder's gradient is averaged over ranks later, hence the half.
    both = torch.cat([half_token_gradient for _, _, half_token_gradient in halves]) / 2
    torch.testing.assert_close(both, token_gradient, rtol=1e-4, atol=1e-6)


def test_the_multipliers_have_moved(ranks):
    for result, _, _ in ranks:
        assert result["budget", "understanding"][0]["constraint_multiplier"] > 1.4  # from 1, by up to exp(0.5)
        assert result["budget", "generation"][0]["constraint_multiplier"] != 2.0


def test_a_band_that_only_one_rank_has_is_reported_by_both(ranks):
    for branch in BRANCHES:
        for result, _, _ in ranks:
            report = result["tokens", branch][0]
            rates = {name: value for name, value in report.items() if name.startswith("rate_bits_per_token/")}
            empty = {name.split("/")[1] for name, value in rates.items() if value.isnan()}
            assert empty == {"t_0.25_0.50"}


def test_the_text_that_both_ranks_hold_is_no_negative(ranks):
    log_k = ranks[0][0]["tokens", "understanding"][0]["alignment_log_k"]
    expected = torch.tensor([6.0, 5.0, 6.0, 5.0, 6.0, 6.0]).log().mean()
    torch.testing.assert_close(log_k, expected)


def test_average_of_shares_is_the_mean_over_all_elements(ranks):
    average = sum(share for _, share, _ in ranks) / 2
    torch.testing.assert_close(average.item(), (1.0 + 5.0) / (2 + 4))


def test_unequal_batches_are_refused_on_both_ranks(ranks):
    for _, _, refusal in ranks:
        assert "equal batches on all of them, not [1, 2]; drop the last, partial batch" in refusal
