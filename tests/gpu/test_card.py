"""On a card: the checks of `gpu_check` with the embedded sizes. Skipped, with a reason, where there is none."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from infotok_lit import cli
from infotok_lit.models.common.language_model import RMSNorm

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
