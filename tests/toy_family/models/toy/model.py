"""Toy: one linear encoder for both branches, a small language model, and an MLP that removes noise.

Shapes: B batch, L grid places, C channels of a latent token, H width, T text length.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from infotok_lit.batch import BranchOutput, GenerationBatch, ReconstructionOutput
from infotok_lit.checkpoints import KeyMap, OfficialPart
from infotok_lit.models.common.autoencoders import BlockTransform
from infotok_lit.models.common.language_model import build_language_model
from infotok_lit.models.common.processor import ChatProcessor, Words
from infotok_lit.models.common.reconstruction import ReconstructionInputs, scale_gradient
from infotok_lit.models.common.sampling import DrawingOptions, ImageNoise
from infotok_lit.models.reading import TokenTransform, transformed
from infotok_lit.models.toy.family import ToyConfig
from infotok_lit.models.unified import UnifiedModel


class ToyProcessor(ChatProcessor):
    """An image, a question, an answer; or a prompt alone."""

    needs = "Toy needs a tokenizer of Qwen2"

    def question(self, question: str, num_image_tokens: int) -> list[Any]:
        """The image, then the question."""
        return [self.image_slots(num_image_tokens), Words(question)]

    def caption(self, caption: str, num_image_tokens: int) -> list[Any]:
        """The caption and the end of its turn, which also stands for no caption."""
        return [Words(caption), [self.end_id]]


class Toy(UnifiedModel):
    """The whole model; weights are fresh until a checkpoint is loaded."""

    family = "toy"

    def __init__(self, config: ToyConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(config, ToyProcessor(config, tokenizer))
        width, self.side = config.llm.hidden_size, config.image_size // config.token_pixels
        self.autoencoder = BlockTransform(config.token_pixels, config.kept)
        self.latent_width = self.autoencoder.channels
        self.token_widths = {"understanding": width, "generation": width}
        self.parts = {"encoder": ("encoder.", "places"), "llm": ("llm.",), "denoiser": ("denoiser.",)}
        self.encoder = nn.Linear(self.latent_width, width)
        self.places = nn.Parameter(0.1 * torch.randn(self.side**2, width))
        self.llm = build_language_model(config.llm)
        self.denoiser = nn.Sequential(nn.Linear(2 * width, 64), nn.GELU(), nn.Linear(64, self.latent_width))

    def understood_tokens(self, pixel_values: Tensor, encoded: Tensor | None = None) -> Tensor:
        return self.encode(self.latents(pixel_values))

    def generation(self, batch: GenerationBatch, transform: TokenTransform | None = None) -> BranchOutput:
        """Squared error of the clean latents that are guessed from noisy ones and the prompt, summed."""
        condition = self._condition(batch.input_ids, batch.attention_mask)
        return self._denoising_loss(batch, condition, transform)

    def reconstruct(self, batch: GenerationBatch, inputs: ReconstructionInputs) -> ReconstructionOutput:
        """The same loss, with the mean token of the image in the place of the prompt."""
        seen = transformed(self.understood_tokens(inputs.copies), inputs.understood_transform)
        condition = scale_gradient(seen, inputs.gradient_scale).mean(1)
        output = self._denoising_loss(batch, condition, inputs.generated_transform)
        return ReconstructionOutput(output.loss_sum, output.loss_count)

    def sample(self, prompts: Sequence[str], noise: ImageNoise, options: DrawingOptions) -> Tensor:
        """Images of prompts; nothing is cached, so `use_cache` changes nothing."""
        if options.grid != (self.side, self.side):
            raise ValueError(f"Toy generates images of {self.config.image_size} pixels a side only")
        ids, mask = (x.to(noise.device) for x in self.processor.generation_prompts(prompts))
        condition = self._condition(ids, mask)
        latents = noise.normal(self.side**2, self.latent_width)
        iterations = options.sampling.iterations
        for i in range(iterations):
            clean = self._denoise(self.encode(latents), condition)
            latents = latents + (clean - latents) / (iterations - i)
            if options.progress is not None:
                options.progress(i + 1, iterations)
        return self.autoencoder.decode(latents.transpose(1, 2).unflatten(2, options.grid))

    def latents(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, height, width) in [-1, 1] -> (B, L, C)."""
        return self.autoencoder.encode(pixel_values).flatten(2).transpose(1, 2)

    def encode(self, latents: Tensor) -> Tensor:
        """(B, L, C) -> the shared tokens (B, L, H)."""
        return self.encoder(latents) + self.places

    @property
    def official_parts(self) -> Mapping[str, OfficialPart]:
        """`toy`, the only official file."""
        keys = KeyMap(
            renames=((r"^encoder\.", "visual.proj."), (r"^places$", "visual.pos_embed")),
            tied=(("llm.lm_head.weight", "llm.model.embed_tokens.weight"),),
        )
        return {"toy": OfficialPart(("encoder.", "places", "llm.", "denoiser."), keys)}

    def _condition(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The mean embedding (B, H) of prompts."""
        weights = mask.unsqueeze(-1).float()
        return (self.text_embedding(ids) * weights).sum(1) / weights.sum(1)

    def _denoising_loss(
        self, batch: GenerationBatch, condition: Tensor, transform: TokenTransform | None
    ) -> BranchOutput:
        latents, grid = self.latents(batch.pixel_values), (self.side, self.side)
        time = torch.rand(len(latents), device=latents.device)
        share = time.view(-1, 1, 1)
        tokens = self.encode(share * latents + (1 - share) * torch.randn_like(latents))
        guess = self._denoise(transformed(tokens, transform), condition)
        loss = ((guess.float() - latents).square().sum(), torch.tensor(latents.numel(), device=latents.device))
        return self.branch_output(
            "generation", loss, tokens, batch.text, grid, latents=latents, latent_grid=grid, noise_level=time
        )

    def _denoise(self, tokens: Tensor, condition: Tensor) -> Tensor:
        return self.denoiser(torch.cat([tokens, condition.unsqueeze(1).expand_as(tokens)], -1))
