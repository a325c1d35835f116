"""The smallest Harmon on Scenes: for tests of everything around the model."""

from dataclasses import replace

import torch

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.data.datamodule import UnifiedDataModule
from infotok_lit.data.scenes import Scenes
from infotok_lit.models.harmon.config import DrawingConfig, HarmonConfig, LanguageModelConfig, MARConfig, config_of_size
from infotok_lit.models.harmon.loading import build_harmon
from infotok_lit.models.harmon.model import Harmon
from infotok_lit.modules.harmon import HarmonModule
from infotok_lit.modules.optimiser import OptimiserConfig
from infotok_lit.objective.config import DecoderConfig, ObjectiveConfig, ProjectionConfig, Term


def tiny_config(dropout: float = 0.0) -> HarmonConfig:
    """Some 30 thousand parameters."""
    return replace(
        config_of_size("scenes32"),
        mar=MARConfig(
            encoder_width=16,
            encoder_depth=1,
            encoder_heads=2,
            decoder_width=16,
            decoder_depth=1,
            decoder_heads=2,
            diffusion_depth=1,
            diffusion_width=16,
            default_grid=(4, 4),
            num_buffers=2,
            dropout=dropout,
            mask_ratio_min=0.3,
            noise_draws=2,
            sampling_steps="ddim5",
            num_classes=1,
        ),
        llm=LanguageModelConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=432,
            max_position_embeddings=512,
        ),
        drawing=DrawingConfig(iterations=4, guidance=2.0),
    )


def tiny_harmon(seed: int = 0, dropout: float = 0.0) -> Harmon:
    """A tiny Harmon with random weights, none of them zero."""
    torch.manual_seed(seed)
    model = build_harmon(tiny_config(dropout), str(SCENES_TOKENIZER))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


class TinyModule(HarmonModule):
    """HarmonModule on the tiny model; all of its behaviour is the parent's."""

    def __init__(
        self,
        terms: tuple[Term, ...] = ("compactness", "sufficiency", "alignment"),
        bottleneck: str = "projected",
        lr: float = 1e-3,
        dropout: float = 0.0,
        freeze: tuple[str, ...] = (),
    ) -> None:
        objective = ObjectiveConfig(
            terms=terms,
            bottleneck=bottleneck,
            projection=ProjectionConfig(hidden_width=16, latent_width=8),
            decoder=DecoderConfig(width=16, depth=1, heads=2),
        )
        optimiser = OptimiserConfig(lr=lr, heads_lr=1e-3, warmup_steps=2)
        super().__init__(objective=objective, optimiser=optimiser, freeze=freeze, answer_tokens=3)
        self.dropout = dropout

    def build_base(self) -> Harmon:
        return tiny_harmon(dropout=self.dropout).train()


def scenes_data(batch_size: int = 4, num_workers: int = 0, val_samples: int = 4) -> UnifiedDataModule:
    """Scenes in small batches."""
    return UnifiedDataModule(
        train=Scenes(num_samples=1000),
        val=Scenes(split="val"),
        understanding_batch_size=batch_size,
        generation_batch_size=batch_size,
        val_batch_size=4,
        val_samples=val_samples,
        num_workers=num_workers,
    )
