"""Alignment A_b (Eq. 9): InfoNCE between the image's mean token and its text, image -> text.

Shapes: B local images, K = ranks x B candidate texts, N tokens, d latent width, H text width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infotok_lit.objective.config import NegativesConfig
from infotok_lit.objective.distributed import gather_rows, rank
from infotok_lit.objective.inputs import BranchInputs
from infotok_lit.objective.negatives import TextQueue, choose
from infotok_lit.objective.term import TermNats


@dataclass(frozen=True)
class Contrast:
    """InfoNCE of B images, each against its own set of candidate texts; everything (B,), nats.

    Attributes:
        nats: -log softmax of the true text among its candidates; with its graph; 0 for an image without text.
        log_k: log of the number of candidates, the true one included.
        bound: a lower bound on I(Z~; T) in expectation. It keeps duplicates of the true text among the candidates:
            negatives must be drawn from p(T) for the bound to hold, and log_k - nats, with duplicates taken out, can
            exceed I (4 equally likely texts, a batch of 64: up to log 49 for a mutual information of log 4). For the
            same reason it is over all texts where the loss takes some, and without those that were made to be false.
            Otherwise it equals log_k - nats. Never above the log of the number of all texts.
        paired: bool, False for an image without text.
    """

    nats: Tensor
    log_k: Tensor
    bound: Tensor
    paired: Tensor

    def term(self) -> TermNats:
        """Nats per image; its elements are the pairs."""
        return TermNats(self.nats, self.paired.long())


class Alignment(nn.Module):
    """Images and texts in one space of width d.

    The text is the mean of the LLM's input embeddings, detached, through a learned linear map. Input embeddings,
    because deeper states have already seen the image and would make the contrast trivial. The map has no bias: the
    embeddings are small, and a bias would be nearly all that a cosine sees.

    Args:
        text_width: H.
        latent_width: d.
        temperature: tau.
        negatives: which texts an image is contrasted with.
    """

    def __init__(
        self,
        text_width: int,
        latent_width: int,
        temperature: float,
        negatives: NegativesConfig = NegativesConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.negatives = negatives
        self.text_map = nn.Linear(text_width, latent_width, bias=False)
        self.queue = TextQueue(negatives.queue_size, text_width) if negatives.queue_size else None

    def forward(self, mean: Tensor, inputs: BranchInputs) -> Contrast:
        """Posterior means (B, N, d) -> the contrast against the texts of the global batch (a collective call)."""
        images = F.normalize(mean.mean(1), dim=-1)
        own_text = inputs.mean_text(inputs.text_mask)
        all_texts, all_keys, all_paired = self._candidates(own_text, inputs)
        mapped = F.normalize(self.text_map(all_texts), dim=-1)
        positive = torch.arange(len(images), device=images.device) + rank() * len(images)
        same_text = inputs.text_key[:, None] == all_keys
        negatives = choose(all_paired & ~same_text, own_text, all_texts, self.negatives)
        false = self._from_data(images, inputs)
        return info_nce(images @ mapped.T / self.temperature, positive, negatives, all_paired, false)

    def _from_data(self, images: Tensor, inputs: BranchInputs) -> Tensor | None:
        """(B, m): cosine / tau of each image with the texts that are false of it, -inf where there is none."""
        if not self.negatives.from_data:
            return None
        texts, present = inputs.mean_negatives(self.negatives.from_data)
        mapped = F.normalize(self.text_map(texts), dim=-1)
        similarity = (mapped @ images[..., None]).squeeze(-1) / self.temperature
        return similarity.masked_fill(~present, -torch.inf)

    def _candidates(self, own_text: Tensor, inputs: BranchInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Mean texts (K, H), their keys (K,), and where there is one (K,): the global batch, then the queue."""
        batch = gather_rows(own_text, inputs.text_key, inputs.text_mask.any(1))
        if self.queue is None:
            return batch
        past = self.queue.rows()
        if self.training:
            self.queue.push(*batch)
        texts, keys, paired = (torch.cat(pair) for pair in zip(batch, past, strict=True))
        return texts, keys, paired


def info_nce(
    similarity: Tensor, positive: Tensor, negatives: Tensor, paired: Tensor, false: Tensor | None = None
) -> Contrast:
    """The contrast of each row's positive against its negatives.

    Args:
        similarity: (B, K) cosine / tau.
        positive: (B,) column of each row's own text.
        negatives: (B, K) bool: the column holds another text than the row's own, which the loss contrasts with.
        paired: (K,) bool: the column holds a text at all.
        false: (B, m) cosine / tau of each row's own further negatives, which the loss contrasts with too; -inf: none.
    """
    is_positive = torch.arange(similarity.shape[1], device=positive.device) == positive[:, None]
    everyone = is_positive | paired
    candidates = is_positive | negatives
    score = similarity.gather(1, positive[:, None]).squeeze(1)
    has_text = paired[positive]
    contrasted = similarity.masked_fill(~candidates, -torch.inf)
    if false is not None:
        contrasted = torch.cat([contrasted, false], dim=1)
    nats = torch.where(has_text, contrasted.logsumexp(1) - score, 0.0)
    with torch.no_grad():
        bound = everyone.sum(1).log() - (similarity.masked_fill(~everyone, -torch.inf).logsumexp(1) - score)
        log_k = contrasted.isfinite().sum(1).log()
    return Contrast(nats, log_k * has_text, bound * has_text, has_text)
