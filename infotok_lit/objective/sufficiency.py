"""Sufficiency S_b (Eq. 8): -log p(Y | Z~) under a variational decoder; H(Y) - S is a lower bound on I(Z~; Y).

Shapes: B images, N tokens, d latent width, S text length, H text width, L x C image latents.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infotok_lit.batch import Branch, BranchOutput
from infotok_lit.errors import SettingsError
from infotok_lit.objective.compactness import LOG_VARIANCE_RANGE, soft_clamp
from infotok_lit.objective.term import TermNats, answer_words, embedded_text

LOGIT_ROWS = 1024
"""Target tokens whose logits are held at once: 0.6 GB in float32 for a vocabulary of 152,000."""


VARIANCE_SPEED = 10.0
"""The latents' log variance in units of its parameter. Adam moves a parameter by about its learning rate per step, and
latents may be a hundred times narrower than the unit Gaussian that the decoder starts from."""
FINEST_GRID = 64
"""Cells per side that the shortest wavelength (two cells) still tells apart."""
LONGEST_TEXT = 10_000
"""Tokens, over 2 pi, of the longest wavelength in a text."""


LatentTarget = Literal["all", "hidden", "coarse"]


@dataclass(frozen=True)
class DecoderConfig:
    """The variational decoders p(Y | Z~) of sufficiency (Eq. 8), both small transformers.

    Args:
        width: Width of the residual stream; a multiple of 4 (two axes, sine and cosine) and of `heads`.
        depth: Number of layers.
        heads: Number of attention heads.
        teacher_forcing: Let the text decoder see the answer's earlier words. Without, it has the question and the
            tokens, and nothing else to tell the next word by.
        latents: Which latents generation's decoder predicts: `all` clean ones (the paper), those at the places that the
            base model `hidden` from the encoder (which Harmon does), or the `coarse` ones, the means of 2 x 2 places,
            which leave out high frequencies.
    """

    width: int = 128
    depth: int = 2
    heads: int = 4
    teacher_forcing: bool = True
    latents: LatentTarget = "all"

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise SettingsError(f"decoder.{name} is {getattr(self, name)}; set it to 1 or more.")
        if self.latents not in ("all", "hidden", "coarse"):
            raise SettingsError(f"decoder.latents: {self.latents!r} is not known; choose out of all, hidden, coarse.")
        if self.width % 4 or self.width % self.heads:
            raise SettingsError(
                f"decoder.width {self.width} must be a multiple of 4 and of decoder.heads {self.heads}."
            )


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
        self.teacher_forcing = config.teacher_forcing
        self.memory = TokenMemory(latent_width, config.width, num_extra)
        # Tables differ in scale by two orders of magnitude; normed, a word weighs as much as its position.
        self.words_in = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, config.width))
        self.begin = nn.Parameter(torch.randn(config.width) / 2**0.5)
        self.reader = MemoryReader(config)
        self.words_out = nn.Linear(config.width, text_width)
        # Small, so that the first prediction is near uniform whatever the table's scale.
        nn.init.normal_(self.words_out.weight, std=0.02)

    def forward(self, sample: Tensor, output: BranchOutput, token_index: Tensor | None = None) -> TermNats:
        """Z~ (B, N, d) -> nats per image, summed over its answer tokens; 0 for an image without any.

        Args:
            token_index: (B, N) the sample's places in the canvas; default: those of `output`.
        """
        return TermNats(self.token_nats(sample, output, token_index).sum(1), answer_words(output).sum(1))

    def token_nats(self, sample: Tensor, output: BranchOutput, token_index: Tensor | None = None) -> Tensor:
        """Z~ (B, N, d) -> (B, S): -log p(token | what comes before it, Z~) at answer tokens, 0 elsewhere."""
        targets = answer_words(output)
        words = self.words_in(embedded_text(output)[:, :-1])
        if not self.teacher_forcing:
            words = torch.where(targets[:, :-1, None], self.begin, words)
        begin = self.begin.expand(len(words), 1, -1)
        queries = torch.cat([begin, words], dim=1)[:, : targets.shape[1]]
        queries = queries + text_positions(queries.shape[1], self.width, sample.device)
        # Padding is on the right, so a causal mask already hides it from every answer token.
        hidden = self.reader(queries, self.memory(sample, output, token_index), causal=True)
        places = output.text.target_places
        places = targets.flatten().nonzero()[:, 0] if places is None else places
        ids = output.text.ids.flatten()[places]
        nats = self._nats(hidden.flatten(0, 1)[places], ids, output.text_embedding.weight.detach())
        return nats.new_zeros(targets.numel()).index_copy(0, places, nats).view(targets.shape)

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
        config: width, depth, heads, and which latents.
        latent_width: d.
        latent_channels: C.
        num_extra: tokens without a place in the grid.
    """

    def __init__(self, config: DecoderConfig, latent_width: int, latent_channels: int, num_extra: int) -> None:
        super().__init__()
        self.width = config.width
        self.target = config.latents
        self.memory = TokenMemory(latent_width, config.width, num_extra)
        self.reader = MemoryReader(config)
        self.mean = nn.Linear(config.width, latent_channels)
        self.log_variance = nn.Parameter(torch.zeros(latent_channels))

    def forward(self, sample: Tensor, output: BranchOutput, token_index: Tensor | None = None) -> TermNats:
        """Z~ (B, N, d) -> nats per image, summed over the numbers it predicts. A density: it may be negative.

        Args:
            token_index: (B, N) the sample's places in the canvas; default: those of `output`, which alone say what is
                hidden.

        Raises:
            ValueError: the branch has no latents, or latents of another shape.
            SettingsError: `hidden` where nothing is hidden.
        """
        latents, grid = self._targets(output)
        mean, log_variance = self.predict(sample, output, grid, token_index)
        error = (latents - mean).square() * torch.exp(-log_variance)
        nats = 0.5 * (error + log_variance + math.log(2 * math.pi)).sum(2)
        counted = hidden_places(output) if self.target == "hidden" else torch.ones_like(nats, dtype=torch.bool)
        return TermNats((nats * counted).sum(1), counted.sum(1) * latents.shape[2])

    def predict(
        self, sample: Tensor, output: BranchOutput, grid: tuple[int, int], token_index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Z~ (B, N, d) -> the Gaussian's mean (B, h * w, C) over a grid, and its log variance (C,)."""
        places = grid_positions(grid, self.width, sample.device)
        queries = places.expand(len(sample), -1, -1)
        hidden = self.reader(queries, self.memory(sample, output, token_index), causal=False)
        return self.mean(hidden), soft_clamp(VARIANCE_SPEED * self.log_variance, *LOG_VARIANCE_RANGE)

    def _targets(self, output: BranchOutput) -> tuple[Tensor, tuple[int, int]]:
        """The latents to predict, (B, h * w, C) float32, and their grid."""
        if output.latents is None or output.latent_grid is None:
            raise ValueError("Sufficiency of generation predicts the image latents; give latents and latent_grid.")
        height, width = output.latent_grid
        expected = (len(output.tokens), height * width, self.mean.out_features)
        if output.latents.shape != expected:
            raise ValueError(f"latents must have shape {expected}, not {tuple(output.latents.shape)}.")
        latents = output.latents.detach().float()
        if self.target != "coarse":
            return latents, output.latent_grid
        blocks = F.avg_pool2d(latents.mT.unflatten(2, output.latent_grid), 2, ceil_mode=True, count_include_pad=False)
        return blocks.flatten(2).mT, tuple(blocks.shape[2:])


def hidden_places(output: BranchOutput) -> Tensor:
    """(B, L) bool: the places of the latent grid whose tokens the base model hid from the encoder.

    Raises:
        SettingsError: the model hides nothing.
    """
    extra, (rows, columns) = output.layout.num_extra, output.layout.grid
    if rows * columns == 0 or output.tokens.shape[1] == output.layout.num_tokens:
        raise SettingsError("decoder.latents is hidden, but this model hides no tokens; set it to all or coarse.")
    shown = torch.zeros(len(output.tokens), output.layout.num_tokens, dtype=torch.bool, device=output.tokens.device)
    shown = shown.scatter(1, output.token_index, True)[:, extra:].unflatten(1, output.layout.grid)
    height, width = output.latent_grid
    row = torch.arange(height, device=shown.device) * rows // height
    column = torch.arange(width, device=shown.device) * columns // width
    return ~shown[:, row[:, None], column].flatten(1)


def other_images(branch: Branch, output: BranchOutput) -> tuple[Tensor, Tensor]:
    """For each image another one of the batch whose target differs: its row (B,), and whether there is one (B,).

    Another answer for understanding, another caption for generation; the next such row, so that all take part.
    """
    if branch == "understanding":
        words = answer_words(output)
        # Answers side by side, whatever the length of the question before each.
        order = words.int().argsort(dim=1, descending=True, stable=True)
        answers = torch.where(words, output.text.ids, -1).gather(1, order)
        same = (answers[:, None] == answers).all(-1)
    else:
        same = output.text.key[:, None] == output.text.key
    places = torch.arange(len(same), device=same.device)
    following = (places[:, None] + 1 + places) % len(same)
    first = (~same).gather(1, following).int().argmax(1)
    return following.gather(1, first[:, None]).squeeze(1), ~same.all(1)


def _word_nats(words: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    # The product runs in the table's own dtype: a float32 copy of a half-precision table would be made at every step.
    return F.cross_entropy((words.to(table.dtype) @ table.T).float(), ids, reduction="none")


class TokenMemory(nn.Module):
    """Z~ (B, N, d) -> (B, N, width), each token marked with its place in the canvas.

    Grid places are sine-cosine vectors, hence any grid; places without a position are learned.

    Args:
        latent_width: d.
        width: decoder width.
        num_extra: places without a position.
    """

    def __init__(self, latent_width: int, width: int, num_extra: int) -> None:
        super().__init__()
        self.width = width
        self.content = nn.Linear(latent_width, width)
        # As long as a sine-cosine vector, whose entries have a mean square of 1/2.
        self.extra_places = nn.Parameter(torch.randn(num_extra, width) / 2**0.5) if num_extra else None
        self.norm = nn.LayerNorm(width)

    def forward(self, sample: Tensor, output: BranchOutput, token_index: Tensor | None = None) -> Tensor:
        places = grid_positions(output.layout.grid, self.width, sample.device)
        if self.extra_places is not None:
            places = torch.cat([self.extra_places, places])
        return self.norm(self.content(sample) + places[output.token_index if token_index is None else token_index])


class MemoryReader(nn.Module):
    """Pre-norm transformer layers over (B, S, width) queries that also attend to a memory (B, N, width)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                config.width,
                config.heads,
                dim_feedforward=4 * config.width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, queries: Tensor, memory: Tensor, causal: bool) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(queries.shape[1], queries.device) if causal else None
        for layer in self.layers:
            queries = layer(queries, memory, tgt_mask=mask, tgt_is_causal=causal)
        return self.norm(queries)


def grid_positions(grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """(h * w, width): raster order; one half of the width says the row, the other the column."""
    # Wavelengths from two image sides, which never repeats within an image, down to two cells of the finest grid.
    frequencies = math.pi * FINEST_GRID ** torch.linspace(0, 1, width // 4, device=device)
    rows, columns = (
        _sinusoids((torch.arange(cells, device=device) + 0.5) / cells, frequencies).unsqueeze(1 - axis)
        for axis, cells in enumerate(grid)
    )
    return torch.cat([rows.expand(*grid, -1), columns.expand(*grid, -1)], dim=-1).flatten(0, 1)


def text_positions(length: int, width: int, device: torch.device) -> Tensor:
    """(length, width): wavelengths from 2 pi tokens up."""
    frequencies = LONGEST_TEXT ** -torch.linspace(0, 1, width // 2, device=device)
    return _sinusoids(torch.arange(length, device=device), frequencies)


def _sinusoids(coordinates: Tensor, frequencies: Tensor) -> Tensor:
    angles = coordinates[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
