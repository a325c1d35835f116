"""Official names of InternVL3 from those of transformers; all other parts of OpenUni keep their names.

The official vision tower stores queries, keys and values as one matrix; transformers stores three.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from infotok_lit.checkpoints import CheckpointError, KeyMap, State

FUSED = r"(vision_model\.encoder\.layers\.\d+\.attn)\.qkv\.(weight|bias)"
SPLIT = r"(vision_model\.encoder\.layers\.\d+\.attn)\.([qkv])\.(weight|bias)"
PARTS = ("q", "k", "v")

VLM_KEYS = KeyMap(
    renames=(
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

_OLDER_PREFIXES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
)
"""How the "-hf" repositories were named before transformers 5."""


def vlm_to_official(native: Mapping[str, Tensor]) -> State:
    """transformers' state dict of an InternVL3 under official names."""
    split = VLM_KEYS.to_official(native)
    official: State = {}
    for name, tensor in split.items():
        match = re.fullmatch(SPLIT, name)
        if match is None:
            official[name] = tensor
        elif match[2] == "q":
            parts = [split[f"{match[1]}.{part}.{match[3]}"] for part in PARTS]
            official[f"{match[1]}.qkv.{match[3]}"] = torch.cat(parts)
    return official


def vlm_from_official(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> State:
    """An InternVL3 under transformers' names, from official names, transformers' own, or its older ones.

    Raises:
        CheckpointError: naming missing, unexpected and mis-shaped keys.
    """
    if any(name.startswith("vision_model.") for name in weights):
        return VLM_KEYS.from_official(_split_attention(weights, source), own, source)
    if any(name.startswith("vision_tower.") for name in weights):
        weights = {_modern(name): tensor for name, tensor in weights.items()}
    return KeyMap(renames=()).from_official(weights, own, source)


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


def _modern(name: str) -> str:
    for pattern, replacement in _OLDER_PREFIXES:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return name
