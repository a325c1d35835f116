"""What a model would hand to the objective, from plain tensors by name."""

from typing import Any

import torch
from torch import Tensor, nn

from infotok_lit.batch import BranchOutput, NegativeTexts, PairedText, TokenLayout

TEXT = {"text_ids": "ids", "text_mask": "mask", "target_mask": "target_mask", "text_key": "key"}


def branch_output(
    *,
    tokens: Tensor,
    token_index: Tensor,
    num_extra: int,
    grid: tuple[int, int],
    text_ids: Tensor,
    text_mask: Tensor,
    target_mask: Tensor,
    text_key: Tensor,
    text_embedding: Tensor,
    negative_ids: Tensor | None = None,
    negative_mask: Tensor | None = None,
    **others: Any,
) -> BranchOutput:
    """One forward pass; its own loss is of no interest."""
    negatives = None if negative_ids is None else NegativeTexts(negative_ids, negative_mask)
    nothing = torch.zeros(())
    return BranchOutput(
        loss_sum=nothing,
        loss_count=nothing,
        tokens=tokens,
        token_index=token_index,
        layout=TokenLayout(num_extra, grid),
        text=PairedText(text_ids, text_mask, target_mask, text_key, negatives),
        text_embedding=nn.Embedding.from_pretrained(text_embedding, freeze=not text_embedding.requires_grad),
        **others,
    )


def parts(output: BranchOutput) -> dict[str, Any]:
    """The inverse of `branch_output`."""
    flat = {name: getattr(output.text, own) for name, own in TEXT.items()}
    if output.text.negatives is not None:
        flat |= {"negative_ids": output.text.negatives.ids, "negative_mask": output.text.negatives.mask}
    own = ("tokens", "token_index", "latents", "latent_grid", "noise_level")
    flat |= {name: getattr(output, name) for name in own}
    layout = {"num_extra": output.layout.num_extra, "grid": output.layout.grid}
    return flat | layout | {"text_embedding": output.text_embedding.weight}


def changed(output: BranchOutput, **others: Any) -> BranchOutput:
    """Another one, with some parts replaced."""
    return branch_output(**{**parts(output), **others})
