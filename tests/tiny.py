"""The smallest model of each family on Scenes: for tests of everything around the model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.data.datamodule import UnifiedDataModule
from infotok_lit.models.common.model_config import LanguageModelConfig
from infotok_lit.models.family import family as family_called
from infotok_lit.models.harmon.family import HarmonConfig, MARConfig
from infotok_lit.models.openuni.family import ConnectorConfig, DiffusionTransformerConfig, OpenUniConfig, VisionConfig
from infotok_lit.models.showo2.family import DiffusionHeadConfig, SemanticConfig, Showo2Config
from infotok_lit.models.unified import UnifiedModel
from infotok_lit.modules.infotok_module import InfoTokModule
from infotok_lit.modules.lora import LoraConfig
from infotok_lit.modules.losses import TaskWeights
from infotok_lit.modules.optimiser import OptimiserConfig
from infotok_lit.objective.compactness import ProjectionConfig
from infotok_lit.objective.config import ObjectiveConfig
from infotok_lit.objective.sufficiency import DecoderConfig
from infotok_lit.objective.term import Term
from infotok_lit.scenes import Scenes

TINY_LLM = LanguageModelConfig(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=448,
    max_position_embeddings=512,
)


def tiny_config(dropout: float = 0.0) -> HarmonConfig:
    """Some 30 thousand parameters."""
    scenes32 = family_called("harmon").config_of_size("scenes32")
    return replace(
        scenes32,
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
        llm=replace(TINY_LLM, num_hidden_layers=1, num_attention_heads=2),
        sampling=replace(scenes32.sampling, iterations=4, guidance=2.0),
    )


def tiny_showo2_config(dropout: float = 0.0) -> Showo2Config:
    """Some 40 thousand parameters; Show-o2 has no dropout."""
    scenes32 = family_called("showo2").config_of_size("scenes32")
    return replace(
        scenes32,
        semantic=SemanticConfig(width=16, mlp_width=32, depth=1, heads=2, table_side=4),
        llm=TINY_LLM,
        diffusion_head=DiffusionHeadConfig(width=24, mlp_width=32, depth=2, heads=4, kv_heads=2, head_dim=8),
        sampling=replace(scenes32.sampling, iterations=4, guidance=2.0),
    )


def tiny_openuni_config(dropout: float = 0.0) -> OpenUniConfig:
    """Some 60 thousand parameters; OpenUni has no dropout."""
    scenes32 = family_called("openuni").config_of_size("scenes32")
    return replace(
        scenes32,
        vision=VisionConfig(width=16, mlp_width=32, depth=1, heads=2, image_size=32, patch_size=4),
        llm=replace(TINY_LLM, tie_word_embeddings=False),
        connector=ConnectorConfig(width=16, mlp_width=32, depth=1, heads=2),
        transformer=DiffusionTransformerConfig(
            heads=2, head_dim=8, depth=2, cross_heads=2, cross_head_dim=8, caption_width=24, sample_size=4
        ),
        sampling=replace(scenes32.sampling, iterations=4, guidance=2.0),
        num_queries=4,
    )


TINY_CONFIGS: dict[str, Callable[[float], Any]] = {
    "harmon": tiny_config,
    "showo2": tiny_showo2_config,
    "openuni": tiny_openuni_config,
}
"""Family -> its tiny configuration with some dropout, where the family has any."""

FAMILIES = tuple(TINY_CONFIGS)


def tiny_model(family: str = "harmon", seed: int = 0, dropout: float = 0.0) -> UnifiedModel:
    """A tiny model with random weights, none of them zero."""
    torch.manual_seed(seed)
    model = family_called(family).build(TINY_CONFIGS[family](dropout), str(SCENES_TOKENIZER))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


class TinyModule(InfoTokModule):
    """InfoTokModule on a tiny model; all of its behaviour is the parent's."""

    def __init__(
        self,
        terms: tuple[Term, ...] = ("compactness", "sufficiency", "alignment"),
        bottleneck: str = "projected",
        lr: float = 1e-3,
        dropout: float = 0.0,
        freeze: tuple[str, ...] = (),
        family: str = "harmon",
        task_weights: TaskWeights = TaskWeights(),  # noqa: B008 - frozen
        unfreeze: tuple[str, ...] = (),
        lora: LoraConfig | None = None,
    ) -> None:
        self.family = family
        objective = ObjectiveConfig(
            terms=terms,
            bottleneck=bottleneck,
            projection=ProjectionConfig(hidden_width=16, latent_width=8),
            decoder=DecoderConfig(width=16, depth=1, heads=2),
        )
        optimiser = OptimiserConfig(lr=lr, heads_lr=1e-3, warmup_steps=2)
        super().__init__(
            objective=objective,
            optimiser=optimiser,
            task_weights=task_weights,
            freeze=freeze,
            unfreeze=unfreeze,
            lora=lora,
            answer_tokens=3,
        )
        self.dropout = dropout

    def build_base(self) -> UnifiedModel:
        return tiny_model(self.family, dropout=self.dropout).train()


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
