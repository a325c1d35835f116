"""Toy: one linear encoder for reading and drawing, a small language model, and an MLP that removes noise.

Shapes: B samples, L tokens of an image, C latent channels, H width of tokens and of the language model.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infotok_lit.batch import (
    IMAGE_TOKEN_ID,
    BranchOutput,
    GenerationBatch,
    ReconstructionOutput,
    TokenLayout,
    UnderstandingBatch,
)
from infotok_lit.checkpoints import KeyMap
from infotok_lit.models.common.block_transform import BlockTransform
from infotok_lit.models.common.image_noise import ImageNoise
from infotok_lit.models.common.language_model import build_language_model
from infotok_lit.models.common.reconstruction import ReconstructionConfig, condition_pixels, scale_gradient
from infotok_lit.models.toy.config import DrawingConfig, ToyConfig
from infotok_lit.models.toy.processor import ToyProcessor
from infotok_lit.models.unified import TokenTransform, UnifiedModel

KEYS = KeyMap(renames=((r"^encoder\.", "visual.proj."), (r"^places$", "visual.pos_embed")))
"""Our names -> those of the official checkpoint."""


class Toy(UnifiedModel):
    """The whole model; weights are fresh until a checkpoint is loaded."""

    family = "toy"
    title = ToyConfig.title
    reconstruction_defaults = ReconstructionConfig(condition="same_res", gradient_scale=1.0, template_swap=0.0)

    def __init__(self, config: ToyConfig, processor: ToyProcessor) -> None:
        super().__init__()
        self.config = config
        self.processor = processor
        self.side = config.image_size // config.block_size
        width = config.llm.hidden_size
        self.autoencoder = BlockTransform(config.block_size, config.kept)
        self.latent_width = self.autoencoder.channels
        self.text_width = width
        self.token_widths = {"understanding": width, "generation": width}
        self.num_extras = {"understanding": 0, "generation": 0}
        self.parts = {"encoder": ("encoder.", "places"), "llm": ("llm.",), "painter": ("painter.",)}
        self.token_parts = {"understanding": ("encoder",), "generation": ("encoder",)}
        self.encoder = nn.Linear(self.latent_width, width)
        self.places = nn.Parameter(0.1 * torch.randn(self.side**2, width))
        self.llm = build_language_model(config.llm)
        self.painter = nn.Sequential(nn.Linear(2 * width, 64), nn.GELU(), nn.Linear(64, self.latent_width))

    def understanding(self, batch: UnderstandingBatch, transform: TokenTransform | None = None) -> BranchOutput:
        """Next-token cross entropy in nats, summed over answer tokens."""
        tokens = self.encode(self.latents(batch.pixel_values))
        embeds = self._embed(batch.input_ids, tokens if transform is None else transform(tokens))
        hidden = self.llm.model(inputs_embeds=embeds, attention_mask=batch.attention_mask).last_hidden_state
        labels = batch.labels[:, 1:]
        logits = self.llm.lm_head(hidden[:, :-1][labels >= 0])
        loss = F.cross_entropy(logits.float(), labels[labels >= 0], reduction="sum")
        return BranchOutput(loss, (labels >= 0).sum(), tokens, *self._places(tokens), batch.text, self._table)

    def generation(self, batch: GenerationBatch, transform: TokenTransform | None = None) -> BranchOutput:
        """Squared error of the clean latents that are guessed from noisy ones and the prompt, summed."""
        condition = self._condition(batch.input_ids, batch.attention_mask)
        loss, latents, tokens, time = self._denoise(batch.pixel_values, condition, transform)
        return BranchOutput(
            loss,
            torch.tensor(latents.numel(), device=loss.device),
            tokens,
            *self._places(tokens),
            batch.text,
            self._table,
            latents,
            (self.side, self.side),
            noise_level=time,
        )

    def reconstruction(
        self,
        batch: GenerationBatch,
        config: ReconstructionConfig,
        reading: TokenTransform | None = None,
        drawing: TokenTransform | None = None,
    ) -> ReconstructionOutput:
        """The drawing loss, with the mean token of the image in the place of the prompt."""
        config = config.over(self.reconstruction_defaults)
        tokens = self.encode(self.latents(condition_pixels(batch.pixel_values, config, self.config.block_size)))
        seen = scale_gradient(tokens if reading is None else reading(tokens), config.gradient_scale)
        loss, latents, _, _ = self._denoise(batch.pixel_values, seen.mean(1), drawing)
        return ReconstructionOutput(loss, torch.tensor(latents.numel(), device=loss.device))

    @torch.no_grad()
    def describe(
        self, pixel_values: Tensor, prompts: Sequence[str], max_new_tokens: int = 64, use_cache: bool = True
    ) -> list[str]:
        """Answer one prompt per image, greedily, one after another."""
        answers = []
        for tokens, prompt in zip(self.encode(self.latents(pixel_values)), prompts, strict=True):
            ids = torch.tensor([self.processor.question_ids(prompt)], device=tokens.device)
            embeds = self._embed(ids, tokens.unsqueeze(0))
            found = self.llm.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=use_cache,
                eos_token_id=self.processor.end_id,
                pad_token_id=self.processor.pad_id,
            )
            answers.append(self.processor.decode(found[0].tolist()))
        return answers

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
        """Draw one image per prompt; nothing is cached, so `use_cache` changes nothing."""
        own = (self.config.image_size, self.config.image_size)
        if image_size not in (None, own):
            raise ValueError(f"Toy draws images of {own[0]} x {own[1]} pixels only")
        drawing = self.config.drawing if drawing is None else drawing
        ids, mask = (x.to(self.places.device) for x in self.processor.prompts(prompts))
        condition = self._condition(ids, mask)
        noise = ImageNoise([seed + i for i in range(len(prompts))], self.places.device)
        latents = noise.normal(self.side**2, self.latent_width)
        for i in range(drawing.iterations):
            clean = self._paint(self.encode(latents), condition)
            latents = latents + (clean - latents) / (drawing.iterations - i)
            if progress is not None:
                progress(i + 1, drawing.iterations)
        grid = latents.transpose(1, 2).unflatten(2, (self.side, self.side))
        return self.autoencoder.decode(grid).clamp(-1, 1)

    def latents(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, height, width) in [-1, 1] -> (B, L, C)."""
        return self.autoencoder.encode(pixel_values).flatten(2).transpose(1, 2)

    def encode(self, latents: Tensor) -> Tensor:
        """(B, L, C) -> the shared tokens (B, L, H)."""
        return self.encoder(latents) + self.places

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Matrices decay."""
        return parameter.ndim > 1

    def official_weights(self) -> dict[str, dict[str, Tensor]]:
        """`toy`, the only official file."""
        return {"toy": KEYS.to_official(self.state_dict())}

    @property
    def official_aliases(self) -> tuple[str, ...]:
        """The head is the embedding table."""
        return ("llm.lm_head.weight",)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute the language model's activations."""
        if enabled:
            self.llm.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.llm.gradient_checkpointing_disable()

    @property
    def _table(self) -> nn.Embedding:
        return self.llm.get_input_embeddings()

    def _embed(self, ids: Tensor, tokens: Tensor) -> Tensor:
        slots = ids == IMAGE_TOKEN_ID
        embeds = self._table(ids.masked_fill(slots, 0))
        return embeds.masked_scatter(slots.unsqueeze(-1), tokens.to(embeds.dtype))

    def _condition(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The mean embedding (B, H) of prompts."""
        weights = mask.unsqueeze(-1).float()
        return (self._table(ids) * weights).sum(1) / weights.sum(1)

    def _denoise(
        self, pixel_values: Tensor, condition: Tensor, transform: TokenTransform | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss's sum, the clean latents, the shared tokens of the noisy ones, and the times (B,)."""
        latents = self.latents(pixel_values)
        time = torch.rand(len(latents), device=latents.device)
        share = time.view(-1, 1, 1)
        tokens = self.encode(share * latents + (1 - share) * torch.randn_like(latents))
        painted = self._paint(tokens if transform is None else transform(tokens), condition)
        return (painted.float() - latents).square().sum(), latents, tokens, time

    def _paint(self, tokens: Tensor, condition: Tensor) -> Tensor:
        return self.painter(torch.cat([tokens, condition.unsqueeze(1).expand_as(tokens)], -1))

    def _places(self, tokens: Tensor) -> tuple[Tensor, TokenLayout]:
        index = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        return index, TokenLayout(0, (self.side, self.side))
