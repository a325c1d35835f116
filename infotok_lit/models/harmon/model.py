"""Harmon: one MAR encoder for understanding and generation around a causal language model (Wu et al. 2025,
arXiv 2503.21979).

Shapes: B batch, T text length, L = h*w places, R buffers, K visible places, C token channels, D encoder width,
E decoder width, H language-model width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from infotok_lit.batch import (
    BranchOutput,
    GenerationBatch,
    PairedText,
    ReconstructionOutput,
    Tokenizer,
)
from infotok_lit.checkpoints import KeyMap, OfficialPart
from infotok_lit.models.common.autoencoders import build_autoencoder, from_tokens, kl16_keys, to_tokens
from infotok_lit.models.common.channel import Channel
from infotok_lit.models.common.language_model import (
    CAUSAL,
    build_language_model,
    compact_positions,
    followed_by_ones,
    places_where,
    read_after_text,
    take_rows,
)
from infotok_lit.models.common.model_config import Grid
from infotok_lit.models.common.reconstruction import ReconstructionInputs, graph_unless_stopped, scale_gradient
from infotok_lit.models.common.sampling import DrawingOptions, ImageNoise, is_guided
from infotok_lit.models.harmon.diffusion import TokenDiffusion, make_schedule, respaced_timesteps
from infotok_lit.models.harmon.family import HarmonConfig
from infotok_lit.models.harmon.mar import MARDecoder, MAREncoder, with_buffers
from infotok_lit.models.harmon.processor import HarmonProcessor
from infotok_lit.models.harmon.sampling import (
    Draw,
    RandomNumbers,
    draw_num_hidden,
    random_numbers,
    sample_image_tokens,
    sample_tokens,
    solve_tokens,
)
from infotok_lit.models.reading import TokenTransform, transformed
from infotok_lit.models.unified import UnifiedModel

KEYS = KeyMap(
    renames=(
        (r"^encoder\.token_embed\.", r"mar.z_proj."),
        (r"^encoder\.buffer_token$", r"mar.fake_latent"),
        (r"^encoder\.positions$", r"mar.encoder_pos_embed_learned"),
        (r"^encoder\.input_norm\.", r"mar.z_proj_ln."),
        (r"^(encoder|decoder)\.transformer\.(blocks|norm)\.", r"mar.\1_\2."),
        (r"^decoder\.embed\.", r"mar.decoder_embed."),
        (r"^decoder\.mask_token$", r"mar.mask_token"),
        (r"^decoder\.positions$", r"mar.decoder_pos_embed_learned"),
        (r"^decoder\.diffusion_positions$", r"mar.diffusion_pos_embed_learned"),
        (r"^class_table$", r"mar.class_emb.weight"),
        (r"^token_diffusion\.time_embed\.", r"mar.diffloss.net.time_embed.mlp."),
        (r"^token_diffusion\.condition_embed\.", r"mar.diffloss.net.cond_embed."),
        (r"^token_diffusion\.input_embed\.", r"mar.diffloss.net.input_proj."),
        (r"^token_diffusion\.blocks\.(\d+)\.norm\.", r"mar.diffloss.net.res_blocks.\1.in_ln."),
        (r"^token_diffusion\.blocks\.(\d+)\.mlp\.", r"mar.diffloss.net.res_blocks.\1.mlp."),
        (r"^token_diffusion\.blocks\.(\d+)\.modulation\.", r"mar.diffloss.net.res_blocks.\1.adaLN_modulation.1."),
        (r"^token_diffusion\.output_modulation\.", r"mar.diffloss.net.final_layer.adaLN_modulation.1."),
        (r"^token_diffusion\.output\.", r"mar.diffloss.net.final_layer.linear."),
        (r"^project_(in|out)\.", r"proj_\1."),
    ),
    tied=(("llm.lm_head.weight", "llm.model.embed_tokens.weight"),),
)
"""Our names -> those of the official `harmon_*.pth`, which holds everything but the autoencoder."""
PARTS = ("encoder", "decoder", "token_diffusion", "project_in", "project_out", "llm")


class Harmon(UnifiedModel):
    """The whole model; weights are fresh until a checkpoint is loaded."""

    family = "harmon"

    def __init__(self, config: HarmonConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, HarmonProcessor(config, tokenizer))
        mar, width = config.mar, config.llm.hidden_size
        # Refused here if they are none, rather than when the first image is drawn.
        respaced_timesteps(mar.sampling_steps)
        self.autoencoder = build_autoencoder(config.autoencoder)
        self.latent_width = config.autoencoder.channels * mar.patch_size**2
        self.token_widths = {"understanding": mar.encoder_width, "generation": mar.encoder_width}
        self.num_extras = {"understanding": mar.num_buffers, "generation": mar.num_buffers}
        self.parts = {name: (f"{name}.",) for name in PARTS}
        channel = Channel(config.capacity_bits, self.processor.num_image_tokens, mar.encoder_width)
        self.encoder = MAREncoder(mar, channel, self.latent_width)
        self.decoder = MARDecoder(mar)
        self.token_diffusion = TokenDiffusion(
            self.latent_width, mar.decoder_width, mar.diffusion_width, mar.diffusion_depth
        )
        self.project_in = _projection(mar.encoder_width, width, width)
        self.project_out = _projection(width, width, mar.encoder_width)
        self.llm = build_language_model(config.llm)
        # Official checkpoints carry MAR's class table, which nothing reads: kept so that files match, never trained.
        self.register_buffer("class_table", 0.02 * torch.randn(mar.num_classes, mar.encoder_width))

    # Understanding

    def latent_tokens(self, pixel_values: Tensor, encoded: Tensor | None = None) -> tuple[Tensor, Grid]:
        """(B, 3, height, width) in [-1, 1] -> scaled latents as tokens (B, L, C), and their grid."""
        grid = self.grid_of(*pixel_values.shape[2:])
        if len(pixel_values) == 0:
            return pixel_values.new_zeros(0, grid[0] * grid[1], self.latent_width), grid
        return to_tokens(self.encode_images(pixel_values, encoded), self.config.mar.patch_size)

    def understood_tokens(self, pixel_values: Tensor, encoded: Tensor | None = None) -> Tensor:
        """(B, 3, height, width) in [-1, 1] -> buffers and the tokens of the whole image (B, R + L, D)."""
        return self.encoder(*self.latent_tokens(pixel_values, encoded))

    def project_for_llm(self, tokens: Tensor, transform: TokenTransform | None = None) -> Tensor:
        """Shared tokens (B, R + L, D) -> what the language model reads, (B, L + R, H), buffers last."""
        return self.reading_order(self.project_in(transformed(tokens, transform)))

    def reading_order(self, places: Tensor) -> Tensor:
        """(B, R + L, ...) -> the same with the buffers last."""
        buffers = self.config.mar.num_buffers
        return torch.cat([places[:, buffers:], places[:, :buffers]], dim=1)

    @property
    def adjust_logits(self) -> LogitsProcessorList:
        """The repetition penalty."""
        # Not by generate's own `repetition_penalty`: it spares as many answer tokens as a row has padding.
        return LogitsProcessorList([RepetitionPenaltyLogitsProcessor(self.config.repetition_penalty)])

    # Generation

    def generation(
        self, batch: GenerationBatch, transform: TokenTransform | None = None, random: RandomNumbers | None = None
    ) -> BranchOutput:
        """Token diffusion loss summed over hidden tokens and noise draws (squared error plus bits of the bound)."""
        latents, grid = self.latent_tokens(batch.pixel_values, batch.encoded)
        prompt = (self.text_embedding(batch.input_ids), batch.attention_mask)
        return self.predict_hidden(latents, grid, *prompt, batch.text, transform, random)

    def reconstruct(self, batch: GenerationBatch, inputs: ReconstructionInputs) -> ReconstructionOutput:
        """Token diffusion loss given the shared tokens of the whole image; the gradient is scaled after projection."""
        latents, grid = self.latent_tokens(batch.pixel_values, batch.encoded)
        shown = (latents, grid) if inputs.copies is batch.pixel_values else self.latent_tokens(inputs.copies)
        with graph_unless_stopped(inputs.gradient_scale):
            visual = self.project_for_llm(self.encoder(*shown), inputs.understood_transform)
            visual = scale_gradient(visual, inputs.gradient_scale)
        ids, mask = self.processor.reconstruction_prompts(inputs.requests, num_image_tokens=visual.shape[1])
        prompt = (self.embed_with_images(ids.to(visual.device), visual), mask.to(visual.device))
        output = self.predict_hidden(latents, grid, *prompt, batch.text, inputs.generated_transform, inputs.random)
        return ReconstructionOutput(output.loss_sum, output.loss_count)

    def predict_hidden(
        self,
        latents: Tensor,
        grid: Grid,
        prompt: Tensor,
        attention_mask: Tensor,
        text: PairedText,
        transform: TokenTransform | None = None,
        random: RandomNumbers | None = None,
    ) -> BranchOutput:
        """The loss of hidden latents (B, L, C), given the others and right-padded embeddings (B, T, H) of prompts."""
        if random is None:
            random = self.random_numbers(*latents.shape[:2], latents.device)
        copies, places = self.config.mar.noise_draws, latents.shape[1]
        num_hidden = len(random.timesteps) // (copies * len(latents))
        visible = places_where(~random.hidden, places - num_hidden)
        hidden = places_where(random.hidden, num_hidden)
        tokens = self.encoder(latents, grid, visible)
        conditioned = self.condition_on(transformed(tokens, transform), prompt, attention_mask)
        z = self.decoder(conditioned, grid, visible)
        targets, conditions = (take_rows(x, hidden).flatten(0, 1).repeat(copies, 1) for x in (latents, z))
        squared_error, bound = self.token_diffusion.losses(targets, conditions, random.timesteps, random.noise)
        loss = (squared_error.sum() + bound.sum(), random.timesteps.new_full((), len(bound)))
        index = with_buffers(visible, self.config.mar.num_buffers)
        return self.branch_output(
            "generation", loss, tokens, text, grid, token_index=index, latents=latents, latent_grid=grid
        )

    def random_numbers(self, batch: int, places: int, device: torch.device) -> RandomNumbers:
        """The randomness of one generation loss."""
        return random_numbers(batch, places, self.latent_width, self.config.mar, device)

    def drawn_elements(self, images: int, grid: Grid, generator: torch.Generator) -> int:
        """As many as there are hidden tokens and noise draws."""
        return self.config.mar.noise_draws * images * draw_num_hidden(grid[0] * grid[1], self.config.mar, generator)

    def condition_on(self, tokens: Tensor, text: Tensor, attention_mask: Tensor) -> Tensor:
        """Add the language model's correction, given right-padded text (B, T, H), to shared tokens (B, R + K, D)."""
        visual = self.project_for_llm(tokens)
        return self._add_correction(tokens, read_after_text(self.llm.model, text, attention_mask, visual))

    def text_cache(self, input_ids: Tensor) -> DynamicCache:
        """Keys and values of right-padded prompts: text comes first and attends causally, so they never change."""
        cache = DynamicCache(config=self.llm.config)
        embeds = self.text_embedding(input_ids)
        self.llm.model(inputs_embeds=embeds, attention_mask=CAUSAL, past_key_values=cache, use_cache=True)
        return cache

    def condition_on_cache(self, tokens: Tensor, cache: DynamicCache, attention_mask: Tensor) -> Tensor:
        """`condition_on` with the prompts' keys and values already computed; leaves the cache as it was."""
        visual = self.project_for_llm(tokens)
        count = visual.shape[1]
        real = followed_by_ones(attention_mask, count)
        # Made here, once for all layers: transformers would read a mask of two dimensions back to simplify it.
        earlier = real.new_ones(count, real.shape[1]).tril(attention_mask.shape[1])
        hidden = self.llm.model(
            inputs_embeds=visual,
            attention_mask=real[:, None, None] & earlier,
            position_ids=compact_positions(real)[:, -count:],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        cache.crop(-count)
        return self._add_correction(tokens, hidden)

    def sample(self, prompts: Sequence[str], noise: ImageNoise, options: DrawingOptions) -> Tensor:
        """Images of prompts by the MAR loop."""
        ids, mask = self.processor.generation_prompts(prompts, "" if is_guided(options.sampling.scale) else None)
        tokens = self.sample_latents(ids.to(noise.device), mask.to(noise.device), noise, options)
        return self.decode_images(from_tokens(tokens, options.grid, self.config.mar.patch_size))

    def sample_latents(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        noise: ImageNoise,
        options: DrawingOptions,
        respacing: str | None = None,
    ) -> Tensor:
        """Scaled latent tokens (B, L, C) of texts; under guidance the second half of these is unconditional."""
        sampling, grid, progress, use_cache = options
        cache = self.text_cache(input_ids) if use_cache else None
        schedule = make_schedule(respacing or self.config.mar.sampling_steps)
        denoiser = self.token_diffusion.recorded() if use_cache else None

        def condition(tokens: Tensor, visible: Tensor) -> Tensor:
            # The unconditional half sees the same tokens, so that both are encoded once.
            copies = len(input_ids) // len(tokens)
            encoded = self.encoder(tokens, grid, visible).repeat(copies, 1, 1)
            if cache is None:
                conditioned = self.condition_on(encoded, self.text_embedding(input_ids), attention_mask)
            else:
                conditioned = self.condition_on_cache(encoded, cache, attention_mask)
            return self.decoder(conditioned, grid, visible.repeat(copies, 1))

        def sample(z: Tensor, draw: Draw, guidance: float) -> Tensor:
            network = self.token_diffusion.given(z, denoiser)
            if sampling.solver_steps:
                return solve_tokens(network, draw, sampling.solver_steps, guidance)
            return sample_tokens(network, draw, schedule, sampling.temperature, guidance)

        return sample_image_tokens(condition, sample, noise, grid, self.latent_width, sampling, progress)

    # Training and checkpoints

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """The official recipe decays matrices and tables, but no bias, norm, or anything of the diffusion head."""
        return parameter.ndim > 1 and not name.endswith(".bias") and not name.startswith("token_diffusion.")

    @property
    def official_parts(self) -> Mapping[str, OfficialPart]:
        """`harmon`: everything but the autoencoder; `kl16`: that, whose official file may hold a discriminator."""
        keys = KEYS if self.config.llm.tie_word_embeddings else replace(KEYS, tied=())
        return {
            "harmon": OfficialPart((*(f"{name}." for name in PARTS), "class_table"), keys),
            "kl16": OfficialPart(("autoencoder.",), kl16_keys(self.config.autoencoder.num_levels), may_hold_more=True),
        }

    def _add_correction(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        places = hidden.shape[1] - self.config.mar.num_buffers
        return tokens + self.project_out(torch.cat([hidden[:, places:], hidden[:, :places]], dim=1))


def _projection(width_in: int, width_hidden: int, width_out: int) -> nn.Sequential:
    """The maps between visual tokens and the language model."""
    return nn.Sequential(nn.Linear(width_in, width_hidden), nn.SiLU(), nn.Linear(width_hidden, width_out))
