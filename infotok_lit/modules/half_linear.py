"""Frozen matrices in bfloat16, the precision in which autocast multiplies by them anyway: half of their memory."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from infotok_lit.modules.lora import BASE


class HalfLinear(nn.Linear):
    """A linear layer whose weights are kept in bfloat16.

    Under autocast to bfloat16 it computes bit by bit what the layer that it was made of did; elsewhere in the precision
    of its input, with rounded weights.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def halve_frozen_layers(base: nn.Module) -> None:
    """Keep the frozen linear layers in bfloat16, in place; to be called once adapters are on.

    Not the autoencoder, which computes in float32; nor norms, tables and convolutions, whose results would change: they
    are small.
    """
    owners: dict[nn.Parameter, int] = {}
    for _, parameter in base.named_parameters(remove_duplicate=False):
        owners[parameter] = owners.get(parameter, 0) + 1
    for name, layer in list(base.named_modules()):
        # Exactly nn.Linear: what is derived from it may use its weight in another way.
        if type(layer) is not nn.Linear or name.startswith("autoencoder."):
            continue
        if any(parameter.requires_grad or owners[parameter] > 1 for parameter in layer.parameters()):
            continue
        half = HalfLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        for key, parameter in layer.named_parameters():
            setattr(half, key, nn.Parameter(parameter.detach().bfloat16(), requires_grad=False))
        base.set_submodule(name, half.train(layer.training))


def warn_of_rounding(precision: str) -> None:
    """Say what halved layers change under a precision of Lightning's, if they change anything."""
    if precision != "bf16-mixed":
        rank_zero_warn(
            f"model.halve_frozen: trainer.precision {precision} computes with frozen linear layers rounded to bfloat16 "
            "(8 significant bits), so losses and gradients are others than without it; bf16-mixed rounds them anyway. "
            "Set trainer.precision to bf16-mixed, or model.halve_frozen to false"
        )


def is_halved(base: nn.Module) -> bool:
    """Whether `halve_frozen_layers` found something to halve."""
    return any(isinstance(module, HalfLinear) for module in base.modules())


def with_originals(state: Mapping[str, Tensor], base: nn.Module, originals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a base model with what its halved layers were made of in their place.

    Args:
        originals: by the names of a model without adapters.
    """
    halved = (
        f"{name}.{key}"
        for name, layer in base.named_modules()
        if isinstance(layer, HalfLinear)
        for key, _ in layer.named_parameters()
    )
    return {**state, **{name: originals[name.replace(BASE, ".")] for name in halved}}
