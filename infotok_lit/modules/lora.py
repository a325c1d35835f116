"""Low-rank adapters (peft) on chosen linear layers, and the plain weights that they amount to.

An adapter is training-only in form, not in effect: what is exported, or started from, are weights with the adapters
merged in, under the names that the model has without them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from infotok_lit.errors import SettingsError

ADAPTER = "default"
BASE, DOWN, UP = ".base_layer.", f".lora_A.{ADAPTER}.", f".lora_B.{ADAPTER}."
"""How peft names the layer inside an adapted one, and the adapter's two matrices."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W x becomes W x + alpha / rank * B A x, with W frozen.

    Args:
        targets: Which linear layers: patterns of their names, in which `*` stands for anything, such as `llm.model.*`
            (all in it) or `*.q_proj`.
        rank: Rows of A and columns of B.
        alpha: Sets the scale, alpha / rank.
    """

    targets: tuple[str, ...]
    rank: int = 16
    alpha: float = 32.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if not self.targets:
            raise SettingsError("lora.targets is empty: name the layers that get adapters, or leave out lora")
        if self.rank < 1 or not self.alpha > 0:
            raise SettingsError(f"lora: rank and alpha must be positive, got {self.rank} and {self.alpha}")

    @property
    def scale(self) -> float:
        """Factor on what an adapter adds."""
        return self.alpha / self.rank


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Put adapters, which begin as zero, on the layers that the targets name, and freeze what is inside these layers.

    Raises:
        SettingsError: for a target that matches no linear layer, or a layer whose weight is also used elsewhere.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    names = _layers(model, config.targets)
    # peft freezes everything but its adapters; which parts are frozen is not its decision here.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = PeftConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=names)
    inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
    for parameter in trained:
        parameter.requires_grad_(True)
    for name in names:
        model.get_submodule(f"{name}.base_layer").requires_grad_(False)


def merged_state(state: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The state dict of a model with adapters -> that of the same model without, and with what they add."""
    merged = {}
    for name, value in state.items():
        if DOWN in name or UP in name:
            continue
        if name.endswith(f"{BASE}weight"):
            layer = name.removesuffix(f"{BASE}weight")
            value = merged_weight(value, state[f"{layer}{DOWN}weight"], state[f"{layer}{UP}weight"], config.scale)
        merged[name.replace(BASE, ".")] = value
    return merged


def merged_weight(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W (out, in), A (rank, in), B (out, rank) -> W + scale * B A, computed in float32."""
    return (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)


@contextmanager
def merged(model: nn.Module, config: LoraConfig) -> Iterator[None]:
    """Inside, the model has plain layers with what the adapters add; outside, it is as it was, bit for bit."""
    adapted = {name: part for name, part in model.named_modules() if hasattr(part, "base_layer")}
    try:
        for name, layer in adapted.items():
            model.set_submodule(name, _plain(layer, config.scale))
        yield
    finally:
        for name, layer in adapted.items():
            model.set_submodule(name, layer)


def _plain(layer: nn.Module, scale: float) -> nn.Linear:
    inside = layer.base_layer
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    plain = type(inside)(inside.in_features, inside.out_features, bias=inside.bias is not None, device="meta")
    with torch.no_grad():
        plain.weight = nn.Parameter(merged_weight(inside.weight, down, up, scale))
    plain.bias = inside.bias
    return plain


def _layers(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    # Exactly nn.Linear: a subclass may use its weight without calling the layer.
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    chosen = []
    for target in targets:
        found = [name for name in linear if fnmatchcase(name, target)]
        if not found:
            parts = ", ".join(sorted({f"{name.split('.')[0]}.*" for name in linear}))
            raise SettingsError(f"lora.targets: no linear layer is called {target!r}; there are {parts}")
        chosen += [name for name in found if name not in chosen]
    _refuse_tied(model, {name: linear[name] for name in chosen})
    return chosen


def _refuse_tied(model: nn.Module, chosen: Mapping[str, nn.Linear]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in chosen.items():
        others = [other for other in owners[id(layer.weight)] if other != f"{name}.weight"]
        if others:
            raise SettingsError(
                f"lora.targets: {name} shares its weight with {others[0]}, which merging would change too; "
                "choose patterns that leave it out"
            )
