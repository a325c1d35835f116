"""Counting floating-point operations while they run, and what a device could run at most."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
TYPES = {"bf16": torch.bfloat16, "16-": torch.float16, "32-": torch.float32, "64-": torch.float64}
"""How the name of a precision begins -> the type of its matrix products."""


class FlopCount(TorchDispatchMode):
    """While it is active, `total` grows by the floating-point operations of what runs, backward passes among it.

    A multiplication with its addition counts two; activations that are computed again count again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: tuple[type, ...], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        self.total += flops_of(func, args, kwargs, made)
        return made


def flops_of(func: Any, args: Any, kwargs: Mapping[str, Any], made: Any) -> int:
    """The floating-point operations of one operation of torch: 0 for what is no product, convolution or attention."""
    formula = FORMULAS.get(getattr(func, "_overloadpacket", func))
    return 0 if formula is None else formula(*args, **kwargs, out_val=made)


def most_flops(device: torch.device, precision: str) -> float | None:
    """What a device can compute in a second by its maker's word, in a Trainer's precision; None where it is not known.

    It is torch's dense peak, without sparsity.
    """
    kind = next((dtype for name, dtype in TYPES.items() if str(precision).startswith(name)), torch.float32)
    with contextlib.suppress(ValueError, NotImplementedError, RuntimeError):
        return get_available_flops(device, kind)
    return None


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


FORMULAS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Operation -> how many floating-point operations it takes; torch's own list lacks attention on a CPU."""
