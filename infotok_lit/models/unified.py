"""The interface that every base model implements, and what all of them do in the same way.

A unified model understands images and generates them through one shared visual encoder. This file knows no objective
and no trainer: a branch returns its own loss together with what an information-theoretic regulariser needs to see, and
the caller decides what to do with it.

Shapes: B samples, N shared tokens that are present, D token width, T sequence length, S text length,
L target positions, C target channels, H width of the LLM's input embeddings.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from infotok_lit.batch import (
    BRANCHES,
    Branch,
    BranchOutput,
    GenerationBatch,
    PairedText,
    Processor,
    ReconstructionOutput,
    TokenCodes,
    TokenLayout,
    UnderstandingBatch,
)
from infotok_lit.checkpoints import OfficialPart
from infotok_lit.models.common.autoencoders import encode
from infotok_lit.models.common.language_model import text_nats
from infotok_lit.models.common.loading import adopt_tensors
from infotok_lit.models.common.model_config import Grid, token_grid
from infotok_lit.models.common.reconstruction import (
    RandomTemplates,
    ReconstructionConfig,
    ReconstructionInputs,
    choose_templates,
    condition_pixels,
    random_templates,
)
from infotok_lit.models.common.sampling import DrawingOptions, ImageNoise, Progress
from infotok_lit.models.reading import ImageReader, TokenTransform


class UnifiedModel(ImageReader):
    """A base model: everything that exists at inference, and nothing else."""

    family: str
    token_widths: dict[Branch, int]
    """D of each branch."""
    num_extras: Mapping[Branch, int] = MappingProxyType(dict.fromkeys(BRANCHES, 0))
    """How many shared tokens of each branch have no place in its grid."""
    latent_width: int
    """C."""
    parts: Mapping[str, tuple[str, ...]]
    """Name for people -> prefixes of parameter names; gradient norms are logged for each."""
    token_parts: Mapping[Branch, tuple[str, ...]] = MappingProxyType(dict.fromkeys(BRANCHES, ("encoder",)))
    """Which parts make the shared tokens of each branch."""
    understanding_prefixes: tuple[str, ...] = ("",)
    """Beginnings of the names of all parameters that the loss of understanding can train."""
    reconstruction_defaults = ReconstructionConfig(condition="same_res", gradient_scale=0.1, template_swap=0.1)
    """How the family is trained to reconstruct, unless a call says otherwise."""

    def __init__(self, config: Any, processor: Processor) -> None:
        super().__init__()
        self.config = config
        self.processor = processor

    @property
    def title(self) -> str:
        """The family's name for people."""
        return self.config.title

    @property
    def text_width(self) -> int:
        """H."""
        return self.config.llm.hidden_size

    # Latents, of a model with a frozen autoencoder

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor, encoded: Tensor | None = None) -> Tensor:
        """(B, 3, height, width) in [-1, 1] -> scaled latents (B, c, h, w).

        Args:
            encoded: what the autoencoder makes of them, if that is known.
        """
        self.grid_of(*pixel_values.shape[2:])
        return (encode(self.autoencoder, pixel_values) if encoded is None else encoded) * self.config.latent_scale

    @torch.no_grad()
    def decode_images(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, c, h, w) -> images (B, 3, height, width), not clamped."""
        return self.autoencoder.decode(latents / self.config.latent_scale)

    # Training

    def understanding(self, batch: UnderstandingBatch, transform: TokenTransform | None = None) -> BranchOutput:
        """Image-to-text loss: next-token cross entropy in nats, summed over label tokens; here read causally."""
        tokens, grid = self.understood_tokens(batch.pixel_values, batch.encoded), self.understood_grid(batch)
        return self.branch_output("understanding", self.answer_loss(batch, tokens, transform), tokens, batch.text, grid)

    def understood_grid(self, batch: UnderstandingBatch) -> Grid:
        """The grid of the tokens of understanding; here that of images of this size when they are generated."""
        return self.grid_of(*batch.pixel_values.shape[2:])

    @abstractmethod
    def generation(self, batch: GenerationBatch, transform: TokenTransform | None = None) -> BranchOutput:
        """Text-to-image loss of the base model, summed over the elements that it predicts."""

    def caption_nats(self, tokens: Tensor, output: BranchOutput, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What captions cost the language model where it reads generation's shared tokens as it reads an image.

        Args:
            tokens: (B, N, D): those of `output`, or a copy of them.
            output: what the generation pass gave.

        Returns:
            Nats of each caption (B,), with their graph, and its number of tokens (B,).

        Raises:
            SettingsError: generation's tokens are not made from the image.
        """
        visual = self.project_for_llm(tokens)
        ids, labels = (part.to(visual.device) for part in self.processor.caption_answers(captions, visual.shape[1]))
        return text_nats(self.language_model.lm_head, self._read(self.embed_with_images(ids, visual)), labels)

    def reconstruction(
        self,
        batch: GenerationBatch,
        config: ReconstructionConfig,
        understood_transform: TokenTransform | None = None,
        generated_transform: TokenTransform | None = None,
        templates: RandomTemplates | None = None,
        random: Any = None,
    ) -> ReconstructionOutput:
        """Loss of generating the batch's images from what the model understands of them, not from their prompts.

        Args:
            config: what it leaves open is as in `reconstruction_defaults`.
            understood_transform: applied to the shared tokens of the images that are understood.
            generated_transform: applied to the shared tokens of the images that are generated.
            templates: the random numbers that choose the requests; drawn if not given.
            random: the random numbers of the family's generation loss; drawn if not given.
        """
        config = config.over(self.reconstruction_defaults)
        templates = random_templates(len(batch.pixel_values)) if templates is None else templates
        inputs = ReconstructionInputs(
            condition_pixels(batch.pixel_values, config, self.config.token_pixels),
            choose_templates(templates, config),
            config.gradient_scale,
            understood_transform,
            generated_transform,
            random,
        )
        return self.reconstruct(batch, inputs)

    @abstractmethod
    def reconstruct(self, batch: GenerationBatch, inputs: ReconstructionInputs) -> ReconstructionOutput:
        """The reconstruction loss, with the settings of `reconstruction` applied."""

    def drawn_elements(self, images: int, grid: Grid, generator: torch.Generator) -> int | None:
        """How many elements the generation loss of so many images has; None where that is the same each time.

        Args:
            grid: of the tokens of an image.
            generator: stands where the loss begins to draw on the host.
        """
        return None

    def branch_output(
        self,
        branch: Branch,
        loss: tuple[Tensor, Tensor],
        tokens: Tensor,
        text: PairedText,
        grid: Grid,
        *,
        token_index: Tensor | None = None,
        latents: Tensor | None = None,
        latent_grid: Grid | None = None,
        noise_level: Tensor | None = None,
        codes: TokenCodes | None = None,
    ) -> BranchOutput:
        """What a branch gives back.

        Args:
            loss: sum over elements, and their number.
            grid: of the tokens that have a place.
            token_index: default: the tokens fill their canvas; the others are as in BranchOutput.
        """
        everywhere = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        return BranchOutput(
            loss_sum=loss[0],
            loss_count=loss[1],
            tokens=tokens,
            token_index=everywhere if token_index is None else token_index,
            layout=TokenLayout(self.num_extras[branch], grid),
            text=text,
            text_embedding=self.text_embedding,
            latents=latents,
            latent_grid=latent_grid,
            noise_level=noise_level,
            codes=codes,
        )

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies to a parameter (by its name in this model): to all matrices and tables."""
        return parameter.ndim > 1

    def recompute_activations(self) -> None:
        """From now on, recompute activations in the backward pass; the numbers do not change."""
        trained = (child for name, child in self.named_children() if name != "autoencoder")
        for module in (module for child in trained for module in child.modules()):
            if isinstance(module, PreTrainedModel):
                # The second name is that of transformers before 5.23.
                names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
                enable = next(getattr(module, name) for name in names if hasattr(module, name))
                enable({"use_reentrant": False})
            elif hasattr(module, "enable_gradient_checkpointing"):
                module.enable_gradient_checkpointing()
            elif hasattr(module, "activation_checkpointing"):
                module.activation_checkpointing = True

    # Inference

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        sampling: Any = None,
        image_size: tuple[int, int] | None = None,
        progress: Progress | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Generate one image per prompt: (B, 3, height, width) float32 in [-1, 1].

        Image i depends on its prompt and on seed + i, not on the rest of the batch.

        Args:
            sampling: the family's SamplingConfig; default: the model's own.
            image_size: (height, width) in pixels; default: the size that the processor makes.
            progress: called with (iteration, iterations) after each iteration.
            use_cache: compute prompts' keys and values once, and record what a card repeats; the images are the same
                without, and take longer.
        """
        sampling = self.config.sampling if sampling is None else sampling
        grid = self.grid_of(*(image_size or (self.config.image_size, self.config.image_size)))
        noise = ImageNoise([seed + offset for offset in range(len(prompts))], next(self.parameters()).device)
        return self.sample(prompts, noise, DrawingOptions(sampling, grid, progress, use_cache)).clamp(-1, 1)

    @abstractmethod
    def sample(self, prompts: Sequence[str], noise: ImageNoise, options: DrawingOptions) -> Tensor:
        """As `generate`, with its defaults filled in; images need not be clamped."""

    def grid_of(self, height: int, width: int) -> Grid:
        """The grid of an image size in pixels; SettingsError if it is not a whole number of tokens."""
        return token_grid(height, width, self.config.token_pixels)

    # Checkpoints

    @property
    @abstractmethod
    def official_parts(self) -> Mapping[str, OfficialPart]:
        """Stem of an exported file -> what it holds; together everything that inference needs."""

    @property
    def official_aliases(self) -> tuple[str, ...]:
        """Official names that repeat another tensor; files that store a tensor once leave them out."""
        return tuple(first for part in self.official_parts.values() for first, _ in part.keys.tied)

    def official_weights(self) -> dict[str, dict[str, Tensor]]:
        """File stem -> weights under official names and shapes; parts that have no weights are left out."""
        own = {stem: self._weights_of(part) for stem, part in self.official_parts.items()}
        return {stem: self.official_parts[stem].keys.to_official(state) for stem, state in own.items() if state}

    def load_official_weights(self, stem: str, weights: Mapping[str, Tensor], source: str) -> None:
        """Adopt the weights of one part; CheckpointError names what does not fit.

        Args:
            stem: of `official_parts`.
            source: where the weights come from, for the message.
        """
        part = self.official_parts[stem]
        own = self._weights_of(part)
        if part.may_hold_more:
            known = {part.keys.official_name(name) for name in own}
            weights = {name: tensor for name, tensor in weights.items() if name in known}
        adopt_tensors(self, part.keys.from_official(weights, own, source))

    def _weights_of(self, part: OfficialPart) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if name.startswith(part.prefixes)}
