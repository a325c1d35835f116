"""OpenUni: a vision-language model reads; meta queries through it, and a connector, tell a diffusion transformer what
to draw (Wu et al. 2025, arXiv 2505.23661).

Shapes: B batch, T text length, N image tokens, Q queries, C latent channels, H language-model width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infotok_lit.batch import BranchOutput, GenerationBatch, ReconstructionOutput, TokenLayout, UnderstandingBatch
from infotok_lit.checkpoints import KeyMap
from infotok_lit.models.common.block_transform import BlockTransform
from infotok_lit.models.common.image_noise import ImageNoise
from infotok_lit.models.common.language_model import embed_with_images, text_loss
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
from infotok_lit.models.openuni.autoencoder import build_autoencoder
from infotok_lit.models.openuni.config import DiffusionTransformerConfig, DrawingConfig, OpenUniConfig
from infotok_lit.models.openuni.connector import after_connector, before_connector, build_connector, build_projector
from infotok_lit.models.openuni.drawing import sana_timestep, walk
from infotok_lit.models.openuni.flow import TrainingDraws, add_noise, draw_training, timesteps_of
from infotok_lit.models.openuni.keys import vlm_from_official, vlm_to_official
from infotok_lit.models.openuni.processor import KEEP_PROMPT, OpenUniProcessor
from infotok_lit.models.openuni.vlm import build_vlm, image_tokens, read_queries
from infotok_lit.models.unified import TokenTransform, UnifiedModel

OWN_PARTS = ("meta_queries", "connector.", "projector.", "transformer.")
"""Prefixes of what an OpenUni checkpoint holds; vision-language model and autoencoder have files of their own."""

MAX_INSTRUCTION = 2048
"""Tokens of an instruction about an image, the image's included."""
TRAINED_PARTS = {
    "vision_tower": ("vlm.model.vision_tower.",),
    "vision_projector": ("vlm.model.multi_modal_projector.",),
    "language_model": ("vlm.model.language_model.", "vlm.lm_head."),
    "meta_queries": ("meta_queries",),
    "connector": ("connector.",),
    "projector": ("projector.",),
    "transformer": ("transformer.",),
}


@dataclass(frozen=True)
class Condition:
    """What meta queries make of a text."""

    tokens: Tensor
    """(B, Q, W): the connector's output, before any transform: the shared tokens of generation."""
    condition: Tensor
    """(B, Q, D): what the diffusion transformer attends to."""


class OpenUni(UnifiedModel):
    """The whole model; weights are fresh until a checkpoint is loaded."""

    family = "openuni"
    title = OpenUniConfig.title
    reconstruction_defaults = ReconstructionConfig(condition="same_res", gradient_scale=0.0, template_swap=0.0)

    def __init__(self, config: OpenUniConfig, processor: OpenUniProcessor) -> None:
        super().__init__()
        self.config = config
        self.processor = processor
        width, connector = config.llm.hidden_size, config.connector
        self.token_widths = {"understanding": width, "generation": connector.width}
        self.num_extras = {"understanding": 0, "generation": config.num_queries}
        self.latent_width = config.autoencoder.channels
        self.text_width = width
        self.parts = TRAINED_PARTS
        drawing = ("language_model", "meta_queries", "connector")
        before = () if connector.order == "connector_first" else ("projector",)
        self.token_parts = {"understanding": ("vision_tower", "vision_projector"), "generation": (*drawing, *before)}
        self.autoencoder = build_autoencoder(config.autoencoder)
        self.vlm = build_vlm(config.vision, config.llm)
        self.meta_queries = nn.Parameter(torch.randn(config.num_queries, width) / width**0.5)
        self.connector = build_connector(connector)
        self.projector = build_projector(connector, width, config.transformer.caption_width)
        self.transformer = build_transformer(config.transformer, config.autoencoder.channels)
        self.connector_checkpointing = False

    @property
    def official_aliases(self) -> tuple[str, ...]:
        """No official tensor repeats another."""
        return ()

    # Latents

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, height, width) in [-1, 1] -> scaled latents (B, C, h, w)."""
        self.grid_of(*pixel_values.shape[2:])
        return self.autoencoder.encode(pixel_values) * self.config.latent_scale

    @torch.no_grad()
    def decode_images(self, latents: Tensor) -> Tensor:
        """Scaled latents -> images (B, 3, height, width), not clamped."""
        return self.autoencoder.decode(latents / self.config.latent_scale)

    # Understanding

    def read_images(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, height, width) in [-1, 1] -> projected tokens of the vision tower (B, N, H)."""
        return image_tokens(self.vlm, pixel_values, self.config.vision.image_size)

    def embed_with_images(self, input_ids: Tensor, tokens: Tensor) -> Tensor:
        """Embeddings (B, T, H) of ids whose image slots are filled with tokens (B, N, H), in order."""
        return embed_with_images(self._embeddings, input_ids, tokens)

    def understanding(self, batch: UnderstandingBatch, transform: TokenTransform | None = None) -> BranchOutput:
        """Next-token cross entropy (nats) summed over answer tokens; the head runs on those positions alone."""
        tokens = self.read_images(batch.pixel_values)
        seen = scale_gradient(tokens if transform is None else transform(tokens), self.config.grad_scale)
        embeds = self.embed_with_images(batch.input_ids, seen)
        body = self.vlm.model.language_model
        hidden = body(inputs_embeds=embeds, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state
        loss_sum, loss_count = text_loss(self.vlm.lm_head, hidden, batch.labels)
        side = self.config.vision.grid_side
        return BranchOutput(
            loss_sum, loss_count, tokens, _places(tokens), TokenLayout(0, (side, side)), batch.text, self._embeddings
        )

    @torch.no_grad()
    def describe(
        self, pixel_values: Tensor, prompts: Sequence[str], max_new_tokens: int = 64, use_cache: bool = True
    ) -> list[str]:
        """Answer one prompt per image, greedily; prompts may differ in length."""
        ids, mask = self.processor.prompts_with_image(prompts)
        embeds = self.embed_with_images(ids.to(pixel_values.device), self.read_images(pixel_values))
        return self.processor.decode(self.answer(embeds, mask.to(embeds.device), max_new_tokens, use_cache))

    def answer(self, embeds: Tensor, mask: Tensor, max_new_tokens: int, use_cache: bool = True) -> Tensor:
        """Greedy continuation ids (B, at most max_new_tokens) of left-padded embeddings (B, T, H)."""
        return self.vlm.generate(
            inputs_embeds=embeds,
            attention_mask=mask.long(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=use_cache,
            eos_token_id=self.processor.end_id,
            pad_token_id=self.processor.pad_id,
        )

    # Generation

    def condition_on(
        self, embeds: Tensor, attention_mask: Tensor, transform: TokenTransform | None = None
    ) -> Condition:
        """What the meta queries make of texts (B, T, H), padded on either side."""
        order = self.config.connector.order
        queries = read_queries(self.vlm, embeds, attention_mask, self.meta_queries)
        tokens = self._connect(before_connector(self.projector, order, queries))
        seen = tokens if transform is None else transform(tokens)
        return Condition(tokens, after_connector(self.projector, order, seen))

    def generation(
        self, batch: GenerationBatch, transform: TokenTransform | None = None, draws: TrainingDraws | None = None
    ) -> BranchOutput:
        """Squared error of the velocity, summed over latent numbers."""
        latents = self.encode_images(batch.pixel_values)
        condition = self.condition_on(self._embeddings(batch.input_ids), batch.attention_mask, transform)
        loss = self.flow_loss(latents, condition.condition, draws)
        return self._generation_output(loss, latents, condition, batch)

    def reconstruction(
        self,
        batch: GenerationBatch,
        config: ReconstructionConfig,
        reading: TokenTransform | None = None,
        drawing: TokenTransform | None = None,
        templates: TemplateDraws | None = None,
        draws: TrainingDraws | None = None,
    ) -> ReconstructionOutput:
        """Squared error of the velocity, given the vision tower's tokens of the image in the place of a prompt."""
        config = config.over(self.reconstruction_defaults)
        requests = choose_templates(draw_templates(len(batch.names)) if templates is None else templates, config)
        ids, mask = self.processor.prompts_to_reconstruct(requests)
        copies = condition_pixels(batch.pixel_values, config, self.config.autoencoder.stride)
        with graph_unless_stopped(config.gradient_scale):
            tokens = self.read_images(copies)
            seen = scale_gradient(tokens if reading is None else reading(tokens), config.gradient_scale)
        embeds = self.embed_with_images(ids.to(seen.device), seen)
        condition = self.condition_on(embeds, mask.to(seen.device), drawing)
        latents = self.encode_images(batch.pixel_values)
        loss = self.flow_loss(latents, condition.condition, draws)
        return ReconstructionOutput(loss, torch.tensor(latents.numel(), device=loss.device))

    def condition_on_images(
        self, input_ids: Tensor, attention_mask: Tensor, tokens: Tensor, max_length: int = MAX_INSTRUCTION
    ) -> Condition:
        """What the meta queries make of instructions (B, T) about one image each, read as tokens (B, N, H).

        Texts that are longer than `max_length` lose their start, as in the official code.
        """
        embeds = self.embed_with_images(input_ids, tokens)
        return self.condition_on(embeds[:, -max_length:], attention_mask[:, -max_length:])

    def redrawing_loss(
        self,
        batch: GenerationBatch,
        sources: Tensor,
        draws: TrainingDraws | None = None,
        max_length: int = MAX_INSTRUCTION,
        trains_reading: bool = False,
    ) -> Tensor:
        """Mean squared error of drawing `batch` given what the model understands of source images (B, 3, h, w).

        Args:
            batch: images to draw, and instructions with slots for the sources' tokens (`prompts_to_redraw`).
            trains_reading: let the loss reach what reads the sources; the official code does not.
        """
        with torch.set_grad_enabled(trains_reading and torch.is_grad_enabled()):
            tokens = self.read_images(sources)
        condition = self.condition_on_images(batch.input_ids, batch.attention_mask, tokens, max_length)
        latents = self.encode_images(batch.pixel_values)
        return self.flow_loss(latents, condition.condition, draws) / latents.numel()

    def flow_loss(self, latents: Tensor, condition: Tensor, draws: TrainingDraws | None = None) -> Tensor:
        """Squared error of the velocity (float32), summed over latents (B, C, h, w)."""
        draws = draw_training(latents.shape, latents.device) if draws is None else draws
        timesteps = timesteps_of(draws.uniform)
        predicted = self.velocity(add_noise(latents, draws.noise, timesteps), condition, timesteps)
        return (predicted.float() - (draws.noise - latents).float()).square().sum()

    def velocity(self, latents: Tensor, condition: Tensor, timesteps: Tensor) -> Tensor:
        """(B, C, h, w) at noise levels (B,) in thousandths -> noise minus image."""
        return self.transformer(latents, condition, timesteps, return_dict=False)[0]

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
        """Draw one image per prompt; a prompt is read once in any case, so `use_cache` changes nothing here."""
        drawing = self.config.drawing if drawing is None else drawing
        negative = drawing.negative_prompt if drawing.guidance > 1.0 else None
        ids, mask = self.processor.prompts_to_draw(prompts, negative)
        ids, mask = ids.to(self.meta_queries.device), mask.to(self.meta_queries.device)
        condition = self.condition_on(self._embeddings(ids), mask).condition
        return self._draw(condition, len(prompts), seed, drawing, image_size, progress)

    @torch.no_grad()
    def redraw(
        self, sources: Tensor, instructions: Sequence[str], seed: int = 0, drawing: DrawingConfig | None = None
    ) -> Tensor:
        """Draw images (B, 3, height, width) anew as instructions say, guided away from keeping them as they are.

        Like every picture, image i depends on its source and instruction and on seed + i alone.
        """
        drawing = self.config.drawing if drawing is None else drawing
        guided = drawing.guidance > 1.0
        texts = [*instructions, *[KEEP_PROMPT] * (len(instructions) if guided else 0)]
        ids, mask = self.processor.prompts_to_redraw(texts)
        tokens = self.read_images(sources)
        tokens = torch.cat([tokens, tokens]) if guided else tokens
        condition = self.condition_on_images(ids.to(tokens.device), mask.to(tokens.device), tokens).condition
        return self._draw(condition, len(instructions), seed, drawing, None, None)

    def draw_latents(
        self,
        condition: Tensor,
        start: Tensor,
        drawing: DrawingConfig,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Noise (b, C, h, w) -> latents; under guidance the second half of the conditions is unconditional."""

        def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
            copies = len(condition) // len(latents)
            repeated = latents.repeat(copies, 1, 1, 1).to(condition.dtype)
            return self.velocity(repeated, condition, sana_timestep(timestep, len(condition), latents.device))

        return walk(velocity, start, drawing, progress)[-1]

    def _draw(
        self,
        condition: Tensor,
        count: int,
        seed: int,
        drawing: DrawingConfig,
        image_size: Grid | None,
        progress: Callable[[int, int], None] | None,
    ) -> Tensor:
        grid = self.grid_of(*(image_size or (self.config.image_size, self.config.image_size)))
        noise = ImageNoise([seed + offset for offset in range(count)], condition.device)
        start = noise.normal(self.config.autoencoder.channels, *grid)
        latents = self.draw_latents(condition, start, drawing, progress)
        return self.decode_images(latents.to(condition.dtype)).clamp(-1, 1)

    # Training and checkpoints

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """The official recipe decays whatever has at least two axes."""
        return parameter.ndim > 1

    def official_weights(self) -> dict[str, dict[str, Tensor]]:
        """`openuni`: what its checkpoints hold; `internvl3`; `dc_ae`, unless it has no weights."""
        weights = {"openuni": self._own_weights(), "internvl3": vlm_to_official(self.vlm.state_dict())}
        if not isinstance(self.autoencoder, BlockTransform):
            weights["dc_ae"] = self.autoencoder.network.state_dict()
        return weights

    def load_own_weights(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Load queries, connector, projector and diffusion transformer; CheckpointError names what does not fit."""
        own = KeyMap(renames=()).from_official(weights, self._own_weights(), source)
        self.load_state_dict(own, strict=False)

    def load_vlm_weights(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Load the vision-language model; CheckpointError names what does not fit."""
        self.vlm.load_state_dict(vlm_from_official(weights, self.vlm.state_dict(), source))

    def load_autoencoder_weights(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Load the DC-AE; CheckpointError names what does not fit."""
        network = self.autoencoder.network
        network.load_state_dict(KeyMap(renames=()).from_official(weights, network.state_dict(), source))

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of all transformers in the backward pass."""
        self.connector_checkpointing = enabled
        if enabled:
            self.vlm.activation_checkpointing_enable({"use_reentrant": False})
            self.transformer.enable_gradient_checkpointing()
        else:
            self.vlm.activation_checkpointing_disable()
            self.transformer.disable_gradient_checkpointing()

    def grid_of(self, height: int, width: int) -> Grid:
        """The latent grid of an image size in pixels; SettingsError if it is not a whole number of latent positions."""
        return token_grid(height, width, self.config.autoencoder.stride)

    def _connect(self, queries: Tensor) -> Tensor:
        for layer in self.connector.layers:
            if self.connector_checkpointing and queries.requires_grad:
                queries = checkpoint(layer, queries, None, use_reentrant=False)
            else:
                queries = layer(queries, None)
        return queries

    @property
    def _embeddings(self) -> nn.Embedding:
        return self.vlm.get_input_embeddings()

    def _generation_output(
        self, loss: Tensor, latents: Tensor, condition: Condition, batch: GenerationBatch
    ) -> BranchOutput:
        return BranchOutput(
            loss,
            torch.tensor(latents.numel(), device=loss.device),
            condition.tokens,
            _places(condition.tokens),
            TokenLayout(self.config.num_queries, (0, 0)),
            batch.text,
            self._embeddings,
            latents.flatten(2).transpose(1, 2),
            (latents.shape[2], latents.shape[3]),
        )

    def _own_weights(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if name.startswith(OWN_PARTS)}


def build_transformer(config: DiffusionTransformerConfig, channels: int) -> SanaTransformer2DModel:
    """A SANA with fresh weights."""
    return SanaTransformer2DModel(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        num_layers=config.depth,
        num_cross_attention_heads=config.cross_heads,
        cross_attention_head_dim=config.cross_head_dim,
        cross_attention_dim=config.cross_heads * config.cross_head_dim,
        caption_channels=config.caption_width,
        mlp_ratio=config.mlp_ratio,
        sample_size=config.sample_size,
        patch_size=1,
        qk_norm=config.qk_norm,
    )


def _places(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
