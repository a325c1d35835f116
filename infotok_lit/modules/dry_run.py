"""Training steps on tensors without values: what they hold and compute, of any size, in seconds and little memory.

The Trainer runs the module's own step, backward pass and optimiser, so what is counted is what a fit does, whatever it
does. Weights, images and all that comes of them have a shape and no values (torch's FakeTensor); masks, token ids and
random choices are real, so that what depends on them has the shape that it would have.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from infotok_lit.modules.flops import flops_of
from infotok_lit.modules.two_steps import run_two_steps

aten = torch.ops.aten
CPU = torch.device("cpu")
BY_MASK = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index_put.default)
WEIGHTS, BUFFERS, GRADIENTS, STATES = "parameters", "buffers", "gradients", "optimiser states"
PASSING = "passing"
"""What is none of these, nor an activation of a part of the model: intermediate results of the backward pass and of the
optimiser, gradients that are kept from one branch to the next, and the batch."""


@dataclass
class DryRun:
    """What a training step holds and computes."""

    phases: dict[str, Counter[str]] = field(default_factory=dict)
    """`forward`, `backward`, `optimiser` -> bytes at the worst moment, by what they are for: `parameters`, `buffers`,
    `gradients`, `optimiser states`, `passing`, and for activations the name of the part of the model that made them.
    What is differentiated before the forward pass of the next branch counts as `forward`."""
    flops: int = 0
    """Floating-point operations of an optimiser step that does not log, two for each multiplication with its addition;
    activations that are computed again count again."""

    @property
    def worst(self) -> str:
        """The phase of the worst moment."""
        return max(self.phases, key=lambda phase: self.phases[phase].total())

    @property
    def held(self) -> Counter[str]:
        """Bytes at the worst moment, by what they are for."""
        return self.phases[self.worst]

    @property
    def peak(self) -> int:
        """Bytes at the worst moment."""
        return self.held.total()


def dry_run(
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    on_card: bool = True,
    callbacks: Sequence[pl.Callback] = (),
    **trainer_settings: Any,
) -> DryRun:
    """Two optimiser steps without values: operations are those of the first, and memory that of the second, which has
    all states, and logs.

    Args:
        module: not yet configured; its weights are never made, and it is of no use afterwards.
        data: real samples; the text of the first batches decides the lengths of sequences.
        on_card: whether attention and norms keep what they keep on a card, or on a CPU.
        callbacks: what else acts in a step.
        trainer_settings: what shapes a step: precision, accumulate_grad_batches, gradient_clip_val.
    """
    ledger = Ledger()
    recorder = Recorder(ledger)
    with ledger, card_kernels() if on_card else nullcontext():
        strategy = DryStrategy(ledger)
        run_two_steps(module, data, [*callbacks, recorder], accelerator="cpu", strategy=strategy, **trainer_settings)
    return recorder.result


@contextmanager
def card_kernels() -> Iterator[None]:
    """Inside, operations that are one kernel on a card keep what that kernel keeps; on a CPU they keep more.

    Attention that drops scores keeps none of them, and a norm its argument and a number for each row. These stand in
    for torch's functions: a mode of torch's would not be there when activations are computed again.
    """
    attention, norm = F.scaled_dot_product_attention, F.rms_norm

    def without_dropout(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        *others: Any,
        **options: Any,
    ) -> Tensor:
        return attention(query, key, value, attn_mask, 0.0, *others, **options)

    def fused(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return _CardNorm.apply(x, weight)

    F.scaled_dot_product_attention, F.rms_norm = without_dropout, fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm = attention, norm


class _CardNorm(torch.autograd.Function):
    """The shapes of torch's fused norm over the last dimension, and no values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


class Ledger(TorchDispatchMode):
    """While it is active, operations on tensors without values are counted, and the memory of all tensors is."""

    def __init__(self) -> None:
        super().__init__()
        self.held: Counter[str] = Counter()
        self.worst: Counter[str] = Counter()
        self.flops = 0
        self.label = PASSING
        """What tensors made from now on are for."""
        self._total = self._peak = 0
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._labels: dict[int, tuple[str, int]] = {}

    def begin(self) -> None:
        """Forget the worst moment so far."""
        self._peak, self.worst = self._total, self.held.copy()

    def without_values(self, tensor: Tensor, label: str | None = None) -> FakeTensor:
        """A tensor of the same shape and type that lies on the CPU, as far as its operations know."""
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        made = FakeTensor(self._fake, like, CPU)
        self._enter(made, label)
        return made

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Say what a tensor has turned out to be for."""
        key = tensor.untyped_storage()._cdata
        before, size = self._labels.get(key, (label, 0))
        self._labels[key] = (label, size)
        self.held[before] -= size
        self.held[label] += size

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: tuple[type, ...], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation: really if all its tensors have values, else for its shapes."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if any(issubclass(one, FakeTensor) for one in types):
            if func is aten._local_scalar_dense.default:
                return _some_value(args[0].dtype)
            if func in BY_MASK:
                args = (args[0], _places(args[1]), *args[2:])
            args = [self._shapes(argument) for argument in args]
        made = func(*args, **kwargs)
        self.flops += flops_of(func, args, kwargs, made)
        for tensor in made if isinstance(made, list | tuple) else (made,):
            if isinstance(tensor, Tensor):
                self._enter(tensor)
        return made

    def _shapes(self, argument: Any) -> Any:
        if isinstance(argument, list | tuple):
            return [self._shapes(one) for one in argument]
        real = isinstance(argument, Tensor) and not isinstance(argument, FakeTensor)
        return self._fake.from_tensor(argument) if real else argument

    def _enter(self, tensor: Tensor, label: str | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._labels or (tensor.device.type == "meta" and not isinstance(tensor, FakeTensor)):
            return
        label, size = label or self.label, storage.nbytes()
        self._labels[key] = (label, size)
        self.held[label] += size
        self._total += size
        if self._total > self._peak:
            self._peak, self.worst = self._total, self.held.copy()
        weakref.finalize(storage, self._leave, key).atexit = False

    def _leave(self, key: int) -> None:
        label, size = self._labels.pop(key)
        self.held[label] -= size
        self._total -= size


class DryStrategy(SingleDeviceStrategy):
    """One device, on which a module is built without values."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(CPU)
        self._ledger = ledger

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Inside, modules are built on meta."""
        with torch.device("meta"):
            yield

    def model_to_device(self) -> None:
        """Give all weights a device, keeping tied ones tied."""
        made: dict[int, Tensor] = {}
        # Tensors are kept until the end, so that no id is used twice.
        kept = []
        for module in self.lightning_module.modules():
            for own, label in ((module._parameters, WEIGHTS), (module._buffers, BUFFERS)):
                for name, tensor in own.items():
                    if tensor is None or isinstance(tensor, FakeTensor):
                        continue
                    kept.append(tensor)
                    if id(tensor) not in made:
                        made[id(tensor)] = self._twin(tensor, label)
                    own[name] = made[id(tensor)]

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Images lose their values; ids and masks keep theirs."""
        return apply_to_collection(batch, Tensor, partial(_without_values, self._ledger))

    def teardown(self) -> None:
        """There is nothing to move back."""

    def _twin(self, tensor: Tensor, label: str) -> Tensor:
        twin = self._ledger.without_values(tensor.detach(), label)
        return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


class Recorder(pl.Callback):
    """Says what memory is for, and keeps what the last step of a run holds and computes."""

    def __init__(self, ledger: Ledger) -> None:
        self.result = DryRun()
        self._ledger = ledger

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From now on, gradients and activations are told apart."""
        for parameter in pl_module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._found_gradient)
        for name, child in pl_module.base.named_children():
            for module in child.modules():
                module.register_forward_pre_hook(partial(self._enter_part, name))
            child.register_forward_hook(self._leave_part, always_call=True)
        for module in pl_module.infotok.modules():
            module.register_forward_pre_hook(partial(self._enter_part, "heads"))
        pl_module.infotok.register_forward_hook(self._leave_part, always_call=True)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Nothing is there yet but weights, states and the batch."""
        self._begin(PASSING)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """End of the forward pass."""
        self._end("forward", self._is_last(trainer))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End of the backward pass."""
        self._end("backward", self._is_last(trainer))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """End of the step; states are known now."""
        for optimiser in trainer.optimizers:
            for state in optimiser.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        self._ledger.relabel(value, STATES)
        is_over = trainer.global_step == trainer.max_steps
        self._end("optimiser", is_over or self._is_last(trainer))
        if self._is_last(trainer) and not self.result.flops:
            self.result.flops = self._ledger.flops

    def _is_last(self, trainer: pl.Trainer) -> bool:
        return trainer.global_step == trainer.max_steps - 1

    def _begin(self, label: str) -> None:
        self._ledger.label = label
        self._ledger.begin()

    def _end(self, phase: str, counts: bool) -> None:
        if counts:
            before = self.result.phases.get(phase, Counter())
            self.result.phases[phase] = max(before, self._ledger.worst.copy(), key=Counter.total)
        self._begin(PASSING)

    def _found_gradient(self, parameter: Tensor) -> None:
        self._ledger.relabel(parameter.grad, GRADIENTS)

    def _enter_part(self, part: str, *_: Any) -> None:
        self._ledger.label = part

    def _leave_part(self, *_: Any) -> None:
        self._ledger.label = PASSING


def _without_values(ledger: Ledger, tensor: Tensor) -> Tensor:
    return ledger.without_values(tensor) if tensor.is_floating_point() else tensor


def _some_value(dtype: torch.dtype) -> bool | int | float:
    """What is read where there are no values: nothing is wrong, and the size is harmless."""
    return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _places(index: Any) -> list[Tensor | None]:
    """An index with the places of masks that have values in the place of the masks."""
    found: list[Tensor | None] = []
    for one in index:
        is_mask = one is not None and one.dtype == torch.bool and not isinstance(one, FakeTensor)
        found += one.nonzero(as_tuple=True) if is_mask else [one]
    return found
