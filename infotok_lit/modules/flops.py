"""Counting floating-point operations while they run, and what a device could run at most."""

import contextlib
import warnings
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

PEAKS = (("h200 nvl", 835.5e12), ("h100 nvl", 835.5e12), ("h200", 989.4e12), ("b200", 2250e12))
"""Part of a card's name -> its dense peak in 16 bits: of cards that Lightning does not know, or knows with sparsity."""


class FlopCount(TorchDispatchMode):
    """While it is active, `total` grows by the floating-point operations of what runs, backward passes among it.

    A multiplication with its addition counts two; activations that are computed again count again. What is compiled
    runs uncompiled meanwhile, as its operations could not be seen: FlexAttention then holds one layer's scores.
    """

    supports_higher_order_operators = True  # FlexAttention is one

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._uncompiled = contextlib.ExitStack()

    def __enter__(self) -> "FlopCount":
        """Count from now on."""
        self._uncompiled.enter_context(torch.compiler.set_stance("force_eager"))
        self._uncompiled.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Count no more."""
        super().__exit__(*exception)
        self._uncompiled.close()

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

    It is the dense peak, without sparsity.
    """
    kind = next((dtype for name, dtype in TYPES.items() if str(precision).startswith(name)), torch.float32)
    if device.type == "cuda" and kind.itemsize == 2:
        name = torch.cuda.get_device_name(device).lower()
        for card, peak in PEAKS:
            if card in name:
                return peak
    with contextlib.suppress(ValueError, NotImplementedError, RuntimeError):
        return get_available_flops(device, kind)
    return None


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, *(_for_each_head(query, one) for one in (key, value)))


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, *(_for_each_head(query, one) for one in (key, value)))


def _flex_backward(query: Tensor, key: Tensor, value: Tensor, made: Tensor, *_: Any, **__: Any) -> int:
    return _attention_backward(made, query, key, value)


def _for_each_head(query: Tensor, shared: Tensor) -> tuple[int, ...]:
    """The shape of keys or values (B, h, T, d), had each head of the query its own."""
    return (shared.shape[0], query.shape[1], *shared.shape[2:])


FORMULAS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    **{
        getattr(aten, f"_scaled_dot_product_{name}"): formula
        for kernel in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
        for name, formula in ((kernel, _attention), (f"{kernel}_backward", _attention_backward))
    },
    torch.ops.higher_order.flex_attention: _attention,
    torch.ops.higher_order.flex_attention_backward: _flex_backward,
}
"""Operation -> how many floating-point operations it takes. Torch's own list refuses heads that share keys and values,
and lacks attention on a CPU and, before 2.13, FlexAttention. All attention counts as if nothing were masked."""
