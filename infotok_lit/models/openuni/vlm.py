"""The vision-language model of OpenUni: transformers' InternVL.

Shapes: B batch, T text length, N image tokens, Q queries, H language-model width.
"""

from dataclasses import asdict

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

from infotok_lit.models.common.language_model_config import LanguageModelConfig
from infotok_lit.models.openuni.config import VisionConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def build_vlm(vision: VisionConfig, llm: LanguageModelConfig) -> InternVLForConditionalGeneration:
    """An InternVL3 with fresh weights."""
    values = asdict(llm)
    # Positions are stretched only beyond the longest trained length, which nothing here reaches.
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": values.pop("rope_theta")}
    special_ids = {"bos_token_id": None, "eos_token_id": None}
    text = Qwen2Config(**values, **special_ids, rope_parameters=rope)
    tower = InternVLVisionConfig(
        hidden_size=vision.width,
        intermediate_size=vision.mlp_width,
        num_hidden_layers=vision.depth,
        num_attention_heads=vision.heads,
        image_size=(vision.image_size, vision.image_size),
        patch_size=(vision.patch_size, vision.patch_size),
        attention_bias=True,
        initializer_range=llm.initializer_range,
    )
    config = InternVLConfig(
        vision_config=tower.to_dict(),
        text_config=text.to_dict(),
        downsample_ratio=1 / vision.downsample,
        image_seq_length=vision.grid_side**2,
        # The default ties the output head to the embedding table, silently replacing it.
        tie_word_embeddings=llm.tie_word_embeddings,
    )
    return InternVLForConditionalGeneration(config)


def normalise(pixel_values: Tensor, size: int) -> Tensor:
    """(B, 3, height, width) in [-1, 1] -> ImageNet-normalised (B, 3, size, size), stretched without antialiasing."""
    mean, std = (pixel_values.new_tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    normalised = ((pixel_values + 1) / 2 - mean) / std
    return F.interpolate(normalised, size=(size, size), mode="bilinear", align_corners=False)


def image_tokens(vlm: InternVLForConditionalGeneration, pixel_values: Tensor, size: int) -> Tensor:
    """Projected tokens (B, N, H) of images (B, 3, height, width) in [-1, 1]."""
    return vlm.model.get_image_features(normalise(pixel_values, size), return_dict=True).pooler_output


def read_queries(
    vlm: InternVLForConditionalGeneration, embeds: Tensor, attention_mask: Tensor, queries: Tensor
) -> Tensor:
    """Hidden states (B, Q, H) of queries (Q, H) that follow texts (B, T, H), padded on either side."""
    batch = len(embeds)
    inputs = torch.cat([embeds, queries.to(embeds.dtype).expand(batch, -1, -1)], dim=1)
    mask = torch.cat([attention_mask.bool(), attention_mask.new_ones(batch, len(queries), dtype=torch.bool)], dim=1)
    positions = query_positions(mask)
    body = vlm.model.language_model
    hidden = body(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False)
    return hidden.last_hidden_state[:, -len(queries) :]


def query_positions(mask: Tensor) -> Tensor:
    """(B, T) int64: positions that count real tokens only, so that queries go on right after the text."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
