"""Where images lie in sequences of text, and how both become the language model's input.

Shapes: B sequences, M image slots per sequence, T positions, N positions of an image: its time, then its tokens.
"""

import torch
from torch import Tensor

from infotok_lit.batch import IMAGE_TOKEN_ID


def find_regions(input_ids: Tensor) -> Tensor:
    """(B, T) ids -> (B, M, 2): first position and length of each run of image slots.

    Sequences with fewer images than others get idle slots (0, 0), and so does a batch without any image.
    """
    slots = (input_ids == IMAGE_TOKEN_ID).long()
    edges = torch.diff(slots, dim=1, prepend=slots.new_zeros(len(slots), 1), append=slots.new_zeros(len(slots), 1))
    counts = (edges == 1).sum(dim=1)
    regions = input_ids.new_zeros(len(input_ids), max(1, int(counts.max())), 2)
    starts, ends = (edges == 1).nonzero(), (edges == -1).nonzero()
    order = torch.arange(regions.shape[1], device=input_ids.device).expand(len(input_ids), -1)
    used = order < counts.unsqueeze(1)
    regions[used] = torch.stack([starts[:, 1], ends[:, 1] - starts[:, 1]], dim=1)
    return regions


def insert_images(embeds: Tensor, regions: Tensor, times: Tensor, tokens: Tensor) -> Tensor:
    """Embeddings (B, T, D) with images written into their regions.

    Args:
        times: (B M, D), one per slot. That of an idle slot overwrites position 0, as in the official code, on which
            released weights depend.
        tokens: (B M, N - 1, D).

    Raises:
        ValueError: if a region has another length than an image.
    """
    used = regions[..., 1].flatten() > 0
    lengths = regions[..., 1].flatten()[used]
    if not bool((lengths == tokens.shape[1] + 1).all()):
        raise ValueError(
            f"an image has {tokens.shape[1] + 1} positions with its time, but the text leaves "
            f"{', '.join(map(str, sorted(set(lengths.tolist()))))}: the image size and the processor's disagree, or an "
            "image was cut off"
        )
    rows = torch.arange(len(embeds), device=embeds.device).repeat_interleave(regions.shape[1])
    starts = regions[..., 0].flatten()
    embeds = embeds.index_put((rows, starts), times.to(embeds.dtype))
    places = starts[used].unsqueeze(1) + torch.arange(1, tokens.shape[1] + 1, device=embeds.device)
    return embeds.index_put((rows[used].unsqueeze(1), places), tokens[used].to(embeds.dtype))
