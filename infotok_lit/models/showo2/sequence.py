"""Text and images in one sequence: where the images lie, and who attends to whom.

Attention is causal, but an image's own positions all see each other; this is the one place that decides between
FlexAttention and dense masks. Shapes: B sequences, M image slots per sequence, T positions, N positions of an image:
its time, then its tokens; h heads, d width of a head.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

from infotok_lit.batch import IMAGE_TOKEN_ID
from infotok_lit.models.common.language_model import required

Mask = Tensor | BlockMask
"""(B, 1, T, S) bool, True where a query may look; or the same as blocks for FlexAttention."""

OMNI_ATTENTION = "omni"
"""The name under which transformers' language model finds `attend`."""


def find_regions(input_ids: Tensor, images: int | None = None) -> Tensor:
    """(B, T) ids -> (B, M, 2): first position and length of each run of image slots.

    Sequences with fewer images than others get idle slots (0, 0), and so does a batch without any image.

    Args:
        images: M; without it, the ids are read, which waits for a device. The runs of a sequence that has more get
            the length -1, which no image has.
    """
    slots = (input_ids == IMAGE_TOKEN_ID).long()
    edges = torch.diff(slots, dim=1, prepend=slots.new_zeros(len(slots), 1), append=slots.new_zeros(len(slots), 1))
    counts = (edges == 1).sum(dim=1, keepdim=True)
    images = max(1, int(counts.max())) if images is None else images
    place = torch.arange(edges.shape[1], device=edges.device)
    starts, ends = (place.where(edges == sign, edges.shape[1]).sort(dim=1).values[:, :images] for sign in (1, -1))
    lengths = (ends - starts).where(counts <= images, -1)
    return torch.stack([starts, lengths], dim=2).where((starts < edges.shape[1]).unsqueeze(2), 0)


def insert_images(embeds: Tensor, regions: Tensor, times: Tensor, tokens: Tensor) -> Tensor:
    """Embeddings (B, T, D) with images written into their regions.

    Args:
        times: (B M, D), one per slot. That of an idle slot overwrites position 0, as in the official code, on which
            released weights depend.
        tokens: (B M, N - 1, D).

    Raises:
        SettingsError: if a region has another length than an image (`required` says when).
    """
    length, lengths = tokens.shape[1] + 1, regions[..., 1]
    fits = ((lengths == 0) | (lengths == length)).all()
    embeds = required(
        embeds,
        fits,
        lambda: (
            f"an image has {length} positions with its time, but the text leaves "
            f"{', '.join(map(str, sorted(set(lengths[lengths != 0].tolist()))))}: the image size and the processor's "
            "disagree, or an image was cut off"
        ),
    )
    rows = torch.arange(len(embeds), device=embeds.device)[:, None]
    embeds = embeds.index_put((rows, regions[..., 0]), times.unflatten(0, regions.shape[:2]).to(embeds.dtype))
    # The tokens of idle slots go to a position that is cut off again: to count them would wait for the device.
    places = token_places(regions, tokens.shape[1]).where((lengths > 0).unsqueeze(2), embeds.shape[1])
    padded = F.pad(embeds, (0, 0, 0, 1))
    return padded.index_put((rows[..., None], places), tokens.unflatten(0, regions.shape[:2]).to(embeds.dtype))[:, :-1]


def token_places(regions: Tensor, count: int) -> Tensor:
    """(B, M, N - 1) int64: the positions of each image's tokens, `count` of them, after that of its time."""
    return regions[..., :1] + torch.arange(1, count + 1, device=regions.device)


def build_mask(regions: Tensor, length: int, flex: bool | None = None) -> Mask:
    """The mask of sequences of `length` positions; build it once and give it to every layer and every step.

    Args:
        regions: (B, M, 2) int64: first position and number of positions of each image.
        flex: use FlexAttention; default: on a GPU.
    """
    flex = regions.device.type == "cuda" if flex is None else flex
    if not flex:
        return dense_mask(regions, length)
    image = image_of_position(regions, length)

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (image[batch, query] == image[batch, key]) & (image[batch, query] >= 0)
        return (key <= query) | same

    return create_block_mask(allowed, len(regions), None, length, length, device=regions.device)


def dense_mask(regions: Tensor, length: int) -> Tensor:
    """(B, 1, T, T) bool: position q sees k if k <= q, or if both lie in one image."""
    image = image_of_position(regions, length)
    same = (image.unsqueeze(2) == image.unsqueeze(1)) & (image >= 0).unsqueeze(2)
    place = torch.arange(length, device=regions.device)
    return (same | (place <= place.unsqueeze(1))).unsqueeze(1)


def image_of_position(regions: Tensor, length: int) -> Tensor:
    """(B, T) int64: which of its sequence's M images a position belongs to, -1 for text."""
    place = torch.arange(length, device=regions.device).view(1, -1, 1)
    start, count = regions[:, None, :, 0], regions[:, None, :, 1]
    inside = (place >= start) & (place < start + count)
    slots = torch.arange(regions.shape[1], device=regions.device)
    return torch.where(inside, slots, -1).amax(dim=2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, scale: float) -> Tensor:
    """(B, h, T, d) queries on (B, h', S, d) keys and values, where h' divides h.

    Without a mask: causal; but queries see everything where there are more keys, those of a cache.
    """
    # Norms make queries and keys float32 under autocast; kernels take one type, and values have the wanted one.
    query, key = query.to(value.dtype), key.to(value.dtype)
    grouped = query.shape[1] != key.shape[1]
    if isinstance(mask, BlockMask):
        return _flex(query.device.type)(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)
    causal = mask is None and query.shape[2] == key.shape[2]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


@cache
def _flex(device_type: str) -> Callable[..., Tensor]:
    # Only its compiled form saves memory; elsewhere it is the slow reference that tests compare with. Dynamic, because
    # every length would be compiled anew, and after eight of them none.
    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


def _attend_for_transformers(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | None,
    scaling: float,
    **_unused: object,
) -> tuple[Tensor, None]:
    """`attend` with the signature that transformers calls."""
    return attend(query, key, value, attention_mask, scaling).transpose(1, 2), None


AttentionInterface.register(OMNI_ATTENTION, _attend_for_transformers)
