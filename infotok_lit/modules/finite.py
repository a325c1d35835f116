"""Stop a run at the first number that is not finite, before it reaches the weights."""

import math
from collections.abc import Iterable, Mapping
from itertools import chain

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from infotok_lit.batch import Batch
from infotok_lit.errors import ExplainedError

SHOWN = 8


class NonFiniteError(ExplainedError, RuntimeError):
    """A loss or a gradient is NaN or infinite; the message names the step, the term, the samples and the way back."""


def check_finite_losses(parts: Mapping[str, Tensor], batch: Mapping[str, Batch], trainer: pl.Trainer) -> None:
    """Raise NonFiniteError, on every rank, if any summand of the loss on any rank is not finite."""
    values = torch.stack([value.detach() for value in parts.values()])
    # Reading this from the device is the price of never stepping on a bad loss.
    if trainer.strategy.reduce_boolean_decision(bool(torch.isfinite(values).all()), all=True):
        return
    bad = {name: value for name, value in zip(parts, values.tolist(), strict=True) if not math.isfinite(value)}
    if not bad:
        raise NonFiniteError(f"step {trainer.global_step}: another process met a loss that is not finite")
    numbers = ", ".join(f"{name} = {value}" for name, value in bad.items())
    samples = "; ".join(_sample_names(branch, batch) for branch in sorted({name.split("/")[0] for name in bad}))
    raise NonFiniteError(f"step {trainer.global_step}: not finite: {numbers}. Samples: {samples}. {_way_back(trainer)}")


def check_finite_gradients(base: Iterable[nn.Parameter], heads: Iterable[nn.Parameter], trainer: pl.Trainer) -> Tensor:
    """The norm of the whole gradient; NonFiniteError if it is not finite."""
    gradients = [parameter.grad for parameter in chain(base, heads) if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if not torch.isfinite(norm):
        raise NonFiniteError(f"step {trainer.global_step}: the gradient's norm is {float(norm)}. {_way_back(trainer)}")
    return norm


def _sample_names(branch: str, batch: Mapping[str, Batch]) -> str:
    names = batch[branch].names
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{branch}: {', '.join(names[:SHOWN])}{more}"


def _way_back(trainer: pl.Trainer) -> str:
    callback = trainer.checkpoint_callback
    last = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
    advice = "Lower optimiser.lr or the objective's weight, or remove the samples."
    return f"The last good checkpoint is {last}. {advice}" if last else f"There is no checkpoint yet. {advice}"
