"""OpenUni: a vision-language model understands; meta queries through it, and a connector, tell a diffusion transformer
what to generate (Wu et al. 2025, arXiv 2505.23661).

Shapes: B batch, T text length, N image tokens, Q queries, C latent channels, H language-model width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from infotok_lit.batch import (
    BranchOutput,
    GenerationBatch,
    ReconstructionOutput,
    Tokenizer,
    UnderstandingBatch,
)
from infotok_lit.checkpoints import KeyMap, OfficialPart
from infotok_lit.errors import SettingsError
from infotok_lit.models.common.autoencoders import NETWORK, build_autoencoder, to_tokens
from infotok_lit.models.common.channel import Channel
from infotok_lit.models.common.language_model import read_after_text
from infotok_lit.models.common.model_config import Grid
from infotok_lit.models.common.reconstruction import (
    ReconstructionConfig,
    ReconstructionInputs,
    graph_unless_stopped,
    scale_gradient,
)
from infotok_lit.models.common.sampling import DrawingOptions, ImageNoise, Progress, is_guided
from infotok_lit.models.openuni.diffusion import (
    RandomNumbers,
    add_noise,
    around_connector,
    build_connector,
    build_projector,
    build_transformer,
    random_numbers,
    sana_timestep,
    timesteps_of,
    walk,
)
from infotok_lit.models.openuni.family import OpenUniConfig, SamplingConfig
from infotok_lit.models.openuni.processor import KEEP_PROMPT, OpenUniProcessor
from infotok_lit.models.openuni.vlm import VLM_KEYS, build_vlm, normalise
from infotok_lit.models.reading import TokenTransform, transformed
from infotok_lit.models.unified import UnifiedModel

PARTS = {
    "vision_tower": ("vlm.model.vision_tower.",),
    "vision_projector": ("vlm.model.multi_modal_projector.",),
    "language_model": ("vlm.model.language_model.", "vlm.lm_head."),
    "meta_queries": ("meta_queries",),
    "connector": ("connector.",),
    "projector": ("projector.",),
    "transformer": ("transformer.",),
}


class OpenUni(UnifiedModel):
    """The whole model; weights are fresh until a checkpoint is loaded."""

    family = "openuni"
    parts = PARTS
    understanding_prefixes = ("vlm.",)
    reconstruction_defaults = ReconstructionConfig(condition="same_res", gradient_scale=0.0, template_swap=0.0)

    def __init__(self, config: OpenUniConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, OpenUniProcessor(config, tokenizer))
        width, connector = config.llm.hidden_size, config.connector
        self.token_widths = {"understanding": width, "generation": connector.width}
        self.num_extras = {"understanding": 0, "generation": config.num_queries}
        self.latent_width = config.autoencoder.channels
        before = () if connector.order == "connector_first" else ("projector",)
        self.token_parts = {
            "understanding": ("vision_tower", "vision_projector"),
            "generation": ("language_model", "meta_queries", "connector", *before),
        }
        self.autoencoder = build_autoencoder(config.autoencoder)
        self.vlm = build_vlm(config.vision, config.llm)
        self.meta_queries = nn.Parameter(torch.randn(config.num_queries, width) / width**0.5)
        self.connector = build_connector(connector)
        self.projector = build_projector(connector, width, config.transformer.caption_width)
        bits, side = config.capacity_bits, config.vision.grid_side
        self.understanding_channel = Channel(bits, side**2, width)
        self.generation_channel = Channel(bits, config.num_queries, connector.width)
        self.transformer = build_transformer(config.transformer, config.autoencoder.channels)

    # Understanding

    def understood_tokens(self, pixel_values: Tensor, encoded: Tensor | None = None) -> Tensor:
        """(B, 3, height, width) in [-1, 1] -> projected tokens of the vision tower (B, N, H)."""
        pixels = normalise(pixel_values, self.config.vision.input_side)
        return self.understanding_channel(self.vlm.model.get_image_features(pixels, return_dict=True).pooler_output)

    def understood_grid(self, batch: UnderstandingBatch) -> Grid:
        """That of the vision tower, which stretches all images to its own size."""
        return self.config.vision.grid_side, self.config.vision.grid_side

    # Generation

    def condition_on(
        self, embeds: Tensor, attention_mask: Tensor, transform: TokenTransform | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the meta queries make of texts (B, T, H), padded on either side.

        Returns:
            The connector's output (B, Q, W), untransformed: the shared tokens of generation; and what the diffusion
            transformer attends to (B, Q, D).
        """
        asked = self.meta_queries.expand(len(embeds), -1, -1)
        queries = read_after_text(self.text_body, embeds, attention_mask, asked)
        before, after = around_connector(self.projector, self.config.connector.order)
        tokens = self.generation_channel(self.connector(before(queries)))
        return tokens, after(transformed(tokens, transform))

    def generation(
        self, batch: GenerationBatch, transform: TokenTransform | None = None, random: RandomNumbers | None = None
    ) -> BranchOutput:
        """Squared error of the velocity, summed over latent numbers."""
        latents, draws = self.encode_images(batch.pixel_values, batch.encoded), self.config.noise_draws
        drawn = latents.repeat_interleave(draws, dim=0)
        # Before the tokens, so that the noise of an inline bottleneck does not shift the model's own.
        random = random_numbers(drawn.shape, drawn.device, draws) if random is None else random
        prompt = self.text_embedding(batch.input_ids)
        tokens, condition = self.condition_on(prompt, batch.attention_mask, transform)
        loss = self.flow_loss(drawn, condition.repeat_interleave(draws, dim=0), random)
        targets, grid = to_tokens(latents, 1)
        return self.branch_output("generation", loss, tokens, batch.text, (0, 0), latents=targets, latent_grid=grid)

    def caption_nats(self, tokens: Tensor, output: BranchOutput, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """SettingsError: the queries read the prompt and no image, so a caption read from them would be an echo."""
        raise SettingsError(
            "captioning has no meaning for OpenUni: its generation tokens are made from the prompt alone and see no "
            "image, so their caption is the prompt again. Take captioning out of objective.terms, or train Harmon or "
            "Show-o2"
        )

    def reconstruct(self, batch: GenerationBatch, inputs: ReconstructionInputs) -> ReconstructionOutput:
        """Squared error of the velocity, given the vision tower's tokens of the image in the place of a prompt."""
        ids, mask = self.processor.reconstruction_prompts(inputs.requests)
        with graph_unless_stopped(inputs.gradient_scale):
            tokens = self.understood_tokens(inputs.copies)
            seen = scale_gradient(transformed(tokens, inputs.understood_transform), inputs.gradient_scale)
        embeds = self.embed_with_images(ids.to(seen.device), seen)
        _, condition = self.condition_on(embeds, mask.to(seen.device), inputs.generated_transform)
        latents = self.encode_images(batch.pixel_values, batch.encoded)
        return ReconstructionOutput(*self.flow_loss(latents, condition, inputs.random))

    def flow_loss(
        self, latents: Tensor, condition: Tensor, random: RandomNumbers | None = None
    ) -> tuple[Tensor, Tensor]:
        """Squared error of the velocity (float32), summed over latents (B, C, h, w), and their number."""
        random = random_numbers(latents.shape, latents.device) if random is None else random
        timesteps = timesteps_of(random.uniform, self.config.training_time_shift)
        predicted = self.velocity(add_noise(latents, random.noise, timesteps), condition, timesteps)
        loss = (predicted.float() - (random.noise - latents).float()).square().sum()
        return loss, loss.new_full((), latents.numel(), dtype=torch.int64)

    def velocity(self, latents: Tensor, condition: Tensor, timesteps: Tensor) -> Tensor:
        """(B, C, h, w) at noise levels (B,) in thousandths -> noise minus image."""
        return self.transformer(latents, condition, timesteps, return_dict=False)[0]

    def sample(self, prompts: Sequence[str], noise: ImageNoise, options: DrawingOptions) -> Tensor:
        """Images of prompts; a prompt is read once in any case, so `use_cache` changes nothing here."""
        negative = options.sampling.negative_prompt if is_guided(options.sampling.scale) else None
        ids, mask = self.processor.generation_prompts(prompts, negative)
        _, condition = self.condition_on(self.text_embedding(ids.to(noise.device)), mask.to(noise.device))
        return self._sample(condition, noise, options)

    def sample_latents(
        self, condition: Tensor, start: Tensor, sampling: SamplingConfig, progress: Progress | None = None
    ) -> Tensor:
        """Noise (b, C, h, w) -> latents; under guidance the second half of the conditions is unconditional."""

        def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
            copies = len(condition) // len(latents)
            repeated = latents.repeat(copies, 1, 1, 1).to(condition.dtype)
            return self.velocity(repeated, condition, sana_timestep(timestep, len(condition), latents.device))

        return walk(velocity, start, sampling, progress)

    # Editing

    def condition_on_images(
        self, input_ids: Tensor, attention_mask: Tensor, tokens: Tensor, max_length: int | None = None
    ) -> Tensor:
        """The condition (B, Q, D) of instructions (B, T) about one image each, understood as tokens (B, N, H).

        Texts that are longer than `max_length` (default: that of the configuration) lose their start, as in the
        official code.
        """
        length = self.config.max_length if max_length is None else max_length
        embeds = self.embed_with_images(input_ids, tokens)
        return self.condition_on(embeds[:, -length:], attention_mask[:, -length:])[1]

    def editing_loss(
        self,
        batch: GenerationBatch,
        sources: Tensor,
        random: RandomNumbers | None = None,
        max_length: int | None = None,
        trains_understanding: bool = False,
    ) -> Tensor:
        """Mean squared error of generating `batch` given what the model understands of source images (B, 3, h, w).

        Args:
            batch: images to generate, and instructions with slots for the sources' tokens (`editing_prompts`).
            trains_understanding: let the loss reach what understands the sources; the official code does not.
        """
        with torch.set_grad_enabled(trains_understanding and torch.is_grad_enabled()):
            tokens = self.understood_tokens(sources)
        condition = self.condition_on_images(batch.input_ids, batch.attention_mask, tokens, max_length)
        latents = self.encode_images(batch.pixel_values, batch.encoded)
        loss_sum, loss_count = self.flow_loss(latents, condition, random)
        return loss_sum / loss_count

    @torch.no_grad()
    def edit(
        self, sources: Tensor, instructions: Sequence[str], seed: int = 0, sampling: SamplingConfig | None = None
    ) -> Tensor:
        """Generate images (B, 3, height, width) anew as instructions say, guided away from keeping them as they are.

        Image i depends on its source and instruction and on seed + i alone.
        """
        sampling = self.config.sampling if sampling is None else sampling
        guided = is_guided(sampling.scale)
        ids, mask = self.processor.editing_prompts([*instructions, *[KEEP_PROMPT] * (len(instructions) * guided)])
        tokens = self.understood_tokens(sources)
        tokens = torch.cat([tokens, tokens]) if guided else tokens
        condition = self.condition_on_images(ids.to(tokens.device), mask.to(tokens.device), tokens)
        noise = ImageNoise([seed + offset for offset in range(len(instructions))], condition.device)
        grid = self.grid_of(self.config.image_size, self.config.image_size)
        return self._sample(condition, noise, DrawingOptions(sampling, grid)).clamp(-1, 1)

    # Checkpoints

    @property
    def official_parts(self) -> Mapping[str, OfficialPart]:
        """`openuni`: what its checkpoints hold; `internvl3`; `dc_ae`."""
        return {
            "openuni": OfficialPart(("meta_queries", "connector.", "projector.", "transformer."), KeyMap(renames=())),
            "internvl3": OfficialPart(("vlm.",), VLM_KEYS),
            "dc_ae": OfficialPart(("autoencoder.",), KeyMap(renames=(NETWORK,))),
        }

    def _sample(self, condition: Tensor, noise: ImageNoise, options: DrawingOptions) -> Tensor:
        start = noise.normal(self.config.autoencoder.channels, *options.grid)
        latents = self.sample_latents(condition, start, options.sampling, options.progress)
        return self.decode_images(latents.to(condition.dtype))

    @property
    def language_model(self) -> PreTrainedModel:
        """InternVL3."""
        return self.vlm

    @property
    def text_body(self) -> nn.Module:
        """That of InternVL3."""
        return self.vlm.model.language_model
