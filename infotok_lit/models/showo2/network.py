"""Show-o2's network: text and images in, hidden states of the language model and velocities of the images out.

Shapes: B sequences, T positions, M image slots per sequence, n = B M images, (gh, gw) grid of N tokens, C latent
channels, D language-model width, W diffusion-head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infotok_lit.batch import IMAGE_TOKEN_ID, Tokenizer
from infotok_lit.models.common.autoencoders import build_autoencoder
from infotok_lit.models.common.channel import Channel
from infotok_lit.models.common.language_model import build_language_model
from infotok_lit.models.reading import TokenTransform, transformed
from infotok_lit.models.showo2.diffusion import DiffusionHead, TimeEmbedding
from infotok_lit.models.showo2.encoder import DualPathEncoder, SharedTokens
from infotok_lit.models.showo2.family import PATCH_SIZE, Showo2Config
from infotok_lit.models.showo2.processor import Showo2Processor
from infotok_lit.models.showo2.sequence import (
    OMNI_ATTENTION,
    Mask,
    build_mask,
    find_regions,
    image_of_position,
    insert_images,
    token_places,
)
from infotok_lit.models.unified import UnifiedModel

PARTS = ("encoder", "llm", "time_embed", "time_to_token", "to_diffusion", "diffusion_head")


@dataclass(frozen=True)
class Hidden:
    """What the language model makes of sequences with images, and what the diffusion head needs beside it."""

    states: Tensor
    """(B, T, D), after the last norm."""
    shared: SharedTokens
    """The shared tokens, before any transform."""
    time: Tensor
    """(n, W): embedded times."""
    image: Tensor
    """(B, T) int64: which of the n images a position belongs to, -1 for text."""
    mask: Mask
    regions: Tensor
    """(B, M, 2)."""


class Showo2Network(UnifiedModel):
    """The layers, with fresh weights until a checkpoint is loaded, and how sequences pass through them."""

    def __init__(self, config: Showo2Config, tokenizer: Tokenizer) -> None:
        super().__init__(config, Showo2Processor(config, tokenizer))
        channels, width, head = config.autoencoder.channels, config.llm.hidden_size, config.diffusion_head
        self.token_widths = {"understanding": width, "generation": width}
        self.latent_width = PATCH_SIZE**2 * channels
        self.parts = {name: (f"{name}.",) for name in PARTS}
        self.autoencoder = build_autoencoder(config.autoencoder)
        channel = Channel(config.capacity_bits, config.num_image_tokens - 1, width)
        self.encoder = DualPathEncoder(config.semantic, config.quantiser, channel, channels, width)
        self.llm = build_language_model(config.llm, OMNI_ATTENTION)
        self.time_embed = TimeEmbedding(head.width)
        same = head.width == width
        self.time_to_token = nn.Identity() if same else nn.Linear(head.width, width)
        self.to_diffusion = nn.Identity() if same else _projection(width, head.width)
        self.diffusion_head = DiffusionHead(head, channels)

    def run_sequence(
        self,
        input_ids: Tensor,
        latents: Tensor,
        time: Tensor,
        transform: TokenTransform | None = None,
        regions: Tensor | None = None,
    ) -> Hidden:
        """Run the language model over text and images.

        Args:
            input_ids: (B, T) with IMAGE_TOKEN_ID at image slots; any padding is on the right.
            latents: (n, C, 2 gh, 2 gw), one per slot of a sequence, idle slots included.
            time: (n,) in [0, 1]: the noise level of each image, 1 clean.
            regions: (B, M, 2), where it is not to be read off the ids.
        """
        regions = find_regions(input_ids, len(latents) // len(input_ids)) if regions is None else regions
        shared = self.encoder(latents)
        embedded_time = self.time_embed(time)
        seen = transformed(shared.tokens, transform)
        embeds = insert_images(self.embed_text(input_ids), regions, self.time_to_token(embedded_time), seen)
        return self._run(embeds, regions, shared, embedded_time)

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D); image slots hold the embedding of token 0, which is to be overwritten."""
        return self.text_embedding(input_ids.masked_fill(input_ids == IMAGE_TOKEN_ID, 0))

    def read_with_images(self, embeds: Tensor, regions: Tensor) -> tuple[Tensor, Mask]:
        """Last hidden states (B, T, D) of sequences whose images lie in regions (B, M, 2), and who saw whom."""
        mask = build_mask(regions, embeds.shape[1])
        return self.llm.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state, mask

    def _run(self, embeds: Tensor, regions: Tensor, shared: SharedTokens, time: Tensor) -> Hidden:
        states, mask = self.read_with_images(embeds, regions)
        slot = image_of_position(regions, embeds.shape[1])
        first = torch.arange(len(regions), device=slot.device).unsqueeze(1) * regions.shape[1]
        return Hidden(states, shared, time, torch.where(slot >= 0, slot + first, -1), mask, regions)

    def velocities(self, hidden: Hidden) -> Tensor:
        """(B, T, 4 C): what the diffusion head predicts at every position."""
        positions = torch.arange(hidden.states.shape[1], device=hidden.states.device).unsqueeze(0)
        x = self.to_diffusion(hidden.states)
        return self.diffusion_head(x, hidden.time, hidden.image, hidden.mask, positions)

    def image_velocities(self, hidden: Hidden) -> Tensor:
        """(n, N, 4 C): what it predicts at the tokens of each image; of an idle slot, that of some other position."""
        # How many slots are idle is not known without waiting for a device.
        places = token_places(hidden.regions, hidden.shared.tokens.shape[1]).clamp(max=hidden.states.shape[1] - 1)
        rows = torch.arange(len(places), device=places.device)[:, None, None]
        return self.velocities(hidden)[rows, places].flatten(0, 1)

    def run_pair(
        self,
        input_ids: Tensor,
        condition: Tensor,
        latents: Tensor,
        time: Tensor,
        transform: TokenTransform | None = None,
    ) -> Hidden:
        """Run the language model over text with two images: tokens (B, N, D) of a clean one, then noisy latents."""
        regions = find_regions(input_ids, 2)
        shared = self.encoder(latents)
        times = self.time_embed(torch.stack([torch.ones_like(time), time], dim=1).flatten())
        as_tokens = self.time_to_token(times)
        embeds = insert_images(self.embed_text(input_ids), regions[:, :1], as_tokens[0::2], condition)
        seen = transformed(shared.tokens, transform)
        embeds = insert_images(embeds, regions[:, 1:], as_tokens[1::2], seen)
        return self._run(embeds, regions, shared, times)


def _projection(width_in: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, width_out), nn.GELU(), nn.Linear(width_out, width_out))
