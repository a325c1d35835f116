"""Which texts an image is contrasted with: those of the batch, those of past batches, and how many of them.

Shapes: B local images, K candidate texts, H text width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infotok_lit.objective.config import NegativesConfig


class TextQueue(nn.Module):
    """The last texts of training, newest last, as further negatives; its state is in buffers, hence in the checkpoint.

    It holds what goes into the learned map and not what comes out, so the map of today applies to the texts of
    yesterday. That is why there is no slow copy of the map (the momentum encoder of He et al., 2020).
    """

    texts: Tensor
    keys: Tensor
    present: Tensor

    def __init__(self, size: int, text_width: int) -> None:
        super().__init__()
        self.register_buffer("texts", torch.zeros(size, text_width))
        self.register_buffer("keys", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("present", torch.zeros(size, dtype=torch.bool))

    def push(self, texts: Tensor, keys: Tensor, present: Tensor) -> None:
        """Add the rows of the global batch (K, H), (K,), (K,); the oldest leave."""
        for queue, new in ((self.texts, texts), (self.keys, keys), (self.present, present)):
            queue.copy_(torch.cat([queue, new.detach().to(queue.dtype)])[-len(queue) :])

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies, so that a push between the forward and the backward pass does no harm."""
        return self.texts.clone(), self.keys.clone(), self.present.clone()


def choose(eligible: Tensor, anchors: Tensor, texts: Tensor, config: NegativesConfig) -> Tensor:
    """At most `config.limit` of each row's eligible candidates.

    Args:
        eligible: (B, K) bool.
        anchors: (B, H) each row's own text.
        texts: (K, H) all candidate texts.

    Returns:
        (B, K) bool.
    """
    if config.limit is None or config.limit >= eligible.shape[1]:
        return eligible
    if config.kept == "nearest":
        score = F.normalize(anchors, dim=-1) @ F.normalize(texts, dim=-1).T
    else:
        score = torch.rand(eligible.shape, device=eligible.device)
    best = score.masked_fill(~eligible, -torch.inf).topk(config.limit, dim=1).indices
    return torch.zeros_like(eligible).scatter(1, best, True) & eligible
