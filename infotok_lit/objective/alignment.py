"""Alignment A_b (Eq. 9): InfoNCE between the image's mean token and its text, image -> text.

Shapes: B local images, K candidate texts (ranks x B, and those of a queue), N tokens, d latent width, H text width.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infotok_lit.batch import BranchOutput, NegativeTexts, PairedText
from infotok_lit.errors import SettingsError
from infotok_lit.objective.distributed import RowGatherer, rank
from infotok_lit.objective.term import TermNats, mean_negatives, mean_text

TEMPERATURE_RANGE = (0.01, 1.0)
"""What a learned temperature stays within; CLIP (Radford et al. 2021) bounds its scale by 100 likewise."""


@dataclass(frozen=True)
class NegativesConfig:
    """The texts that alignment contrasts an image with. Identical texts never are each other's negatives.

    Args:
        queue_size: So many texts of past batches are negatives too; 0 takes those of the global batch alone.
        limit: At most so many negatives per image; null takes all.
        kept: Which ones a limit keeps: `random`, drawn anew for every image and step, or `nearest` (hard negatives),
            those whose mean embeddings have the largest cosine with the true text's.
        from_data: So many texts that the data knows to be nearly true of an image, and false, are its negatives beside
            all others; 0 asks for none. Scenes has them: its own texts with one attribute changed.
    """

    queue_size: int = 0
    limit: int | None = None
    kept: Literal["random", "nearest"] = "random"
    from_data: int = 0

    def __post_init__(self) -> None:
        if self.kept not in ("random", "nearest"):
            raise SettingsError(f"negatives.kept: {self.kept!r} is not known; choose out of random, nearest.")
        if self.queue_size < 0:
            raise SettingsError(f"negatives.queue_size is {self.queue_size}; set it to 0 (off) or more.")
        if self.from_data < 0:
            raise SettingsError(f"negatives.from_data is {self.from_data}; set it to 0 (off) or more.")
        if self.limit is not None and self.limit < 1:
            raise SettingsError(f"negatives.limit is {self.limit}; set it to 1 or more, or to null for all.")
        if self.limit is None and self.kept == "nearest":
            raise SettingsError("negatives.kept is nearest, but all negatives are taken; set negatives.limit.")


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
        found: bool, the true text is the likeliest of the candidates; False for an image without text.
    """

    nats: Tensor
    log_k: Tensor
    bound: Tensor
    paired: Tensor
    found: Tensor

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
        temperature: tau, or where it starts.
        negatives: which texts an image is contrasted with.
        learn_temperature: learn tau within `TEMPERATURE_RANGE`.
        shuffled_texts: a control: what counts as an image's own text is the text of the next image of its batch.
    """

    def __init__(
        self,
        text_width: int,
        latent_width: int,
        temperature: float,
        negatives: NegativesConfig = NegativesConfig(),
        learn_temperature: bool = False,
        shuffled_texts: bool = False,
    ) -> None:
        super().__init__()
        self.fixed_temperature = temperature
        self.negatives = negatives
        self.shuffled_texts = shuffled_texts
        self.text_map = nn.Linear(text_width, latent_width, bias=False)
        self.queue = TextQueue(negatives.queue_size, text_width) if negatives.queue_size else None
        self.gather = RowGatherer()
        low, high = map(math.log, TEMPERATURE_RANGE)
        place = torch.tensor((math.log(temperature) - low) / (high - low))
        self.place = nn.Parameter(place.logit(eps=1e-3)) if learn_temperature else None

    @property
    def temperature(self) -> float | Tensor:
        """tau; where it is learned, by a parameter whose sigmoid is its place in the range, on a log scale."""
        if self.place is None:
            return self.fixed_temperature
        low, high = map(math.log, TEMPERATURE_RANGE)
        return torch.exp(low + (high - low) * self.place.sigmoid())

    def forward(self, mean: Tensor, output: BranchOutput) -> Contrast:
        """Posterior means (B, N, d) -> the contrast against the texts of the global batch (a collective call)."""
        if self.shuffled_texts:
            if self.training and len(mean) < 2:
                raise SettingsError(
                    "shuffled_texts needs another image in the batch; use 2 or more images per process."
                )
            output = replace(output, text=next_images_text(output.text))
        images = F.normalize(mean.mean(1), dim=-1)
        own_text = mean_text(output, output.text.mask)
        all_texts, all_keys, all_paired = self._candidates(own_text, output)
        mapped = F.normalize(self.text_map(all_texts), dim=-1)
        positive = torch.arange(len(images), device=images.device) + rank() * len(images)
        same_text = output.text.key[:, None] == all_keys
        negatives = choose(all_paired & ~same_text, own_text, all_texts, self.negatives)
        false = self._from_data(images, output)
        return info_nce(images @ mapped.T / self.temperature, positive, negatives, all_paired, false)

    def _from_data(self, images: Tensor, output: BranchOutput) -> Tensor | None:
        """(B, m): cosine / tau of each image with the texts that are false of it, -inf where there is none."""
        if not self.negatives.from_data:
            return None
        texts, present = mean_negatives(output, self.negatives.from_data)
        mapped = F.normalize(self.text_map(texts), dim=-1)
        similarity = (mapped @ images[..., None]).squeeze(-1) / self.temperature
        return similarity.masked_fill(~present, -torch.inf)

    def _candidates(self, own_text: Tensor, output: BranchOutput) -> tuple[Tensor, Tensor, Tensor]:
        """Mean texts (K, H), their keys (K,), and where there is one (K,): the global batch, then the queue."""
        batch = self.gather((own_text, output.text.key, output.text.mask.any(1)), self.training)
        if self.queue is None:
            return batch
        past = self.queue.rows()
        if self.training:
            self.queue.push(*batch)
        texts, keys, paired = (torch.cat(pair) for pair in zip(batch, past, strict=True))
        return texts, keys, paired


def next_images_text(text: PairedText) -> PairedText:
    """Each row's text, with all that belongs to it, becomes that of the row below; the last row takes the first's."""
    ids, mask, target_mask, key = (part.roll(-1, 0) for part in (text.ids, text.mask, text.target_mask, text.key))
    negatives = NegativeTexts(*(part.roll(-1, 0) for part in text.negatives)) if text.negatives else None
    return PairedText(ids, mask, target_mask, key, negatives)


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
        found = has_text & (score >= contrasted.amax(1))
    return Contrast(nats, log_k * has_text, bound * has_text, has_text, found)


class TextQueue(nn.Module):
    """The last texts of training, newest last, as further negatives; its state is in buffers, hence in the checkpoint.

    It holds what goes into the learned map and not what comes out, so the map of today applies to the texts of
    yesterday. That is why there is no slow copy of the map (the momentum encoder of He et al., 2020).
    """

    texts: Tensor
    keys: Tensor
    present: Tensor

    def __init__(self, size: int, text_width: int) -> None:
        super().__init__()
        self.register_buffer("texts", torch.zeros(size, text_width))
        self.register_buffer("keys", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("present", torch.zeros(size, dtype=torch.bool))

    def push(self, texts: Tensor, keys: Tensor, present: Tensor) -> None:
        """Add the rows of the global batch (K, H), (K,), (K,); the oldest leave."""
        for queue, new in ((self.texts, texts), (self.keys, keys), (self.present, present)):
            queue.copy_(torch.cat([queue, new.detach().to(queue.dtype)])[-len(queue) :])

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies, so that a push between the forward and the backward pass does no harm."""
        return self.texts.clone(), self.keys.clone(), self.present.clone()


def choose(eligible: Tensor, anchors: Tensor, texts: Tensor, config: NegativesConfig) -> Tensor:
    """At most `config.limit` of each row's eligible candidates.

    Args:
        eligible: (B, K) bool.
        anchors: (B, H) each row's own text.
        texts: (K, H) all candidate texts.

    Returns:
        (B, K) bool.
    """
    if config.limit is None or config.limit >= eligible.shape[1]:
        return eligible
    if config.kept == "nearest":
        score = F.normalize(anchors, dim=-1) @ F.normalize(texts, dim=-1).T
    else:
        score = torch.rand(eligible.shape, device=eligible.device)
    best = score.masked_fill(~eligible, -torch.inf).topk(config.limit, dim=1).indices
    return torch.zeros_like(eligible).scatter(1, best, True) & eligible
