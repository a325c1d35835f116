"""Sufficiency S_b (Eq. 8): -log p(Y | Z~) under a variational decoder; H(Y) - S is a lower bound on I(Z~; Y).

Shapes: B images, N tokens, d latent width, S text length, H text width, L x C image latents.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infotok_lit.objective.config import DecoderConfig
from infotok_lit.objective.decoding import MemoryReader, TokenMemory
from infotok_lit.objective.inputs import BranchInputs
from infotok_lit.objective.positions import grid_positions, text_positions
from infotok_lit.objective.posterior import LOG_VARIANCE_RANGE, soft_clamp
from infotok_lit.objective.term import TermNats

LOGIT_ROWS = 1024
"""Target tokens whose logits are held at once: 0.6 GB in float32 for a vocabulary of 152,000."""


VARIANCE_SPEED = 10.0
"""The latents' log variance in units of its parameter. Adam moves a parameter by about its learning rate per step, and
latents may be a hundred times narrower than the unit Gaussian that the decoder starts from."""


class TextDecoder(nn.Module):
    """p(answer | question, Z~): a small causal transformer that reads the question and cross-attends to Z~.

    The LLM's embedding table, detached, serves both ways: words in (H -> width) and words out (width -> H, then the
    table). So no vocabulary is trained here, and an answer costs logits at its own tokens only.

    Args:
        config: width, depth, heads.
        latent_width: d.
        text_width: H.
        num_extra: tokens without a place in the grid.
    """

    def __init__(self, config: DecoderConfig, latent_width: int, text_width: int, num_extra: int) -> None:
        super().__init__()
        self.width = config.width
        self.memory = TokenMemory(latent_width, config.width, num_extra)
        # Tables differ in scale by two orders of magnitude; normed, a word weighs as much as its position.
        self.words_in = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, config.width))
        self.begin = nn.Parameter(torch.randn(config.width) / 2**0.5)
        self.reader = MemoryReader(config)
        self.words_out = nn.Linear(config.width, text_width)
        # Small, so that the first prediction is near uniform whatever the table's scale.
        nn.init.normal_(self.words_out.weight, std=0.02)

    def forward(self, sample: Tensor, inputs: BranchInputs) -> TermNats:
        """Z~ (B, N, d) -> nats per image, summed over its answer tokens; 0 for an image without any."""
        return TermNats(self.token_nats(sample, inputs).sum(1), _targets(inputs).sum(1))

    def token_nats(self, sample: Tensor, inputs: BranchInputs) -> Tensor:
        """Z~ (B, N, d) -> (B, S): -log p(token | tokens before it, Z~) at answer tokens, 0 elsewhere."""
        words = self.words_in(inputs.embedded_text()[:, :-1])
        begin = self.begin.expand(len(words), 1, -1)
        queries = torch.cat([begin, words], dim=1)[:, : inputs.text_ids.shape[1]]
        queries = queries + text_positions(queries.shape[1], self.width, sample.device)
        # Padding is on the right, so a causal mask already hides it from every answer token.
        hidden = self.reader(queries, self.memory(sample, inputs), causal=True)
        targets = _targets(inputs)
        nats = self._nats(hidden[targets], inputs.text_ids[targets], inputs.text_embedding.detach())
        return torch.zeros_like(targets, dtype=nats.dtype).masked_scatter(targets, nats)

    def _nats(self, hidden: Tensor, ids: Tensor, table: Tensor) -> Tensor:
        """(M, width), (M,) -> (M,). Logits are recomputed in the backward pass: held, they would outweigh the rest."""
        pieces = zip(self.words_out(hidden).split(LOGIT_ROWS), ids.split(LOGIT_ROWS), strict=True)
        return torch.cat(
            [
                checkpoint(_word_nats, words, piece, table, use_reentrant=False, preserve_rng_state=False)
                for words, piece in pieces
            ]
        )


class LatentDecoder(nn.Module):
    """p(latents | Z~): all L latents at once, Gaussian with one learned variance per channel.

    Queries are the places of the latent grid, so tokens that the base model hid are predicted like the others.

    Args:
        config: width, depth, heads.
        latent_width: d.
        latent_channels: C.
        num_extra: tokens without a place in the grid.
    """

    def __init__(self, config: DecoderConfig, latent_width: int, latent_channels: int, num_extra: int) -> None:
        super().__init__()
        self.width = config.width
        self.memory = TokenMemory(latent_width, config.width, num_extra)
        self.reader = MemoryReader(config)
        self.mean = nn.Linear(config.width, latent_channels)
        self.log_variance = nn.Parameter(torch.zeros(latent_channels))

    def forward(self, sample: Tensor, inputs: BranchInputs) -> TermNats:
        """Z~ (B, N, d) -> nats per image, summed over L x C numbers. A density: it may be negative.

        Raises:
            ValueError: the inputs hold no latents, or latents of another shape.
        """
        latents = self._checked_latents(inputs)
        mean, log_variance = self.predict(sample, inputs)
        error = (latents - mean).square() * torch.exp(-log_variance)
        nats = 0.5 * (error + log_variance + math.log(2 * math.pi))
        elements = torch.full_like(nats[:, 0, 0], nats[0].numel(), dtype=torch.int64)
        return TermNats(nats.sum((1, 2)), elements)

    def predict(self, sample: Tensor, inputs: BranchInputs) -> tuple[Tensor, Tensor]:
        """Z~ (B, N, d) -> the Gaussian's mean (B, L, C) and log variance (C,)."""
        places = grid_positions(inputs.latent_grid, self.width, sample.device)
        queries = places.expand(len(sample), -1, -1)
        hidden = self.reader(queries, self.memory(sample, inputs), causal=False)
        return self.mean(hidden), soft_clamp(VARIANCE_SPEED * self.log_variance, *LOG_VARIANCE_RANGE)

    def _checked_latents(self, inputs: BranchInputs) -> Tensor:
        if inputs.latents is None or inputs.latent_grid is None:
            raise ValueError("Sufficiency of generation predicts the image latents; give latents and latent_grid.")
        height, width = inputs.latent_grid
        expected = (len(inputs.tokens), height * width, self.mean.out_features)
        if inputs.latents.shape != expected:
            raise ValueError(f"latents must have shape {expected}, not {tuple(inputs.latents.shape)}.")
        return inputs.latents.detach().float()


def _targets(inputs: BranchInputs) -> Tensor:
    return inputs.target_mask & inputs.text_mask


def _word_nats(words: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    # The product runs in the table's own dtype: a float32 copy of a half-precision table would be made at every step.
    return F.cross_entropy((words.to(table.dtype) @ table.T).float(), ids, reduction="none")
