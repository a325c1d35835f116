"""Numbers that are not finite: such a step leaves the weights as they are, and the run stops when it next logs."""

import math
from collections.abc import Iterator, Mapping

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from infotok_lit.batch import Batch
from infotok_lit.errors import ExplainedError
from infotok_lit.modules.optimiser import MaskedAdamW
from infotok_lit.modules.sharding import own_share
from infotok_lit.objective.distributed import global_sum

SHOWN = 8
UNLOGGED_EVERY = 50
"""A run that never logs is checked at every so many-th step, as Lightning's default logs."""


class NonFiniteError(ExplainedError, RuntimeError):
    """A loss or a gradient is NaN or infinite; the message names the step, the term, the samples and the way back."""


class FiniteGuard:
    """Watches losses and gradients on the device; only `check`, at the steps that log, reads and compares processes.

    Between those steps a bad one is made harmless: a process with a bad loss makes all gradients NaN, so that every
    process has NaN after their average, and a step with such gradients is masked by the optimiser.
    """

    def __init__(self) -> None:
        self._first_losses: tuple[tuple[str, ...], Tensor] | None = None
        """Names, and (1 + losses,): the first bad step since the last check, or -1, and its losses."""
        self._first_norms: tuple[tuple[str, ...], Tensor] | None = None
        """The same of gradients' norms."""
        self._samples: dict[int, dict[str, list[str]]] = {}

    def watch_losses(self, parts: Mapping[str, Tensor], batch: Mapping[str, Batch], step: int) -> Tensor:
        """The sum of the parts; a sum whose gradients are NaN if one of them is not finite."""
        values = torch.stack([value.detach().float() for value in parts.values()])
        self._first_losses = _first_bad(self._first_losses, tuple(parts), values, step)
        self._samples.setdefault(step, {name: [] for name in batch})
        for name, part in batch.items():
            self._samples[step][name] += part.names
        spoiled = torch.where(values.isfinite().all(), 1.0, torch.nan)
        return torch.stack(list(parts.values())).sum() * spoiled

    def watch_gradients(self, norms: Mapping[str, Tensor], step: int, remember: bool) -> Tensor:
        """Whether the optimiser must leave the weights alone: 1 or 0, a float scalar, equal on every process.

        Args:
            norms: of the gradients after their average over processes.
            step: global step.
            remember: False where a GradScaler looks for overflows itself, which are no fault of the run.
        """
        values = torch.stack(list(norms.values()))
        if remember:
            self._first_norms = _first_bad(self._first_norms, tuple(norms), values, step)
        return (~values.isfinite().all()).float()

    def finish_step(self, norms: Mapping[str, Tensor], optimiser: MaskedAdamW, module: pl.LightningModule) -> None:
        """Mask a step that is not finite, and check if the step logs, or now and then where none does; collective.

        Args:
            norms: of the gradients after their average over processes.
            optimiser: which is about to make the step.
        """
        trainer = module.trainer
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        optimiser.mask(self.watch_gradients(norms, trainer.global_step, remember=not scaled))
        if (trainer.global_step + 1) % (trainer.log_every_n_steps or UNLOGGED_EVERY) == 0:
            self.check(module, trainer)

    def check(self, module: nn.Module, trainer: pl.Trainer) -> None:
        """Raise NonFiniteError, on every process, if any has met a bad number since the last check; collective."""
        found = [first for first in (self._first_losses, self._first_norms) if first is not None]
        samples, self._samples = self._samples, {}
        self._first_losses = self._first_norms = None
        if not found or not global_sum(torch.stack([(first[0] >= 0).float() for _, first in found])).any():
            return
        where = ""
        for names, (step, *values) in ((names, first.tolist()) for names, first in found):
            if step < 0:
                continue
            bad = {name: value for name, value in zip(names, values, strict=True) if not math.isfinite(value)}
            numbers = ", ".join(f"{name} = {value}" for name, value in bad.items())
            where = f"step {step:.0f}: not finite: {numbers}. Samples: {'; '.join(_named(bad, samples[int(step)]))}"
            break
        raise NonFiniteError(
            f"{where or 'another process met a loss that is not finite'}. No weight was changed by it. "
            f"{_way_back(module, trainer)}"
        )


def _first_bad(
    first: tuple[tuple[str, ...], Tensor] | None, names: tuple[str, ...], values: Tensor, step: int
) -> tuple[tuple[str, ...], Tensor]:
    """The earlier of what is remembered and these values, without reading them."""
    now = torch.cat([values.new_full((1,), float(step)), values])
    now = now.where(~values.isfinite().all(), torch.full_like(now, -1.0))
    return names, now if first is None else torch.where(first[1][0] >= 0, first[1], now)


def _named(bad: Mapping[str, float], samples: Mapping[str, list[str]]) -> Iterator[str]:
    """The samples of each branch that a bad number belongs to; of all for a gradient, which belongs to none."""
    prefixes = {name.split("/")[0] for name in bad}
    for branch, names in samples.items():
        if branch in prefixes or not prefixes & samples.keys():
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            yield f"{branch}: {', '.join(names[:SHOWN])}{more}"


def _way_back(module: nn.Module, trainer: pl.Trainer) -> str:
    broken = [name for name, parameter in module.named_parameters() if not own_share(parameter).isfinite().all()]
    if broken:
        return (
            f"The weights themselves are not finite ({broken[0]}, {len(broken)} in all): what model.init_from or "
            "--ckpt_path names is damaged, so start from another file or an earlier checkpoint."
        )
    callback = trainer.checkpoint_callback
    last = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
    advice = "Lower optimiser.lr or the weights of objective, or remove the samples."
    return f"The last good checkpoint is {last}. {advice}" if last else f"There is no checkpoint yet. {advice}"
