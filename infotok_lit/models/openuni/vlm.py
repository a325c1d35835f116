"""The vision-language model of OpenUni: transformers' InternVL, and its official names.

The official vision tower stores queries, keys and values as one matrix; transformers stores three. Shapes: B batch,
T text length, N image tokens, Q queries, H language-model width.
"""

import re
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

from infotok_lit.checkpoints import CheckpointError, KeyMap, State
from infotok_lit.models.common.language_model import qwen2_config, with_fused_norms
from infotok_lit.models.common.model_config import LanguageModelConfig
from infotok_lit.models.openuni.family import DOWNSAMPLE, VisionConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def build_vlm(vision: VisionConfig, llm: LanguageModelConfig) -> InternVLForConditionalGeneration:
    """An InternVL3 with fresh weights."""
    # The official positions are stretched beyond the longest trained length, which nothing here reaches; to ask for
    # that would have every pass wait for the device to say how long its texts are.
    text = qwen2_config(llm)
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
        downsample_ratio=1 / DOWNSAMPLE,
        image_seq_length=vision.grid_side**2,
        # The default ties the output head to the embedding table, silently replacing it.
        tie_word_embeddings=llm.tie_word_embeddings,
    )
    return with_fused_norms(InternVLForConditionalGeneration(config))


def normalise(pixel_values: Tensor, size: int) -> Tensor:
    """(B, 3, height, width) in [-1, 1] -> ImageNet-normalised (B, 3, size, size), stretched without antialiasing."""
    mean, std = _imagenet(pixel_values.device, pixel_values.dtype)
    normalised = ((pixel_values + 1) / 2 - mean) / std
    return F.interpolate(normalised, size=(size, size), mode="bilinear", align_corners=False)


@cache
def _imagenet(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (1, 3, 1, 1): copied to a device once, as a step should wait for no copy."""
    mean, std = (torch.tensor(x, device=device, dtype=dtype).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


FUSED = r"(vision_model\.encoder\.layers\.\d+\.attn)\.qkv\.(weight|bias)"
SPLIT = r"(vision_model\.encoder\.layers\.\d+\.attn)\.([qkv])\.(weight|bias)"
PARTS = ("q", "k", "v")
OLDER_KEYS = KeyMap(
    renames=(
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    )
)
"""The names of the "-hf" repositories before transformers 5 -> today's."""


class InternVLKeys(KeyMap):
    """Official names of an InternVL3 that lies in a model as `vlm`."""

    def to_official(self, state: Mapping[str, Tensor]) -> State:
        """With queries, keys and values of the vision tower as one matrix."""
        split = super().to_official(state)
        official: State = {}
        for name, tensor in split.items():
            match = re.fullmatch(SPLIT, name)
            if match is None:
                official[name] = tensor
            elif match[2] == "q":
                parts = [split[f"{match[1]}.{part}.{match[3]}"] for part in PARTS]
                official[f"{match[1]}.qkv.{match[3]}"] = torch.cat(parts)
        return official

    def from_official(self, official: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> State:
        """From official names, transformers' own, or its older ones; CheckpointError names what does not fit."""
        if any(name.startswith("vision_model.") for name in official):
            return super().from_official(_split_attention(official, source), own, source)
        if any(name.startswith("vision_tower.") for name in official):
            official = {OLDER_KEYS.official_name(name): tensor for name, tensor in official.items()}
        return KeyMap(self.renames[:1]).from_official(official, own, source)


VLM_KEYS = InternVLKeys(
    renames=(
        (r"^vlm\.", ""),
        (r"^model\.vision_tower\.embeddings\.cls_token$", r"vision_model.embeddings.class_embedding"),
        (r"^model\.vision_tower\.embeddings\.position_embeddings$", r"vision_model.embeddings.position_embedding"),
        (
            r"^model\.vision_tower\.embeddings\.patch_embeddings\.projection\.",
            r"vision_model.embeddings.patch_embedding.",
        ),
        (r"^model\.vision_tower\.encoder\.layer\.", r"vision_model.encoder.layers."),
        (r"^(vision_model\.encoder\.layers\.\d+)\.attention\.([qkv])_proj\.", r"\1.attn.\2."),
        (r"^(vision_model\.encoder\.layers\.\d+)\.attention\.([qk])_norm\.", r"\1.attn.\2_norm."),
        (r"^(vision_model\.encoder\.layers\.\d+)\.attention\.projection_layer\.", r"\1.attn.proj."),
        (r"^(vision_model\.encoder\.layers\.\d+)\.layernorm_before\.", r"\1.norm1."),
        (r"^(vision_model\.encoder\.layers\.\d+)\.layernorm_after\.", r"\1.norm2."),
        (r"^(vision_model\.encoder\.layers\.\d+)\.lambda_(\d)$", r"\1.ls\2"),
        (r"^model\.multi_modal_projector\.layer_norm\.", r"mlp1.0."),
        (r"^model\.multi_modal_projector\.linear_1\.", r"mlp1.1."),
        (r"^model\.multi_modal_projector\.linear_2\.", r"mlp1.3."),
        (r"^model\.language_model\.", r"language_model.model."),
        (r"^lm_head\.", r"language_model.lm_head."),
    )
)


def _split_attention(weights: Mapping[str, Tensor], source: str) -> State:
    split: State = {}
    for name, tensor in weights.items():
        match = re.fullmatch(FUSED, name)
        if match is None:
            split[name] = tensor
        elif len(tensor) % len(PARTS):
            raise CheckpointError(f"{source}: {name} has {len(tensor)} rows, which are no three equal blocks")
        else:
            parts = tensor.chunk(len(PARTS))
            split |= {f"{match[1]}.{part}.{match[2]}": block for part, block in zip(PARTS, parts, strict=True)}
    return split
