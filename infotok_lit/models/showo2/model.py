"""Show-o2: one language model over text and images, whose tokens come from a dual-path encoder and whose images come
from flow matching (Xie et al. 2025, arXiv 2506.15564).

Shapes: B sequences, T positions, M image slots per sequence, n = B M images, (gh, gw) grid of N tokens, C latent
channels, D language-model width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from infotok_lit.batch import (
    BranchOutput,
    GenerationBatch,
    ReconstructionOutput,
    UnderstandingBatch,
)
from infotok_lit.checkpoints import KeyMap, OfficialPart
from infotok_lit.models.common.autoencoders import (
    LatentPosterior,
    WanVAE,
    encode,
    to_tokens,
    wan_keys,
)
from infotok_lit.models.common.language_model import text_loss, text_nats
from infotok_lit.models.common.reconstruction import (
    ReconstructionConfig,
    ReconstructionInputs,
    graph_unless_stopped,
    scale_gradient,
)
from infotok_lit.models.common.sampling import DrawingOptions, ImageNoise, is_guided
from infotok_lit.models.reading import TokenTransform, transformed
from infotok_lit.models.showo2.diffusion import RandomNumbers, on_path, random_numbers, to_runs, training_time
from infotok_lit.models.showo2.family import EMBEDDINGS, LM_HEAD, PATCH_SIZE
from infotok_lit.models.showo2.inference import cached_velocity, continue_greedily, full_velocity, walk
from infotok_lit.models.showo2.network import PARTS, Hidden, Showo2Network
from infotok_lit.models.showo2.sequence import dense_mask, find_regions

RENAMES = (
    (r"^llm\.", r"showo."),
    (r"^encoder\.understanding_embed\.", r"image_embedder_und.proj."),
    (r"^encoder\.generation_embed\.", r"image_embedder_gen.proj."),
    (r"^encoder\.positions\.", r"position_embedding."),
    (r"^encoder\.semantic\.", r"und_trans."),
    (r"^encoder\.fusion\.", r"fusion_proj."),
    (r"^time_to_token\.", r"time_embed_proj."),
    (r"^to_diffusion\.", r"diff_proj."),
    (r"^diffusion_head\.blocks\.(\d+)\.attention\.", r"diffusion_head_a.\1.self_attn."),
    (r"^diffusion_head\.blocks\.(\d+)\.attention_norm\.", r"diffusion_head_a.\1.input_layernorm."),
    (r"^diffusion_head\.blocks\.(\d+)\.mlp_norm\.", r"diffusion_head_a.\1.post_attention_layernorm."),
    (r"^diffusion_head\.blocks\.(\d+)\.mlp\.", r"diffusion_head_a.\1.mlp."),
    (r"^diffusion_head\.blocks\.(\d+)\.modulation\.", r"diffusion_head_a.\1.adaLN_modulation.1."),
    (r"^diffusion_head\.output_norm\.", r"diffusion_head_b.norm_final."),
    (r"^diffusion_head\.output_modulation\.", r"diffusion_head_b.adaLN_modulation.1."),
    (r"^diffusion_head\.output\.", r"diffusion_head_b.linear."),
)
"""Our names -> those of the official checkpoint, which holds everything but the autoencoder."""
ENCODER_PARTS = ("understanding_embed.", "generation_embed.", "positions.", "semantic.", "fusion.")


class Showo2(Showo2Network):
    """The whole model: its losses, inference and checkpoints."""

    family = "showo2"
    reconstruction_defaults = ReconstructionConfig(condition="low_res", gradient_scale=0.1, template_swap=0.1)
    slots_before_tokens = 1

    # Latents

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor, encoded: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """As the parent's; of the Wan VAE a sample of the posterior, or its mean: (n, C, 2 gh, 2 gw).

        Args:
            noise: standard normal, like the result, for the sample; drawn if not given.
        """
        if isinstance(self.autoencoder, WanVAE):
            posterior = LatentPosterior.of(encode(self.autoencoder, pixel_values) if encoded is None else encoded)
            encoded = posterior.mean
            if self.config.autoencoder.posterior == "sample":
                encoded = posterior.sample(torch.randn_like(encoded) if noise is None else noise)
        return super().encode_images(pixel_values, encoded)

    # Understanding

    def understood_tokens(self, pixel_values: Tensor, encoded: Tensor | None = None) -> Tensor:
        """(n, 3, height, width) in [-1, 1] -> the fused tokens of the clean images (n, N, D)."""
        return self.encoder(self.encode_images(pixel_values, encoded)).tokens

    def understanding(self, batch: UnderstandingBatch, transform: TokenTransform | None = None) -> BranchOutput:
        """Next-token cross entropy (nats) summed over answer tokens, given clean images."""
        latents = self.encode_images(batch.pixel_values, batch.encoded)
        scaled = _scaled(transform, self.config.grad_scale)
        hidden = self.run_sequence(batch.input_ids, latents, latents.new_ones(len(latents)), scaled)
        loss = text_loss(self.llm.lm_head, hidden.states, batch.labels, batch.label_places)
        tokens, codes = hidden.shared
        return self.branch_output("understanding", loss, tokens, batch.text, self.understood_grid(batch), codes=codes)

    def project_for_llm(
        self, tokens: Tensor, transform: TokenTransform | None = None, time: Tensor | None = None
    ) -> Tensor:
        """Shared tokens (B, N, D) after their time (B,), by default that of clean images: (B, 1 + N, D)."""
        time = tokens.new_ones(len(tokens)) if time is None else time
        return torch.cat([self.time_to_token(self.time_embed(time)).unsqueeze(1), transformed(tokens, transform)], 1)

    def _embed(self, batch: UnderstandingBatch, tokens: Tensor, transform: TokenTransform | None = None) -> Tensor:
        scaled = _scaled(transform, self.config.grad_scale)
        return self.embed_with_images(batch.input_ids, self.project_for_llm(tokens, scaled))

    def tokens_to_describe(self, pixel_values: Tensor) -> Tensor:
        """Those of a sample of the latents that is the same each time."""
        noise = ImageNoise([0] * len(pixel_values), pixel_values.device)
        height, width = (side // self.config.autoencoder.stride for side in pixel_values.shape[2:])
        start = noise.normal(self.config.autoencoder.channels, height, width)
        return self.encoder(self.encode_images(pixel_values, noise=start)).tokens

    @property
    def seen_after_image(self) -> int:
        """One position, as the official script counts images from one position further right than training does."""
        return int(self.config.prompts.describing == "official")

    def regions_to_describe(self, ids: Tensor) -> Tensor:
        """(B, M, 2): the positions of prompts (B, T) that see each other."""
        return find_regions(ids) + ids.new_tensor([self.seen_after_image, 0])

    def reading_mask(self, ids: Tensor) -> Tensor:
        """As `prefix_mask`, in training, where the official code counts images from their first position."""
        return dense_mask(find_regions(ids, 1), ids.shape[1])

    def prefix_mask(self, ids: Tensor) -> Tensor:
        """Positions of an image see all of it."""
        return dense_mask(self.regions_to_describe(ids), ids.shape[1])

    def answer_prompts(self, ids: Tensor, mask: Tensor, visual: Tensor, max_new_tokens: int, use_cache: bool) -> Tensor:
        """As the parent's, with images whose positions see all of it."""
        embeds, regions = self.embed_with_images(ids, visual), self.regions_to_describe(ids)
        return continue_greedily(self, embeds, mask, regions, max_new_tokens, use_cache)

    # Generation

    def generation(
        self, batch: GenerationBatch, transform: TokenTransform | None = None, random: RandomNumbers | None = None
    ) -> BranchOutput:
        """Squared error of the velocity, summed over the channels of image tokens."""
        clean = self.encode_images(batch.pixel_values, batch.encoded)
        noisy, velocity, time = self._noisy(clean, random)
        hidden = self.run_sequence(batch.input_ids, noisy, time, transform)
        # The objective's decoder predicts what a token has seen: its own 2x2 patch.
        patches, grid = to_tokens(clean, PATCH_SIZE)
        return self.branch_output(
            "generation",
            self.flow_loss(hidden, velocity),
            hidden.shared.tokens,
            batch.text,
            grid,
            latents=patches,
            latent_grid=grid,
            noise_level=time,
            codes=hidden.shared.codes,
        )

    def caption_nats(self, tokens: Tensor, output: BranchOutput, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """As the parent's, with the time of the noisy latents, whose fused tokens are read, before them."""
        visual = self.project_for_llm(tokens, time=output.noise_level)
        ids, labels = (part.to(visual.device) for part in self.processor.caption_answers(captions, visual.shape[1]))
        states, _ = self.read_with_images(self.embed_with_images(ids, visual), find_regions(ids))
        return text_nats(self.llm.lm_head, states, labels)

    def reconstruct(self, batch: GenerationBatch, inputs: ReconstructionInputs) -> ReconstructionOutput:
        """Squared error of the velocity, over the generated image only, given the fused tokens of its clean copy.

        There is no official form for Show-o2: this is Show-o's, with a smaller copy, because both images would
        otherwise lie in one latent space at one size, where copying is easiest.
        """
        clean = self.encode_images(batch.pixel_values, batch.encoded)
        shown = clean if inputs.copies is batch.pixel_values else self.encode_images(inputs.copies)
        ids, _ = self.processor.reconstruction_prompts(inputs.requests, _slots(shown), _slots(clean))
        noisy, velocity, time = self._noisy(clean, inputs.random)
        with graph_unless_stopped(inputs.gradient_scale):
            condition = self.encoder(shown)
            seen = _scaled(inputs.understood_transform, inputs.gradient_scale)(condition.tokens)
        hidden = self.run_pair(ids.to(clean.device), seen, noisy, time, inputs.generated_transform)
        loss = self.flow_loss(replace(hidden, regions=hidden.regions[:, 1:]), velocity)
        quantised = [codes.loss for codes in (condition.codes, hidden.shared.codes) if codes and codes.loss is not None]
        return ReconstructionOutput(*loss, torch.stack(quantised).mean() if quantised else None)

    def flow_loss(self, hidden: Hidden, velocity: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Squared error summed over (token, channel), and their number.

        Args:
            velocity: (n, C, 2 gh, 2 gw): the targets, one per region.
            counted: (n,) bool: images that count; default: all.
        """
        present = hidden.regions[..., 1].flatten() > 0
        present = present if counted is None else present & counted
        targets = to_runs(velocity)
        error = (self.image_velocities(hidden).float() - targets).square().sum((1, 2))
        return torch.where(present, error, 0.0).sum(), present.sum() * targets[0].numel()

    def sample(self, prompts: Sequence[str], noise: ImageNoise, options: DrawingOptions) -> Tensor:
        """Images of prompts by an Euler walk along the velocity."""
        sampling, grid, progress, use_cache = options
        negative = "" if is_guided(sampling.scale) else None
        ids, _ = self.processor.generation_prompts(prompts, negative, 1 + grid[0] * grid[1])
        start = noise.normal(self.config.autoencoder.channels, PATCH_SIZE * grid[0], PATCH_SIZE * grid[1])
        velocity = (cached_velocity if use_cache else full_velocity)(self, ids.to(noise.device))
        return self.decode_images(walk(velocity, start, sampling, progress))

    # Checkpoints

    @property
    def official_parts(self) -> Mapping[str, OfficialPart]:
        """`showo2`: the official model; `wan_vae`; `quantiser`, which the official model does not have."""
        tied = ((LM_HEAD, EMBEDDINGS),) if self.config.llm.tie_word_embeddings else ()
        encoder = tuple(f"encoder.{part}" for part in ENCODER_PARTS)
        others = tuple(f"{name}." for name in PARTS if name != "encoder")
        vae = self.config.autoencoder
        return {
            "showo2": OfficialPart((*encoder, *others), KeyMap(RENAMES, tied)),
            "wan_vae": OfficialPart(("autoencoder.",), wan_keys(vae.num_levels, vae.blocks_per_level)),
            "quantiser": OfficialPart(("encoder.quantiser.",), KeyMap(((r"^encoder\.quantiser\.", ""),))),
        }

    def _noisy(self, clean: Tensor, random: RandomNumbers | None) -> tuple[Tensor, Tensor, Tensor]:
        """Latents on their way from noise to an image, their velocity there, and the time (n,) that it is."""
        random = random_numbers(clean.shape, clean.device) if random is None else random
        slots = _slots(clean) if self.config.training_time.shifted else None
        time = training_time(random.normal, num_image_tokens=slots)
        return *on_path(clean, random.noise, time), time


def _slots(latents: Tensor) -> int:
    """Positions of one image in a sequence: its time, then its tokens."""
    return 1 + latents.shape[2] * latents.shape[3] // PATCH_SIZE**2


def _scaled(transform: TokenTransform | None, scale: float | None) -> TokenTransform:
    return lambda tokens: scale_gradient(transformed(tokens, transform), scale)
