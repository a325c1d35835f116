"""Sums, means and gathers over the global batch. Without a process group every function is the local one.

Convention: gradients are averaged over ranks afterwards (DDP). A rank returns its own share of a global number, scaled
so that this average is the gradient of the number that one process with the whole batch would compute.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from infotok_lit.errors import SettingsError


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if _initialised() else 1


def rank() -> int:
    """Index of this process; 0 without a process group."""
    return dist.get_rank() if _initialised() else 0


def global_sum(local: Tensor) -> Tensor:
    """The sum over ranks of a detached tensor, equal on every rank."""
    total = local.detach().clone(memory_format=torch.contiguous_format)
    if _initialised():
        dist.all_reduce(total)
    return total


def global_mean(total: Tensor, count: Tensor | float) -> Tensor:
    """This rank's share of a mean over the global batch: its average over ranks is sum(totals) / sum(counts).

    Dividing by the local count instead would weigh a rank's elements by how few they are. A global count of 0 gives 0.

    Args:
        total: scalar, the local sum, with its graph.
        count: how many elements were summed here.
    """
    # Filled in on the device: a number that is copied there would be waited for.
    count = count.to(total.dtype) if isinstance(count, Tensor) else total.new_full((), count)
    return total * world_size() / global_sum(count).clamp(min=1)


def gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows of all ranks, in rank order, with gradients back to the rank that each row came from.

    Args:
        tensors: (B, ...) each, the same B.

    Returns:
        (world * B, ...) each.

    Raises:
        SettingsError: ranks hold batches of different size.
    """
    return RowGatherer()(tensors, known=False)


class RowGatherer:
    """`gather_rows` that asks the other ranks for their number of rows no more than it must.

    To ask costs a collective and a read-back, which a training step should not wait for. Training batches have one
    size, so they are compared once, and again when the own size changes.
    """

    def __init__(self) -> None:
        self.equal_rows: int | None = None

    def __call__(self, tensors: tuple[Tensor, ...], known: bool) -> tuple[Tensor, ...]:
        """(B, ...) each -> (world * B, ...) each; `known`: batches are of one size from call to call."""
        if world_size() == 1:
            return tensors
        rows = len(tensors[0])
        if not known or rows != self.equal_rows:
            _refuse_unequal_rows(rows, tensors[0].device)
            self.equal_rows = rows
        return tuple(_GatherRows.apply(tensor) for tensor in tensors)


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _refuse_unequal_rows(rows: int, device: torch.device) -> None:
    """Costs one read-back; a collective on unequal shapes would hang or return garbage instead of failing."""
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([rows], device=device))
    per_rank = torch.cat(sizes).tolist()
    if len(set(per_rank)) > 1:
        raise SettingsError(
            "Comparing images across ranks needs equal batches on all of them, "
            f"not {per_rank}; drop the last, partial batch."
        )


class _GatherRows(torch.autograd.Function):
    """Forward: concatenate over ranks. Backward: every rank used these rows, so their gradients are summed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return global_sum(gradient).narrow(0, rank() * ctx.rows, ctx.rows)
