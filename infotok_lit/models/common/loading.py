"""Models that begin with weights from files: nothing is drawn that a file replaces, and nothing is copied for long."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from infotok_lit.checkpoints import KeyMap

DRAWING = ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "erfinv_")
"""What fills a tensor in place with random numbers, or helps to: names that torch, its `nn.init`, and what libraries
put around that have in common."""

SMALL = 2**20
"""Bytes below which a tensor is worth no mapping."""


class _UndrawnWeights(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__name__", None) in DRAWING:
            # torch.nn.init names what it fills.
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextmanager
def without_initial_weights() -> Iterator[None]:
    """Inside, a model is built on the CPU with weights that were not drawn, all of which are to come from files.

    Memory that is not written to takes none, so such weights are as cheap as those of torch's meta device. But what a
    model computes as it is built and keeps in no file, such as frequencies, is there.
    """
    with torch.device("cpu"), _UndrawnWeights():
        yield


def adopt_tensors(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Let the parameters and buffers that a state dict names have its tensors, without a copy of what is large.

    Tied weights stay tied. A tensor that is mapped from a file is read when it is used, once for all processes of a
    machine, and the file is not written to.
    """
    with torch.no_grad():
        for name, own in model.state_dict(keep_vars=True).items():
            if name in state:
                value = state[name].to(own.dtype)
                # A file's tensors are not aligned, and on such memory torch's kernels round differently. Small models
                # are to compute bit by bit what was trained.
                own.data = value.clone() if value.nbytes < SMALL else value


def adopt_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """`adopt_tensors` with all of a model's tensors, under their own names.

    Raises:
        CheckpointError: naming what is missing, unexpected or mis-shaped.
    """
    adopt_tensors(model, KeyMap(renames=()).from_official(state, model.state_dict(), source))
