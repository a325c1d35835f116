"""Show-o2: one language model over text and images, whose tokens come from a dual-path encoder and whose pictures come
from flow matching (Xie et al. 2025, arXiv 2506.15564).

Shapes: B sequences, T positions, M image slots per sequence, n = B M images, (gh, gw) grid of N tokens, C latent
channels, D language-model width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infotok_lit.batch import (
    IMAGE_TOKEN_ID,
    BranchOutput,
    GenerationBatch,
    ReconstructionOutput,
    TokenCodes,
    TokenLayout,
    UnderstandingBatch,
)
from infotok_lit.checkpoints import KeyMap
from infotok_lit.errors import SettingsError
from infotok_lit.models.common.block_transform import BlockTransform
from infotok_lit.models.common.image_noise import ImageNoise
from infotok_lit.models.common.language_model import build_language_model, text_loss
from infotok_lit.models.common.reconstruction import (
    ReconstructionConfig,
    TemplateDraws,
    choose_templates,
    condition_pixels,
    draw_templates,
    graph_unless_stopped,
    scale_gradient,
)
from infotok_lit.models.common.token_grid import Grid, token_grid
from infotok_lit.models.showo2.attention import OMNI_ATTENTION, Mask, build_mask, image_of_position
from infotok_lit.models.showo2.autoencoder import build_autoencoder
from infotok_lit.models.showo2.config import PATCH_SIZE, DrawingConfig, Showo2Config
from infotok_lit.models.showo2.describing import answer
from infotok_lit.models.showo2.diffusion_head import DiffusionHead
from infotok_lit.models.showo2.drawing import draw_latents
from infotok_lit.models.showo2.draws import TrainingDraws, draw_training
from infotok_lit.models.showo2.encoder import DualPathEncoder
from infotok_lit.models.showo2.flow import TimeEmbedding, on_path, to_runs, training_time
from infotok_lit.models.showo2.keys import showo2_keys, wan_keys
from infotok_lit.models.showo2.processor import Showo2Processor
from infotok_lit.models.showo2.quantiser import SharedTokens
from infotok_lit.models.showo2.sequence import find_regions, insert_images
from infotok_lit.models.unified import TokenTransform, UnifiedModel


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


class NoisyPath(NamedTuple):
    """Latents on their way from noise to an image."""

    noisy: Tensor
    """(n, C, 2 gh, 2 gw)."""
    velocity: Tensor
    """(n, C, 2 gh, 2 gw): the targets."""
    time: Tensor
    """(n,)."""


class Showo2(UnifiedModel):
    """The whole model; weights are fresh until a checkpoint is loaded."""

    family = "showo2"
    title = Showo2Config.title
    reconstruction_defaults = ReconstructionConfig(condition="low_res", gradient_scale=0.1, template_swap=0.1)

    def __init__(self, config: Showo2Config, processor: Showo2Processor) -> None:
        super().__init__()
        self.config = config
        self.processor = processor
        channels, width, head = config.autoencoder.channels, config.llm.hidden_size, config.diffusion_head
        self.token_widths = {"understanding": width, "generation": width}
        self.num_extras = {"understanding": 0, "generation": 0}
        self.latent_width = PATCH_SIZE**2 * channels
        self.text_width = width
        names = ("encoder", "llm", "time_embed", "time_to_token", "to_diffusion", "diffusion_head")
        self.parts = {name: (f"{name}.",) for name in names}
        self.token_parts = {"understanding": ("encoder",), "generation": ("encoder",)}
        self.autoencoder = build_autoencoder(config.autoencoder)
        self.encoder = DualPathEncoder(config.semantic, config.quantiser, channels, width)
        self.llm = build_language_model(config.llm, OMNI_ATTENTION)
        self.time_embed = TimeEmbedding(head.width)
        same = head.width == width
        self.time_to_token = nn.Identity() if same else nn.Linear(head.width, width)
        self.to_diffusion = nn.Identity() if same else _projection(width, head.width)
        self.diffusion_head = DiffusionHead(head, channels)

    @property
    def official_aliases(self) -> tuple[str, ...]:
        """A tied language model's head is its embedding table."""
        return ("showo.lm_head.weight",) if self.config.llm.tie_word_embeddings else ()

    # Latents

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor, noise: Tensor | None = None) -> Tensor:
        """(n, 3, height, width) in [-1, 1] -> scaled latents (n, C, 2 gh, 2 gw).

        Args:
            noise: standard normal, like the result, for the draw from the posterior; drawn if not given.
        """
        self.grid_of(*pixel_values.shape[2:])
        if isinstance(self.autoencoder, BlockTransform):
            return self.autoencoder.encode(pixel_values) * self.config.latent_scale
        posterior = self.autoencoder.posterior(pixel_values)
        if self.config.autoencoder.posterior == "mean":
            return posterior.mean * self.config.latent_scale
        noise = torch.randn_like(posterior.mean) if noise is None else noise
        return posterior.sample(noise) * self.config.latent_scale

    @torch.no_grad()
    def decode_images(self, latents: Tensor) -> Tensor:
        """Scaled latents -> images (n, 3, height, width), not clamped."""
        return self.autoencoder.decode(latents / self.config.latent_scale)

    # Sequences

    def read_sequence(
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
        regions = find_regions(input_ids) if regions is None else regions
        shared = self.encoder(latents)
        embedded_time = self.time_embed(time)
        seen = shared.tokens if transform is None else transform(shared.tokens)
        embeds = insert_images(self._embed_text(input_ids), regions, self.time_to_token(embedded_time), seen)
        return self._read(embeds, regions, shared, embedded_time)

    def _embed_text(self, input_ids: Tensor) -> Tensor:
        return self.llm.get_input_embeddings()(input_ids.masked_fill(input_ids == IMAGE_TOKEN_ID, 0))

    def _read(self, embeds: Tensor, regions: Tensor, shared: SharedTokens, time: Tensor) -> Hidden:
        mask = build_mask(regions, embeds.shape[1])
        states = self.llm.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        slot = image_of_position(regions, embeds.shape[1])
        first = torch.arange(len(regions), device=slot.device).unsqueeze(1) * regions.shape[1]
        return Hidden(states, shared, time, torch.where(slot >= 0, slot + first, -1), mask, regions)

    def velocities(self, hidden: Hidden) -> Tensor:
        """(B, T, 4 C): what the diffusion head predicts at every position."""
        positions = torch.arange(hidden.states.shape[1], device=hidden.states.device).unsqueeze(0)
        x = self.to_diffusion(hidden.states)
        return self.diffusion_head(x, hidden.time, hidden.image, hidden.mask, positions)

    def token_positions(self, hidden: Hidden) -> Tensor:
        """(B, T) bool: positions of image tokens, without those of times."""
        is_token = hidden.image >= 0
        starts = hidden.regions[..., 0][hidden.regions[..., 1] > 0]
        rows = (hidden.regions[..., 1] > 0).nonzero()[:, 0]
        return is_token.index_put((rows, starts), is_token.new_tensor(False))

    # Understanding

    def understanding(self, batch: UnderstandingBatch, transform: TokenTransform | None = None) -> BranchOutput:
        """Next-token cross entropy (nats) summed over answer tokens, given clean images.

        Raises:
            SettingsError: if images to read are to be noised, which is not part of this loss.
        """
        if self.config.training_time.understanding_min < 1:
            raise SettingsError(
                "training_time.understanding_min below 1 adds a flow loss to reading, which fine-tuning does not have: "
                "set it to 1, as in every official stage"
            )
        latents = self.encode_images(batch.pixel_values)
        scaled = _scaled(transform, self.config.grad_scale)
        hidden = self.read_sequence(batch.input_ids, latents, latents.new_ones(len(latents)), scaled)
        loss_sum, loss_count = text_loss(self.llm.lm_head, hidden.states, batch.labels)
        return self._output(loss_sum, loss_count, hidden, latents, batch)

    @torch.no_grad()
    def describe(
        self, pixel_values: Tensor, prompts: Sequence[str], max_new_tokens: int = 64, use_cache: bool = True
    ) -> list[str]:
        """Answer one prompt per image, greedily; prompts may differ in length, and each answer ends by itself."""
        noise = ImageNoise([0] * len(pixel_values), pixel_values.device)
        height, width = (side // self.config.autoencoder.stride for side in pixel_values.shape[2:])
        latents = self.encode_images(pixel_values, noise.normal(self.config.autoencoder.channels, height, width))
        ids, mask = self.processor.prompts_with_image(prompts, 1 + height * width // PATCH_SIZE**2)
        ids, mask = ids.to(latents.device), mask.to(latents.device)
        return self.processor.decode(answer(self, ids, mask, latents, max_new_tokens, use_cache))

    # Generation

    def generation(
        self, batch: GenerationBatch, transform: TokenTransform | None = None, draws: TrainingDraws | None = None
    ) -> BranchOutput:
        """Squared error of the velocity, summed over the channels of image tokens."""
        clean = self.encode_images(batch.pixel_values)
        path = self._noisy(clean, draws)
        hidden = self.read_sequence(batch.input_ids, path.noisy, path.time, transform)
        loss_sum, loss_count = self.flow_loss(hidden, path.velocity)
        return self._output(loss_sum, loss_count, hidden, clean, batch, path.time)

    def reconstruction(
        self,
        batch: GenerationBatch,
        config: ReconstructionConfig,
        reading: TokenTransform | None = None,
        drawing: TokenTransform | None = None,
        templates: TemplateDraws | None = None,
        draws: TrainingDraws | None = None,
    ) -> ReconstructionOutput:
        """Squared error of the velocity, over the drawn image only, given the fused tokens of its clean copy.

        There is no official form for Show-o2: this is Show-o's, with a smaller copy, because both images would
        otherwise lie in one latent space at one size, where copying is easiest.
        """
        config = config.over(self.reconstruction_defaults)
        clean = self.encode_images(batch.pixel_values)
        copies = condition_pixels(batch.pixel_values, config, self.config.token_pixels)
        shown = clean if copies is batch.pixel_values else self.encode_images(copies)
        requests = choose_templates(draw_templates(len(clean)) if templates is None else templates, config)
        slots = (1 + latents.shape[2] * latents.shape[3] // PATCH_SIZE**2 for latents in (shown, clean))
        ids, _ = self.processor.prompts_to_reconstruct(requests, *slots)
        path = self._noisy(clean, draws)
        with graph_unless_stopped(config.gradient_scale):
            condition = self.encoder(shown)
            seen = _scaled(reading, config.gradient_scale)(condition.tokens)
        hidden = self.read_pair(ids.to(clean.device), seen, path.noisy, path.time, drawing)
        is_drawn = torch.tensor([False, True], device=clean.device).repeat(len(clean))
        loss_sum, loss_count = self._velocity_error(hidden, path.velocity, is_drawn)
        losses = [loss for loss in (condition.loss, hidden.shared.loss) if loss is not None]
        return ReconstructionOutput(loss_sum, loss_count, torch.stack(losses).mean() if losses else None)

    def read_pair(
        self,
        input_ids: Tensor,
        condition: Tensor,
        latents: Tensor,
        time: Tensor,
        transform: TokenTransform | None = None,
    ) -> Hidden:
        """Run the language model over text with two images: tokens (B, N, D) of a clean one, then noisy latents."""
        regions = find_regions(input_ids)
        shared = self.encoder(latents)
        times = self.time_embed(torch.stack([torch.ones_like(time), time], dim=1).flatten())
        as_tokens = self.time_to_token(times)
        embeds = insert_images(self._embed_text(input_ids), regions[:, :1], as_tokens[0::2], condition)
        seen = shared.tokens if transform is None else transform(shared.tokens)
        embeds = insert_images(embeds, regions[:, 1:], as_tokens[1::2], seen)
        return self._read(embeds, regions, shared, times)

    def _noisy(self, clean: Tensor, draws: TrainingDraws | None) -> NoisyPath:
        draws = draw_training(clean.shape, clean.device) if draws is None else draws
        tokens_per_image = clean.shape[2] * clean.shape[3] // PATCH_SIZE**2 + 1
        time = training_time(draws.normal, 0.0, tokens_per_image if self.config.training_time.shifted else None)
        return NoisyPath(*on_path(clean, draws.noise, time), time)

    def flow_loss(self, hidden: Hidden, velocity: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Squared error summed over (token, channel), and their number.

        Args:
            velocity: (n, C, 2 gh, 2 gw): the targets.
            counted: (n,) bool: images that count; default: all.
        """
        counted = torch.ones(len(velocity), dtype=torch.bool, device=velocity.device) if counted is None else counted
        present = counted & (hidden.regions[..., 1].flatten() > 0)
        return self._velocity_error(hidden, velocity[present], counted)

    def _velocity_error(self, hidden: Hidden, velocity: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """As `flow_loss`, with the targets of the images that count alone."""
        taken = self.token_positions(hidden) & counted[hidden.image.clamp(min=0)]
        error = self.velocities(hidden)[taken].float() - to_runs(velocity).flatten(0, 1)
        return error.square().sum(), torch.tensor(error.numel(), device=error.device)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        drawing: DrawingConfig | None = None,
        image_size: Grid | None = None,
        progress: Callable[[int, int], None] | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Draw one image per prompt; `drawing` has iterations, guidance and time shift."""
        device = next(self.parameters()).device
        drawing = self.config.drawing if drawing is None else drawing
        grid = self.grid_of(*(image_size or (self.config.image_size, self.config.image_size)))
        ids, _ = self.processor.prompts_to_draw(prompts, drawing.guidance != 1.0, 1 + grid[0] * grid[1])
        noise = ImageNoise([seed + offset for offset in range(len(prompts))], device)
        start = noise.normal(self.config.autoencoder.channels, PATCH_SIZE * grid[0], PATCH_SIZE * grid[1])
        latents = draw_latents(self, ids.to(device), start, drawing, use_cache, progress)
        return self.decode_images(latents).clamp(-1, 1)

    # Training and checkpoints

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Matrices and tables; the official recipe decays nothing at all, by a rate of 0."""
        return parameter.ndim > 1

    def official_weights(self) -> dict[str, dict[str, Tensor]]:
        """`showo2`: the official model; `wan_vae`, unless it has no weights; `quantiser`, if there is one."""
        weights = {"showo2": self._keys.to_official(self._own_weights())}
        if not isinstance(self.autoencoder, BlockTransform):
            weights["wan_vae"] = self._autoencoder_keys.to_official(self.autoencoder.network.state_dict())
        if self.encoder.quantiser is not None:
            weights["quantiser"] = self.encoder.quantiser.state_dict()
        return weights

    def load_official_weights(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Load the official model; CheckpointError names what does not fit."""
        self.load_state_dict(self._keys.from_official(weights, self._own_weights(), source), strict=False)

    def load_autoencoder_weights(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Load the Wan VAE; CheckpointError names what does not fit."""
        network = self.autoencoder.network
        network.load_state_dict(self._autoencoder_keys.from_official(weights, network.state_dict(), source))

    def load_quantiser_weights(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Load the quantiser; CheckpointError names what does not fit."""
        own = self.encoder.quantiser.state_dict()
        self.encoder.quantiser.load_state_dict(KeyMap(renames=()).from_official(weights, own, source))

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of all three transformers in the backward pass."""
        self.encoder.activation_checkpointing = enabled
        self.diffusion_head.activation_checkpointing = enabled
        if enabled:
            self.llm.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.llm.activation_checkpointing_disable()

    def grid_of(self, height: int, width: int) -> Grid:
        """The token grid of an image size in pixels; SettingsError if it is not a whole number of tokens."""
        return token_grid(height, width, self.config.token_pixels)

    def _output(
        self,
        loss_sum: Tensor,
        loss_count: Tensor,
        hidden: Hidden,
        clean: Tensor,
        batch: UnderstandingBatch | GenerationBatch,
        time: Tensor | None = None,
    ) -> BranchOutput:
        grid = (clean.shape[2] // PATCH_SIZE, clean.shape[3] // PATCH_SIZE)
        tokens = hidden.shared.tokens
        index = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        draws = time is not None
        return BranchOutput(
            loss_sum,
            loss_count,
            tokens,
            index,
            TokenLayout(0, grid),
            batch.text,
            self.llm.get_input_embeddings(),
            # The objective's decoder predicts what a token has seen: its own 2x2 patch.
            F.unfold(clean, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2) if draws else None,
            grid if draws else None,
            time,
            self._codes(hidden.shared),
        )

    def _codes(self, shared: SharedTokens) -> TokenCodes | None:
        if shared.codes is None:
            return None
        return TokenCodes(shared.codes, self.config.quantiser.num_codes, shared.loss)

    @property
    def _keys(self) -> KeyMap:
        return showo2_keys(self.config.llm.tie_word_embeddings)

    @property
    def _autoencoder_keys(self) -> KeyMap:
        config = self.config.autoencoder
        return wan_keys(len(config.width_multipliers), config.blocks_per_level)

    def _own_weights(self) -> dict[str, Tensor]:
        others = ("autoencoder.", "encoder.quantiser.")
        return {name: value for name, value in self.state_dict().items() if not name.startswith(others)}


def _scaled(transform: TokenTransform | None, scale: float | None) -> TokenTransform:
    return lambda tokens: scale_gradient(tokens if transform is None else transform(tokens), scale)


def _projection(width_in: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, width_out), nn.GELU(), nn.Linear(width_out, width_out))
