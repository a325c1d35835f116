"""Harmon: one MAR encoder that both reads and draws, around a causal language model (Wu et al. 2025, arXiv 2503.21979).

Shapes: B batch, T text length, L = h*w places, R buffers, K visible places, C token channels, D encoder width,
E decoder width, H language-model width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from infotok_lit.batch import BranchOutput, GenerationBatch, ReconstructionOutput, TokenLayout, UnderstandingBatch
from infotok_lit.checkpoints import KeyMap
from infotok_lit.models.common.language_model import build_language_model, embed_with_images, text_loss
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
from infotok_lit.models.harmon.autoencoder import KL16, build_autoencoder, from_tokens, to_tokens
from infotok_lit.models.harmon.config import DrawingConfig, HarmonConfig
from infotok_lit.models.harmon.drawing import Noise, draw_tokens
from infotok_lit.models.harmon.draws import DrawingNoise, TrainingDraws, draw_training
from infotok_lit.models.harmon.keys import HARMON_KEYS, kl16_keys
from infotok_lit.models.harmon.language_model import (
    build_projection,
    compact_positions,
    followed_by_ones,
)
from infotok_lit.models.harmon.mar import MARDecoder, MAREncoder, places_where, with_buffers
from infotok_lit.models.harmon.processor import HarmonProcessor
from infotok_lit.models.harmon.token_diffusion import TokenDiffusion
from infotok_lit.models.unified import TokenTransform, UnifiedModel


class Drawn(NamedTuple):
    """The loss of drawing hidden tokens, and what it saw."""

    loss_sum: Tensor
    loss_count: Tensor
    tokens: Tensor
    """(B, R + K, D): the shared tokens of the visible places, before any transform."""
    visible: Tensor
    """(B, K)."""


class Harmon(UnifiedModel):
    """The whole model; weights are fresh until a checkpoint is loaded."""

    family = "harmon"
    title = HarmonConfig.title
    reconstruction_defaults = ReconstructionConfig(condition="same_res", gradient_scale=0.1, template_swap=0.1)
    official_aliases = ("llm.lm_head.weight",)

    def __init__(self, config: HarmonConfig, processor: HarmonProcessor) -> None:
        super().__init__()
        self.config = config
        self.processor = processor
        mar, llm = config.mar, config.llm
        self.autoencoder = build_autoencoder(config.autoencoder)
        self.latent_width = config.autoencoder.channels * mar.patch_size**2
        self.token_widths = {"understanding": mar.encoder_width, "generation": mar.encoder_width}
        self.text_width = llm.hidden_size
        self.num_extras = {"understanding": mar.num_buffers, "generation": mar.num_buffers}
        names = ("encoder", "decoder", "token_diffusion", "project_in", "project_out", "llm")
        self.parts = {name: (f"{name}.",) for name in names}
        self.token_parts = {"understanding": ("encoder",), "generation": ("encoder",)}
        self.encoder = MAREncoder(mar, self.latent_width)
        self.decoder = MARDecoder(mar)
        self.token_diffusion = TokenDiffusion(
            self.latent_width, mar.decoder_width, mar.diffusion_width, mar.diffusion_depth
        )
        self.project_in = build_projection(mar.encoder_width, llm.hidden_size, llm.hidden_size)
        self.project_out = build_projection(llm.hidden_size, llm.hidden_size, mar.encoder_width)
        self.llm = build_language_model(llm)
        # Official checkpoints carry MAR's class table, which nothing reads: kept so that files match, never trained.
        self.register_buffer("class_table", 0.02 * torch.randn(mar.num_classes, mar.encoder_width))

    # Latents

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Grid]:
        """(B, 3, height, width) in [-1, 1] -> scaled latent tokens (B, L, C) and their grid."""
        grid = self.grid_of(*pixel_values.shape[2:])
        if len(pixel_values) == 0:
            return pixel_values.new_zeros(0, grid[0] * grid[1], self.latent_width), grid
        latents = self.autoencoder.encode(pixel_values) * self.config.latent_scale
        return to_tokens(latents, self.config.mar.patch_size)

    @torch.no_grad()
    def decode_images(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Scaled latent tokens (B, L, C) -> images (B, 3, height, width), not clamped."""
        latents = from_tokens(tokens / self.config.latent_scale, grid, self.config.mar.patch_size)
        return self.autoencoder.decode(latents)

    # Understanding

    def understanding(self, batch: UnderstandingBatch, transform: TokenTransform | None = None) -> BranchOutput:
        """Next-token cross entropy (nats) summed over answer tokens; the head runs on those positions alone."""
        latents, grid = self.encode_images(batch.pixel_values)
        tokens = self.encoder(latents, grid)
        seen = scale_gradient(self.project_for_reading(tokens, transform), self.config.grad_scale)
        embeds = self.embed_with_images(batch.input_ids, seen)
        hidden = self.llm.model(inputs_embeds=embeds, attention_mask=batch.attention_mask).last_hidden_state
        loss_sum, loss_count = text_loss(self.llm.lm_head, hidden, batch.labels)
        index = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        return BranchOutput(
            loss_sum, loss_count, tokens, index, self._layout(grid), batch.text, self.llm.get_input_embeddings()
        )

    def project_for_reading(self, tokens: Tensor, transform: TokenTransform | None = None) -> Tensor:
        """Shared tokens (B, R + L, D) -> what the language model reads, (B, L + R, H), buffers last."""
        return self._buffers_last(self.project_in(tokens if transform is None else transform(tokens)))

    def embed_with_images(self, input_ids: Tensor, visual: Tensor) -> Tensor:
        """Embeddings (B, T, H) of ids whose image slots are filled with `visual`, in order."""
        return embed_with_images(self.llm.get_input_embeddings(), input_ids, visual)

    @torch.no_grad()
    def describe(
        self, pixel_values: Tensor, prompts: Sequence[str], max_new_tokens: int = 64, use_cache: bool = True
    ) -> list[str]:
        """Answer one prompt per image, greedily; prompts may differ in length."""
        latents, grid = self.encode_images(pixel_values)
        visual = self.project_for_reading(self.encoder(latents, grid))
        ids, mask = self.processor.prompts_with_image(prompts, num_image_tokens=visual.shape[1], pad_left=True)
        ids, mask = ids.to(visual.device), mask.to(visual.device)
        answer = self.answer(self.embed_with_images(ids, visual), mask, max_new_tokens, use_cache)
        return self.processor.decode(answer)

    def answer(self, embeds: Tensor, mask: Tensor, max_new_tokens: int, use_cache: bool = True) -> Tensor:
        """Greedy continuation ids (B, at most max_new_tokens) of left-padded embeddings (B, T, H)."""
        # Not by generate's own `repetition_penalty`: it spares as many answer tokens as a row has padding.
        penalty = RepetitionPenaltyLogitsProcessor(self.config.repetition_penalty)
        return self.llm.generate(
            inputs_embeds=embeds,
            attention_mask=mask.long(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=use_cache,
            logits_processor=LogitsProcessorList([penalty]),
            eos_token_id=self.processor.end_id,
            pad_token_id=self.processor.pad_id,
        )

    # Generation

    def generation(
        self, batch: GenerationBatch, transform: TokenTransform | None = None, draws: TrainingDraws | None = None
    ) -> BranchOutput:
        """Token diffusion loss summed over hidden tokens and noise draws (squared error plus bits of the bound)."""
        latents, grid = self.encode_images(batch.pixel_values)
        text = self.llm.get_input_embeddings()(batch.input_ids)
        drawn = self.draw_hidden(latents, grid, text, batch.attention_mask, transform, draws)
        return BranchOutput(
            drawn.loss_sum,
            drawn.loss_count,
            drawn.tokens,
            with_buffers(drawn.visible, self.config.mar.num_buffers),
            self._layout(grid),
            batch.text,
            self.llm.get_input_embeddings(),
            latents,
            grid,
        )

    def reconstruction(
        self,
        batch: GenerationBatch,
        config: ReconstructionConfig,
        reading: TokenTransform | None = None,
        drawing: TokenTransform | None = None,
        templates: TemplateDraws | None = None,
        draws: TrainingDraws | None = None,
    ) -> ReconstructionOutput:
        """Token diffusion loss given the shared tokens of the whole image; the gradient is scaled after projection."""
        config = config.over(self.reconstruction_defaults)
        latents, grid = self.encode_images(batch.pixel_values)
        copies = condition_pixels(batch.pixel_values, config, self.config.token_pixels)
        shown = (latents, grid) if copies is batch.pixel_values else self.encode_images(copies)
        with graph_unless_stopped(config.gradient_scale):
            visual = scale_gradient(self.project_for_reading(self.encoder(*shown), reading), config.gradient_scale)
        requests = choose_templates(draw_templates(len(latents)) if templates is None else templates, config)
        ids, mask = self.processor.prompts_to_reconstruct(requests, num_image_tokens=visual.shape[1])
        text = self.embed_with_images(ids.to(visual.device), visual)
        drawn = self.draw_hidden(latents, grid, text, mask.to(visual.device), drawing, draws)
        return ReconstructionOutput(drawn.loss_sum, drawn.loss_count)

    def draw_hidden(
        self,
        latents: Tensor,
        grid: Grid,
        text: Tensor,
        attention_mask: Tensor,
        transform: TokenTransform | None = None,
        draws: TrainingDraws | None = None,
    ) -> Drawn:
        """The loss of drawing hidden latents (B, L, C), given the others and right-padded embeddings (B, T, H)."""
        if draws is None:
            draws = self.draw(*latents.shape[:2], latents.device)
        visible = places_where(~draws.hidden)
        tokens = self.encoder(latents, grid, visible)
        conditioned = self.condition_on(tokens if transform is None else transform(tokens), text, attention_mask)
        z = self.decoder(conditioned, grid, visible)
        copies = self.config.mar.noise_draws
        squared_error, bound = self.token_diffusion.losses(
            latents[draws.hidden].repeat(copies, 1), z[draws.hidden].repeat(copies, 1), draws.timesteps, draws.noise
        )
        loss_sum = squared_error.sum() + bound.sum()
        return Drawn(loss_sum, torch.tensor(len(bound), device=bound.device), tokens, visible)

    def draw(self, batch: int, places: int, device: torch.device) -> TrainingDraws:
        """The randomness of one generation loss."""
        mar = self.config.mar
        return draw_training(
            batch, places, self.latent_width, mar.noise_draws, mar.mask_ratio_min, mar.mask_ratio_std, device
        )

    def condition_on_text(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Add the language model's correction, given right-padded text, to shared tokens (B, R + K, D)."""
        return self.condition_on(tokens, self.llm.get_input_embeddings()(input_ids), attention_mask)

    def condition_on(self, tokens: Tensor, text: Tensor, attention_mask: Tensor) -> Tensor:
        """`condition_on_text` with the text as embeddings (B, T, H)."""
        visual = self._buffers_last(self.project_in(tokens))
        mask = followed_by_ones(attention_mask, visual.shape[1])
        hidden = self.llm.model(
            inputs_embeds=torch.cat([text, visual.to(text.dtype)], dim=1),
            attention_mask=mask,
            position_ids=compact_positions(mask),
            use_cache=False,
        ).last_hidden_state
        return self._add_correction(tokens, hidden[:, text.shape[1] :])

    def text_cache(self, input_ids: Tensor, attention_mask: Tensor) -> DynamicCache:
        """Keys and values of the prompts: text comes first and attends causally, so they never change."""
        embeds = self.llm.get_input_embeddings()(input_ids)
        cache = DynamicCache(config=self.llm.config)
        self.llm.model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=compact_positions(attention_mask),
            past_key_values=cache,
            use_cache=True,
        )
        return cache

    def condition_on_cache(self, tokens: Tensor, cache: DynamicCache, attention_mask: Tensor) -> Tensor:
        """`condition_on_text` with the prompts' keys and values already computed; leaves the cache as it was."""
        visual = self._buffers_last(self.project_in(tokens))
        mask = followed_by_ones(attention_mask, visual.shape[1])
        hidden = self.llm.model(
            inputs_embeds=visual,
            attention_mask=mask,
            position_ids=compact_positions(mask)[:, -visual.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        cache.crop(-visual.shape[1])
        return self._add_correction(tokens, hidden)

    def _add_correction(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        buffers = self.config.mar.num_buffers
        places = hidden.shape[1] - buffers
        return tokens + self.project_out(torch.cat([hidden[:, places:], hidden[:, :places]], dim=1))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        drawing: DrawingConfig | None = None,
        image_size: tuple[int, int] | None = None,
        progress: Callable[[int, int], None] | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Draw one image per prompt; `drawing` has iterations, guidance and temperature."""
        device = self.encoder.positions.device
        drawing = self.config.drawing if drawing is None else drawing
        height, width = image_size or (self.config.image_size, self.config.image_size)
        grid = self.grid_of(height, width)
        ids, mask = self.processor.prompts_to_draw(prompts, unconditional=drawing.guidance != 1.0)
        noise = DrawingNoise([seed + offset for offset in range(len(prompts))], device)
        tokens = self.draw_latents(ids.to(device), mask.to(device), grid, noise, drawing, None, progress, use_cache)
        return self.decode_images(tokens, grid).clamp(-1, 1)

    def draw_latents(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        grid: Grid,
        noise: Noise,
        drawing: DrawingConfig,
        respacing: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Draw scaled latent tokens (B, L, C); under guidance the second half of the texts is unconditional."""
        cache = self.text_cache(input_ids, attention_mask) if use_cache else None

        def condition(tokens: Tensor, visible: Tensor) -> Tensor:
            encoded = self.encoder(tokens, grid, visible)
            if cache is None:
                return self.decoder(self.condition_on_text(encoded, input_ids, attention_mask), grid, visible)
            return self.decoder(self.condition_on_cache(encoded, cache, attention_mask), grid, visible)

        def sample(z: Tensor, initial: Tensor, step_noise: Callable[[int], Tensor], guidance: float) -> Tensor:
            steps = respacing or self.config.mar.sampling_steps
            return self.token_diffusion.sample(z, initial, step_noise, steps, drawing.temperature, guidance)

        return draw_tokens(condition, sample, noise, grid, self.latent_width, drawing, progress)

    # Training and checkpoints

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """The official recipe decays matrices and tables, but no bias, norm, or anything of the diffusion head."""
        return parameter.ndim > 1 and not name.endswith(".bias") and not name.startswith("token_diffusion.")

    def official_weights(self) -> dict[str, dict[str, Tensor]]:
        """`harmon`: everything but the autoencoder; `kl16`: the autoencoder, unless it has no weights."""
        weights = {"harmon": HARMON_KEYS.to_official(self._own_weights())}
        if isinstance(self.autoencoder, KL16):
            weights["kl16"] = self._autoencoder_keys.to_official(self.autoencoder.network.state_dict())
        return weights

    def load_official_weights(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Load everything but the autoencoder; CheckpointError names what does not fit."""
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("vae.")}
        own = HARMON_KEYS.from_official(weights, self._own_weights(), source)
        self.load_state_dict(own, strict=False)

    def load_autoencoder_weights(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Load the KL-16 autoencoder; official files may hold more than it needs (a discriminator), but not less."""
        own = self.autoencoder.network.state_dict()
        expected = {self._autoencoder_keys.official_name(name) for name in own}
        known = {name: tensor for name, tensor in weights.items() if name in expected}
        self.autoencoder.network.load_state_dict(self._autoencoder_keys.from_official(known, own, source))

    @property
    def _autoencoder_keys(self) -> KeyMap:
        return kl16_keys(len(self.config.autoencoder.width_multipliers))

    def _own_weights(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if not name.startswith("autoencoder.")}

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of MAR blocks and of the language model in the backward pass."""
        self.encoder.transformer.activation_checkpointing = enabled
        self.decoder.transformer.activation_checkpointing = enabled
        if enabled:
            self.llm.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.llm.activation_checkpointing_disable()

    def _buffers_last(self, x: Tensor) -> Tensor:
        buffers = self.config.mar.num_buffers
        return torch.cat([x[:, buffers:], x[:, :buffers]], dim=1)

    def _layout(self, grid: Grid) -> TokenLayout:
        return TokenLayout(self.config.mar.num_buffers, grid)

    def grid_of(self, height: int, width: int) -> Grid:
        """The token grid of an image size in pixels; SettingsError if it is not a whole number of tokens."""
        return token_grid(height, width, self.config.token_pixels)
