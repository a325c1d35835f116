"""Alignment A_b (Eq. 9): InfoNCE between the image's mean token and its text, image -> text.

Shapes: B local images, K = ranks x B candidate texts, N tokens, d latent width, H text width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infotok_lit.objective.distributed import gather_rows, rank
from infotok_lit.objective.inputs import BranchInputs
from infotok_lit.objective.term import TermNats


@dataclass(frozen=True)
class Contrast:
    """InfoNCE of B images, each against its own set of candidate texts; everything (B,), nats.

    Attributes:
        nats: -log softmax of the true text among its candidates; with its graph; 0 for an image without text.
        log_k: log of the number of candidates, the true one included.
        bound: a lower bound on I(Z~; T) in expectation. It keeps duplicates of the true text among the candidates:
            negatives must be drawn from p(T) for the bound to hold, and log_k - nats, with duplicates taken out, can
            exceed I (4 equally likely texts, a batch of 64: up to log 49 for a mutual information of log 4). Without
            duplicates it equals log_k - nats. Never above log_k.
        paired: bool, False for an image without text.
    """

    nats: Tensor
    log_k: Tensor
    bound: Tensor
    paired: Tensor

    def term(self) -> TermNats:
        """Nats per image; its elements are the pairs."""
        return TermNats(self.nats, self.paired.sum())


class Alignment(nn.Module):
    """Images and texts in one space of width d.

    The text is the mean of the LLM's input embeddings, detached, through a learned linear map. Input embeddings,
    because deeper states have already seen the image and would make the contrast trivial. The map has no bias: the
    embeddings are small, and a bias would be nearly all that a cosine sees.

    Args:
        text_width: H.
        latent_width: d.
        temperature: tau.
    """

    def __init__(self, text_width: int, latent_width: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.text_map = nn.Linear(text_width, latent_width, bias=False)

    def forward(self, mean: Tensor, inputs: BranchInputs) -> Contrast:
        """Posterior means (B, N, d) -> the contrast against the texts of the global batch (a collective call)."""
        images = F.normalize(mean.mean(1), dim=-1)
        texts = F.normalize(self.text_map(_mean_text(inputs)), dim=-1)
        paired = inputs.text_mask.any(1)
        all_texts, all_keys, all_paired = gather_rows(texts, inputs.text_key, paired)
        rows = len(images)
        positive = torch.arange(rows, device=images.device) + rank() * rows
        same_text = inputs.text_key[:, None] == all_keys
        return info_nce(images @ all_texts.T / self.temperature, positive, same_text, all_paired)


def info_nce(similarity: Tensor, positive: Tensor, same_text: Tensor, paired: Tensor) -> Contrast:
    """The contrast of each row's positive against the texts that differ from it.

    Args:
        similarity: (B, K) cosine / tau.
        positive: (B,) column of each row's own text.
        same_text: (B, K) bool: the column holds the same text as the row's own.
        paired: (K,) bool: the column holds a text at all.
    """
    is_positive = torch.arange(similarity.shape[1], device=positive.device) == positive[:, None]
    everyone = is_positive | paired
    candidates = is_positive | (paired & ~same_text)
    score = similarity.gather(1, positive[:, None]).squeeze(1)
    has_text = paired[positive]
    nats = torch.where(has_text, _log_sum_exp(similarity, candidates) - score, 0.0)
    with torch.no_grad():
        bound = everyone.sum(1).log() - (_log_sum_exp(similarity, everyone) - score)
        log_k = candidates.sum(1).log()
    return Contrast(nats, log_k * has_text, bound * has_text, has_text)


def _log_sum_exp(similarity: Tensor, candidates: Tensor) -> Tensor:
    return similarity.masked_fill(~candidates, -torch.inf).logsumexp(1)


def _mean_text(inputs: BranchInputs) -> Tensor:
    """(B, H): 0 for a row without text."""
    mask = inputs.text_mask[..., None].float()
    return (inputs.embedded_text() * mask).sum(1) / mask.sum(1).clamp(min=1)
