"""On a card: the checks of `gpu_check` with the embedded sizes. Skipped, with a reason, where there is none."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from infotok_lit import cli, load
from infotok_lit.models.common.language_model import RMSNorm
from infotok_lit.models.common.sampling import Recorded
from infotok_lit.models.harmon.diffusion import TokenDiffusion

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: PyTorch sees none")


def test_all_families_train_resume_and_draw_on_a_card(tmp_path) -> None:
    out = tmp_path / "checks.json"
    assert cli.main(["gpu_check", "--sizes", "harmon/scenes32", "--minutes", "9", "--out", str(out)]) == 0
    checks = {check["name"]: check for check in json.loads(out.read_text())["checks"]}
    assert all(check["passed"] for check in checks.values())
    assert "harmon/scenes32: peak memory, GiB" in checks


def test_the_peak_of_a_card_is_as_estimated(tmp_path) -> None:
    out = tmp_path / "estimate.json"
    arguments = ["--config", "harmon/scenes32", "--alternatives", "false", "--measure", "--out", str(out)]
    assert cli.main(["estimate", *arguments]) == 0
    found = json.loads(out.read_text())
    assert found["plans"][0]["bytes"]["1 card"] == pytest.approx(found["measured_bytes"], rel=0.15)


def test_no_step_waits_for_the_card_but_where_it_logs() -> None:
    """With torch's own alarm for synchronisation, in the callback that measures."""
    from infotok_lit.callbacks import Throughput

    callback, device = Throughput(), torch.device("cuda")
    with torch.device(device):
        torch.cuda.set_sync_debug_mode("error")
        try:
            callback._found(1, device)
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Operations(TorchDispatchMode):
    """While it is active, notes the operations of torch that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_norm_is_one_kernel_under_autocast_too() -> None:
    norm, x = RMSNorm(64).cuda(), torch.randn(2, 3, 64, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16), Operations() as found:
        norm(x)
    assert "aten._fused_rms_norm.default" in found.names and "aten.rsqrt.default" not in found.names


def test_what_is_recorded_gives_the_numbers_of_the_function() -> None:
    """With shapes in turns, as the rounds of the MAR loop have them, and weights that changed in their places."""
    layers = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.SiLU(), torch.nn.Linear(64, 8)).cuda()
    recorded = Recorded(lambda x, scale: scale * layers(x))
    with torch.inference_mode():
        for rows in (3, 5, 3, 1, 5, 3):
            layers[0].bias.add_(1)
            x, scale = torch.randn(rows, 8, device="cuda"), torch.randn(1, device="cuda")
            assert recorded(x, scale).equal(scale * layers(x))


@pytest.mark.parametrize("solver_steps", [0, 10])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_harmon_draws_the_same_where_its_denoiser_is_recorded(dtype: str, solver_steps: int, monkeypatch) -> None:
    model = load("harmon_scenes32", device="cuda", dtype=dtype)
    prompts, options = ["a red circle above a blue square", "two green crosses"], {"solver_steps": solver_steps}
    recorded = list(model.pictures(prompts, 0, None, 2, options))
    monkeypatch.setattr(TokenDiffusion, "recorded", lambda self: self)
    plain = list(model.pictures(prompts, 0, None, 2, options))
    assert all((one == other).all() for one, other in zip(recorded, plain, strict=True))
