"""FSDP2: every process keeps its share of weights, gradients and optimiser states.

Zhao et al. 2023 (arXiv 2304.11277); `torch.distributed.fsdp.fully_shard`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from infotok_lit.errors import SettingsError
from infotok_lit.models.unified import UnifiedModel
from infotok_lit.objective.config import ObjectiveConfig
from infotok_lit.objective.infotok import InfoTok

OLDEST_TORCH = "2.13"
"""The first whose `fully_shard` is known to follow tensors in dataclasses."""
BASE_ENTRIES = (
    "understanding",
    "generation",
    "reconstruction",
    "understood_tokens",
    "last_hidden_states",
    "project_for_llm",
    "describe",
    "generate",
)
"""The methods by which the base model is computed with from outside."""
HEADS_ENTRIES = ("path", "posterior")
"""The same of the heads, beside `forward`."""


def is_sharded(module: nn.Module) -> bool:
    """Whether processes share the module's parameters out among themselves."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def gathered_state(module: nn.Module) -> dict[str, Tensor]:
    """The whole state dict of a sharded module in the first process's memory, nothing in the others'; collective."""
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def own_share(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its share, or all of one that is not shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_of_shares(value: Tensor, like: Tensor) -> Tensor:
    """A number added up over the processes that share a tensor out; itself where it is not."""
    if not isinstance(like, DTensor):
        return value
    value = value.detach().clone()
    dist.all_reduce(value, group=like.device_mesh.get_group(like.device_mesh.ndim - 1))
    return value


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all entries of at least one tensor, a scalar: all shared out, or none; a collective call."""
    norm = torch.nn.utils.get_total_norm([own_share(tensor) for tensor in tensors])
    return sum_of_shares(norm.square(), tensors[0]).sqrt() if isinstance(tensors[0], DTensor) else norm


@contextmanager
def gradients_aside(*modules: FSDPModule) -> Iterator[None]:
    """Inside, no parameter has a gradient but from the backward pass made inside; outside, each has the one it had.

    What lies outside blocks is gathered for that backward pass, and again after it for the step's own.
    """
    reshard(*modules)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    for module in modules:
        module.unshard()
    yield
    for parameter, gradient in zip(parameters, kept, strict=True):
        parameter.grad = gradient
    for module in modules:
        module.unshard()


def shard(base: UnifiedModel, heads: InfoTok, mesh: DeviceMesh) -> None:
    """Leave to this process its share of all parameters but the autoencoder's, in place.

    The repeated blocks are gathered one at a time; what lies outside them stays gathered from a forward pass to the end
    of the backward pass.

    Args:
        mesh: (data_parallel, tensor_parallel): copies of the weights, and the processes that share one copy out.

    Raises:
        SettingsError: for an older torch, which would train wrongly: it overlooks tensors in what the model returns.
    """
    if torch.__version__ < OLDEST_TORCH:
        raise SettingsError(
            f"sharding needs torch {OLDEST_TORCH}, and this is {torch.__version__}: upgrade, or use ddp"
        )
    mesh = mesh if mesh["data_parallel"].size() > 1 else mesh["tensor_parallel"]
    processes = mesh.size(mesh.ndim - 1)

    def dimension(parameter: nn.Parameter) -> Shard | None:
        # By rows, but a table of positions (1, N, D) by its places: other dimensions must divide evenly.
        even = [dim for dim, size in enumerate(parameter.shape) if size % processes == 0]
        return Shard(even[0]) if even and parameter.shape[0] < processes else None

    # Frozen, small, and entered by many ways.
    whole = set(base.autoencoder.parameters()) if hasattr(base, "autoencoder") else set()
    for block in repeated_blocks(base):
        fully_shard(block, mesh=mesh, shard_placement_fn=dimension)
    fully_shard(base, mesh=mesh, shard_placement_fn=dimension, ignored_params=whole)
    fully_shard(heads, mesh=mesh, shard_placement_fn=dimension)
    for module in (base, heads):
        # Not after a backward pass that is only watched: the graph of the heads reads the base's embedding table.
        module.set_reshard_after_backward(False, recurse=False)
    # Balance measures gradients at the very tokens that the model made, so FSDP must not put others in their place.
    heads.register_forward_pre_hook(_hide, prepend=True, with_kwargs=True)
    heads.register_forward_pre_hook(_show, with_kwargs=True)
    base.in_step = True
    _gather_for(base, BASE_ENTRIES)
    _gather_for(heads, HEADS_ENTRIES)


def refuse_captioning(objective: ObjectiveConfig) -> None:
    """SettingsError for the term that a sharded model cannot have."""
    if "captioning" in objective.active_terms("generation"):
        raise SettingsError(
            "captioning runs the language model backward within the forward pass, which a sharded model does not "
            "allow: take captioning out of objective.terms, or leave out --config trainer/fsdp"
        )


def reshard(*modules: nn.Module) -> None:
    """Let go of what lies outside blocks and was gathered: after a step's backward pass, or where none follows."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()


def repeated_blocks(base: UnifiedModel) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules, which are what a network repeats."""
    waiting = [child for name, child in base.named_children() if name != "autoencoder"]
    while waiting:
        module = waiting.pop()
        if isinstance(module, nn.ModuleList):
            yield from module
        else:
            waiting += module.children()


class _Hidden:
    """Arguments that FSDP does not look into."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.arguments = args, kwargs


def _hide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (_Hidden(args, kwargs),), {}


def _show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args[0].arguments


def _gather_for(module: nn.Module, entries: Sequence[str]) -> None:
    """Have a module's own parameters gathered for these methods too, as they are for `forward`; once if they nest."""
    inside = False

    def outermost(plain: Callable[..., Any], gathering: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return plain(*args, **kwargs)
            inside = True
            try:
                return gathering(*args, **kwargs)
            finally:
                inside = False

        return call

    for entry in entries:
        plain = getattr(module, entry)
        register_fsdp_forward_method(module, entry)
        setattr(module, entry, outermost(plain, getattr(module, entry)))
