"""The losses of an embedded model on two devices, from the same weights, samples and random numbers."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor
from torch.overrides import TorchFunctionMode

from infotok_lit.batch import BRANCHES
from infotok_lit.modules import HarmonModule, OpenUniModule, Showo2Module
from infotok_lit.modules.infotok_module import InfoTokModule
from infotok_lit.modules.losses import loss_parts
from infotok_lit.objective.config import ObjectiveConfig
from infotok_lit.objective.term import PAPER_TERMS
from infotok_lit.scenes import Scenes
from infotok_lit.seeding import isolated_rng

MODULES: Mapping[str, type[InfoTokModule]] = {
    module.family: module for module in (HarmonModule, Showo2Module, OpenUniModule)
}
SAMPLES = 8
FACTORIES = (torch.rand, torch.randn, torch.randint)
LIKE = (torch.rand_like, torch.randn_like)


class RandomOnCPU(TorchFunctionMode):
    """Inside, random tensors are drawn on the CPU, whatever the device that they are for: so all devices draw alike."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Draw and move."""
        kwargs = dict(kwargs or {})
        if func in FACTORIES:
            device = kwargs.pop("device", None)
            return func(*args, **kwargs).to(device)
        if func in LIKE:
            return func(args[0].cpu(), *args[1:], **kwargs).to(args[0].device)
        return func(*args, **kwargs)


def largest_difference(family: str, device: str) -> float:
    """How far losses and terms on a device are from the CPU's, at most, in parts of max(1, the CPU's)."""
    with torch.random.fork_rng(), full_float32():
        torch.manual_seed(0)
        module = MODULES[family](
            init_from="embedded",
            # Embedded weights, fresh heads.
            objective=ObjectiveConfig(terms=PAPER_TERMS),
        )
        module.configure_model()
        wanted, found = (all_losses(module, torch.device(place)) for place in ("cpu", device))
    differences = [abs(found[name] - value) / max(1.0, abs(value)) for name, value in wanted.items()]
    # max() overlooks a NaN that is not its first.
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def all_losses(module: InfoTokModule, device: torch.device) -> dict[str, float]:
    """Every summand of the loss on the first samples of Scenes."""
    import numpy as np

    module.to(device)
    source, processor, results = Scenes(num_samples=SAMPLES), module.base.processor, {}
    for branch in BRANCHES:
        samples = [source.sample(branch, index, np.random.default_rng(index)) for index in range(SAMPLES)]
        batch = move_data_to_device(getattr(processor, branch)(samples), device)
        with torch.no_grad(), isolated_rng(0, device), RandomOnCPU():
            results[branch] = module.run_branch(branch, batch)
    parts: Mapping[str, Tensor] = loss_parts(module.task_weights, results)
    return {name: float(value) for name, value in parts.items()}


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, products of float32 are computed in float32, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
