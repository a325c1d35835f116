"""Captioning: the language model is to read the caption off generation's tokens, which see a hidden or noisy image.

A rival of sufficiency: the language half of UNO (arXiv 2605.05781), whose reader is frozen as well. It acts in
generation only, and has no head: the reader is the model itself.

Shapes: B images, N tokens, D their width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from infotok_lit.objective.term import TermNats

CaptionReader = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Tokens (B, N, D) -> nats of each image's caption (B,), and its number of tokens (B,). No image sees another."""


def captioning(tokens: Tensor, read: CaptionReader) -> TermNats:
    """Cross entropy of the captions, in nats per image; its gradient goes to the tokens and to nothing else.

    The reader is run, and differentiated, at once: it stays frozen whatever else trains it, also in a placebo, and
    its activations are freed. What is kept is the gradient at the tokens, as a linear function of them.
    """
    if not (torch.is_grad_enabled() and tokens.requires_grad):
        return TermNats(*_read(tokens, read))
    read_tokens = tokens.detach().requires_grad_()
    nats, words = _read(read_tokens, read)
    (gradient,) = torch.autograd.grad(nats.sum(), read_tokens)
    moved = (tokens - tokens.detach()).float() * gradient.float()
    return TermNats(nats.detach() + moved.flatten(1).sum(1), words)


def _read(tokens: Tensor, read: CaptionReader) -> tuple[Tensor, Tensor]:
    nats, words = read(tokens)
    return nats.float(), words
