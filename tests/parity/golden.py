"""Golden files: recorded runs of the official implementations (inputs, random draws, outputs)."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from infotok_lit.models.common.model_config import LanguageModelConfig

FIXTURES = Path(__file__).parents[1] / "fixtures" / "goldens"

SINGLE_PASS = 1e-5
SAMPLING_CHAIN = 2e-5
DECODED_IMAGE = 1e-4


@dataclass(frozen=True)
class Golden:
    """One recorded run."""

    info: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def state(self) -> dict[str, Tensor]:
        """The official state dict."""
        return {key.removeprefix("state/"): value for key, value in self.tensors.items() if key.startswith("state/")}

    def input(self, case: str, name: str) -> Tensor:
        return self.tensors[f"in/{case}/{name}"]

    def output(self, case: str, name: str) -> Tensor:
        return self.tensors[f"out/{case}/{name}"]

    def outputs(self, case: str) -> dict[str, Tensor]:
        prefix = f"out/{case}/"
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def argument(self, case: str, name: str) -> Any:
        return self.info["cases"][case][name]

    def check(self, case: str, name: str, actual: Tensor, tolerance: float = SINGLE_PASS) -> None:
        """Assert agreement within tolerance * max(1, absmax of the reference); integers and booleans exactly."""
        expected = self.output(case, name)
        assert actual.shape == expected.shape, f"{case}/{name}: {tuple(actual.shape)} != {tuple(expected.shape)}"
        if not expected.is_floating_point():
            assert torch.equal(actual, expected), f"{case}/{name} differs"
            return
        error = float((actual.detach().double() - expected.double()).abs().max())
        allowed = tolerance * max(1.0, float(expected.abs().max()))
        assert error <= allowed, f"{case}/{name}: error {error:.2e} > {allowed:.2e}"


def load_golden(path: Path) -> Golden:
    """The golden whose description is at `path`."""
    return Golden(json.loads(path.read_text()), load_file(path.with_suffix(".safetensors")))


def language_model_of(recorded: dict[str, Any]) -> LanguageModelConfig:
    """The configuration of a golden's Qwen2."""
    names = {field.name for field in fields(LanguageModelConfig)}
    return LanguageModelConfig(**{name: value for name, value in recorded.items() if name in names})
