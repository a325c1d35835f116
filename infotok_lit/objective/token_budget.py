"""Token budgets: how many of an image's tokens the language model reads, which ones, and what teaches it to.

The rate k_i = KL(q(z_i | x) || p) says what token i carries (Eq. 7), so an image keeps the more tokens the more it
carries, and those that carry most: r_x = clip(keep sum_i k_i / E[sum_i k_i], 1/16, 1), the router of the video
tokenizer (arXiv 2512.16975, section 3) with the rate in the place of the distortion. Training draws `keep` for each
image (its Flex recipe), and the answers' distribution given all tokens teaches that given the kept ones.

Shapes: B images, N tokens, L of them with a place in the grid; the others are always read. M answer tokens, V words.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infotok_lit.budgets import FLEX_BASES, RunningMean, budget_rate, draw_bases, keep_top, nearest_count
from infotok_lit.errors import SettingsError
from infotok_lit.objective.distributed import global_mean, global_sum

Order = Literal["rate", "random"]


@dataclass(frozen=True)
class TokenBudgetConfig:
    """Training to read images with fewer tokens.

    Args:
        weight: Weight of the nats per answer token by which the answers from fewer tokens miss those from all. 0 only
            measures the mean rate, so that a budget can be chosen after training.
        keep: The mean shares of tokens that training draws from, evenly and for each image.
        order: Which tokens are read: those with the highest rates, or as a control as many at random.
        decay: What one step leaves of the running mean of the images' rates.
    """

    weight: float = 1.0
    keep: tuple[float, ...] = FLEX_BASES
    order: Order = "rate"
    decay: float = 0.99

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))
        if self.weight < 0:
            raise SettingsError(f"token_budget.weight is {self.weight}; set it to 0 (measure only) or above.")
        if not self.keep or not all(0 < share <= 1 for share in self.keep):
            raise SettingsError(f"token_budget.keep is {list(self.keep)}; give shares of tokens above 0 and up to 1.")
        if self.order not in get_args(Order):
            raise SettingsError(f"token_budget.order: {self.order!r} is not known; choose out of rate, random.")
        if not 0 <= self.decay < 1:
            raise SettingsError(f"token_budget.decay is {self.decay}; set it in [0, 1).")


class TokenBudget(nn.Module):
    """Which tokens of an image are read. Its state is what images carry on average, hence in the checkpoint.

    Args:
        num_extra: tokens without a place, which are always read and do not count.
        config: how training draws budgets.
    """

    def __init__(self, num_extra: int, config: TokenBudgetConfig = TokenBudgetConfig()) -> None:
        super().__init__()
        self.num_extra = num_extra
        self.config = config
        self.mean = RunningMean(config.decay, bias_correction=True, length=1)

    @torch.no_grad()
    def draw(self, rates: Tensor) -> Tensor:
        """(B, N) bool: what training reads of images with these rates (B, N) in nats, at a budget drawn for each."""
        if self.training:
            self.observe(rates)
        keep = draw_bases(self.config.keep, len(rates), rates.device)
        return self.kept(rates, keep, torch.rand_like(rates) if self.config.order == "random" else rates)

    @torch.no_grad()
    def observe(self, rates: Tensor) -> None:
        """Let the rates (B, N) of a batch, in nats per token, into the mean; a collective call."""
        total, images = global_sum(torch.stack([self._of_places(rates).sum(), rates.new_tensor(len(rates))]))
        self.mean.update(total / images)

    def share(self, rates: Tensor, keep: Tensor | float) -> Tensor:
        """r_x (B,): the share of its places that each image keeps.

        Args:
            rates: (B, N) nats.
            keep: that of an image of mean rate; a number or (B,).
        """
        mean = self.mean.mean.clamp(min=torch.finfo(rates.dtype).tiny)
        return budget_rate(self._of_places(rates).sum(1), mean, keep)

    def kept(self, rates: Tensor, keep: Tensor | float, scores: Tensor | None = None) -> Tensor:
        """(B, N) bool: the tokens that are read.

        Args:
            rates: (B, N) nats, which say how many tokens are read.
            keep: as for `share`.
            scores: (B, N): those with the highest are read; default: the rates.
        """
        return self.highest(rates if scores is None else scores, self.share(rates, keep))

    def highest(self, scores: Tensor, share: Tensor) -> Tensor:
        """(B, N) bool: all tokens without a place, and of the others a share (B,) with the highest scores (B, N)."""
        places = self._of_places(scores)
        chosen = keep_top(places, nearest_count(share, places.shape[1]))
        extras = chosen.new_ones(len(chosen), self.num_extra)
        return torch.cat([extras, chosen], dim=1)

    def _of_places(self, per_token: Tensor) -> Tensor:
        """(B, N) -> (B, L)."""
        return per_token[:, self.num_extra :]


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) in nats per answer token, of logits (M, V); this rank's share of the global mean."""
    log_probabilities = (logits.float().log_softmax(-1) for logits in (student, teacher.detach()))
    nats = F.kl_div(*log_probabilities, reduction="sum", log_target=True)
    return global_mean(nats, len(student))
