"""AdamW with the parameter groups of the official recipes, clipping by part, and warm-up followed by a cosine."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from infotok_lit.errors import SettingsError
from infotok_lit.modules.sharding import total_norm

WARMUP_START = 1e-5
"""The warm-up begins at this fraction of the learning rate."""
SHARDING_STRATEGIES = (DeepSpeedStrategy, FSDPStrategy)
HALF_PRECISIONS = ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16")


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW and its schedule.

    Args:
        lr: Learning rate of the base model. The InfoTok paper fine-tunes at a tenth of the official rate, which for
            Harmon is 1e-5.
        group_lr: Learning rates of parts of the base model that have their own, by prefix, such as
            `{encoder.semantic.: 2.0e-7}`; the longest prefix counts, and everything else has `lr`.
        heads_lr: Learning rate of the training-only heads, which start from nothing.
        weight_decay: Decoupled weight decay of the parameters that the official recipe decays.
        betas: Decay rates of the two moments.
        eps: What is added to the root of the second moment; it damps parameters whose gradients are not far above it.
        warmup_steps: Optimiser steps of linear warm-up.
        final_factor: The cosine ends at this fraction of the learning rate, at `trainer.max_steps`.
    """

    lr: float = 1e-6
    heads_lr: float = 1e-4
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    warmup_steps: int = 100
    final_factor: float = 0.0
    group_lr: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("lr", "heads_lr", "weight_decay", "eps", "warmup_steps", "final_factor"):
            if getattr(self, name) is None:
                raise SettingsError(f"optimiser.{name} is null; set it to a number, or leave it out")
        rates = (self.lr, self.heads_lr, *self.group_lr.values())
        if min(rates) < 0 or self.weight_decay < 0 or self.warmup_steps < 0:
            raise SettingsError("optimiser: learning rates, weight_decay and warmup_steps must not be negative")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise SettingsError(f"optimiser.betas must be two numbers from 0 to below 1, got {list(self.betas)}")
        if not self.eps > 0:
            raise SettingsError(f"optimiser.eps is {self.eps}; set it above 0")
        if not 0 <= self.final_factor <= 1:
            raise SettingsError(f"optimiser.final_factor must be in [0, 1], got {self.final_factor}")

    def restored(self) -> dict[str, Any]:
        """What resuming takes from the checkpoint, by name; the schedule's shape is recomputed from the config."""
        settings = {**asdict(self), "betas": list(self.betas)}
        recomputed = ("warmup_steps", "final_factor")
        return {f"optimiser.{name}": value for name, value in settings.items() if name not in recomputed}


class MaskedAdamW(AdamW):
    """AdamW whose step leaves weights and state as they are where `found_inf` is 1; nothing is read from the device.

    torch's fused kernel does that for a GradScaler. Here the mask is set by whoever clips, so the scaler must unscale
    gradients before clipping, as it does for an optimiser that is not fused.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, betas=betas, eps=eps, fused=True)
        self._step_supports_amp_scaling = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights, and forget gradients: they would take their memory during the next forward pass."""
        loss = super().step(closure)
        self.zero_grad()
        return loss

    def mask(self, found_inf: Tensor) -> None:
        """A float scalar, 1 or 0, for the next step."""
        self.found_inf = found_inf

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also of an older run, whose groups were not fused."""
        groups = [{**group, "fused": True, "foreach": None} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})


def clip_apart(
    parts: Mapping[str, Iterable[nn.Parameter]], most: float | None, algorithm: str | None
) -> dict[str, Tensor]:
    """Clip the gradients of each part by that part's own norm: heads must not decide how far the base moves.

    Args:
        parts: name -> parameters.
        most: the largest norm, or the largest entry; None or 0 clips nothing.
        algorithm: `norm` (default) or `value`.

    Returns:
        name -> the norm before clipping, a scalar; only of parts that have a gradient.
    """
    norms = {}
    for name, parameters in parts.items():
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        if not trained:
            continue
        norms[name] = total_norm([parameter.grad for parameter in trained])
        if most and algorithm == "value":
            torch.nn.utils.clip_grad_value_(trained, most)
        elif most:
            torch.nn.utils.clip_grads_with_norm_(trained, most, norms[name])
    return norms


def build_optimiser(
    config: OptimiserConfig, base: nn.Module, heads: nn.Module, decays: Callable[[str, nn.Parameter], bool]
) -> MaskedAdamW:
    """AdamW over the trainable parameters: the base model's by learning rate and decay, and the heads'.

    Args:
        decays: whether a parameter of `base` decays, by name.

    Raises:
        SettingsError: if nothing is trainable, or a prefix of `group_lr` matches no trainable parameter.
    """
    by_setting: dict[tuple[float, float], list[nn.Parameter]] = {}
    prefixes: dict[tuple[float, float], dict[str, None]] = {}
    used: set[str] = set()
    for name, parameter in base.named_parameters():
        if parameter.requires_grad:
            prefix = max((prefix for prefix in config.group_lr if name.startswith(prefix)), key=len, default=None)
            used |= set() if prefix is None else {prefix}
            lr = config.lr if prefix is None else config.group_lr[prefix]
            decay = config.weight_decay if decays(name, parameter) else 0.0
            by_setting.setdefault((lr, decay), []).append(parameter)
            prefixes.setdefault((lr, decay), {})[prefix or "base"] = None
    unused = sorted(config.group_lr.keys() - used)
    if unused:
        raise SettingsError(f"optimiser.group_lr: no trainable parameter starts with {', '.join(map(repr, unused))}")
    groups = [
        _group("+".join(prefix.rstrip(".") for prefix in prefixes[lr, decay]), parameters, lr, decay)
        for (lr, decay), parameters in by_setting.items()
    ]
    for decay in dict.fromkeys((config.weight_decay, 0.0)):
        own = [one for one in heads.parameters() if (config.weight_decay if one.ndim > 1 else 0.0) == decay]
        groups.append(_group("heads", own, config.heads_lr, decay))
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise SettingsError("nothing is trainable: `freeze` covers the whole model and no term builds a head")
    return MaskedAdamW(groups, config.betas, config.eps)


def warmup_cosine(optimiser: Optimizer, config: OptimiserConfig, max_steps: int) -> LambdaLR:
    """Linear warm-up, then a cosine that ends at step `max_steps`; SettingsError where that is -1, and there is no end.

    The cosine would be over as soon as the warm-up is, and the learning rate 0 from there.
    """
    if max_steps < 0:
        raise SettingsError("the learning rate's schedule ends at trainer.max_steps: set it, also beside max_epochs")

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return WARMUP_START + (1 - WARMUP_START) * step / max(1, config.warmup_steps - 1)
        progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return config.final_factor + (1 - config.final_factor) * cosine

    return LambdaLR(optimiser, factor)


def refuse_trainer(precision: str, strategy: Strategy) -> None:
    """SettingsError for what would train wrongly without a word, weights of 16 bits and sharded ones; and for 64 bits.

    Heads need 32 bits, and fine-tuning moves weights by less than 16 resolve.
    """
    if isinstance(strategy, SHARDING_STRATEGIES):
        raise SettingsError(
            f"trainer.strategy: {type(strategy).__name__} shards the model in a way that the objective's "
            "collectives do not support, so its processes would drift apart: to shard it, add --config trainer/fsdp"
        )
    if precision in HALF_PRECISIONS:
        raise SettingsError(
            f"trainer.precision: {precision} keeps the weights themselves in 16 bits, where updates of a "
            "fine-tuning's size are rounded away: set it to bf16-mixed. To save memory, use model.lora, "
            "model.freeze or model.activation_checkpointing"
        )
    if precision == "64-true":
        raise SettingsError(
            "trainer.precision: 64-true keeps the weights in 64 bits, but losses and terms are computed in 32, and the "
            "two do not meet: set it to 32-true"
        )


def freeze(module: nn.Module, prefixes: Iterable[str], exceptions: Iterable[str] = ()) -> None:
    """Stop training every parameter whose name starts with one of the prefixes and with none of the exceptions.

    Raises:
        SettingsError: for a prefix that matches nothing, or an exception that excepts nothing.
    """
    names, prefixes, exceptions = [name for name, _ in module.named_parameters()], tuple(prefixes), tuple(exceptions)
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            parts = sorted({name.split(".")[0] for name in names})
            raise SettingsError(
                f"freeze: no parameter starts with {prefix!r}; the model's parts are {', '.join(parts)}"
            )
    frozen = [name for name in names if name.startswith(prefixes)]
    for exception in exceptions:
        if not any(name.startswith(exception) for name in frozen):
            raise SettingsError(f"unfreeze: no parameter that `freeze` names starts with {exception!r}")
    for name in frozen:
        if not name.startswith(exceptions):
            module.get_parameter(name).requires_grad_(False)


def _group(name: str, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> dict[str, object]:
    """A parameter group; by its name the learning rate is logged."""
    return {
        "params": parameters,
        "lr": lr,
        "weight_decay": weight_decay,
        "name": name if weight_decay else f"{name}, no decay",
    }
