"""Tiny models that are loud enough for answers and pictures to depend on everything that they can depend on."""

import torch
from tiny import tiny_model

from infotok_lit.models.unified import UnifiedModel

PROMPTS = ["what shape is the red object?", "is there a circle?", "how many objects are there in this image?", "why?"]
CAPTIONS = ["a red circle", "two blue squares", "a green triangle above a yellow circle"]
NEW_TOKENS = 8


def loud_model(family: str) -> UnifiedModel:
    model = tiny_model(family, seed=3)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.data += (0.4 if name.startswith(("llm.", "vlm.")) else 0.2) * torch.randn_like(parameter)
    return model
