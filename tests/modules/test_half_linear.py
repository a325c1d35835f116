"""Frozen layers in bfloat16: the same run in bf16-mixed, and nothing of the original weights is lost."""

import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from fit_tiny import fit
from safetensors.torch import load_file
from tiny import FAMILIES, TinyModule, scenes_data
from torch import nn

from infotok_lit.assets import embedded_base
from infotok_lit.checkpoints import newest_checkpoint, read_run
from infotok_lit.cli import main as command_line
from infotok_lit.commands.estimate import sizes_of
from infotok_lit.modules import HarmonModule
from infotok_lit.modules.half_linear import HalfLinear, halve_frozen_layers, is_halved
from infotok_lit.modules.lora import LoraConfig

FROZEN = {"harmon": ("llm.",), "showo2": ("llm.",), "openuni": ("vlm.", "transformer.")}
ADAPTED = {"harmon": "llm.model.*", "showo2": "llm.model.*", "openuni": "vlm.model.language_model.*"}


def run(module: pl.LightningModule, folder: Path, precision: str = "bf16-mixed", steps: int = 3, **settings) -> None:
    pl.seed_everything(0, verbose=False)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    settings = {"limit_val_batches": 1, "val_check_interval": steps, "check_val_every_n_epoch": None} | settings
    pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        precision=precision,
        max_steps=steps,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        **quiet | {"accumulate_grad_batches": 2} | settings,
    ).fit(module, scenes_data())


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_mixed_trains_to_the_same_bits(tmp_path, family) -> None:
    """Autocast rounds a frozen matrix to bfloat16 at each use, so rounding it once changes nothing."""
    modules = []
    for halves in (False, True):
        lora = LoraConfig((ADAPTED[family],), rank=2)
        module = TinyModule(family=family, freeze=FROZEN[family], lora=lora)
        module.halve_frozen = halves
        run(module, tmp_path)
        modules.append(module)
    whole, half = modules
    assert not is_halved(whole) and is_halved(half)
    assert float(whole.trainer.callback_metrics["train/loss"]) == float(half.trainer.callback_metrics["train/loss"])
    for (name, expected), found in zip(whole.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(found, expected.to(found.dtype)), name
        assert found.requires_grad == expected.requires_grad
        assert found.dtype == torch.float32 or not found.requires_grad


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_precision_in_which_it_changes_losses_is_warned_of_once(tmp_path, precision) -> None:
    """There the loss of the first step is another one; in bf16-mixed it is the same."""
    losses = []
    for halves in (False, True):
        module = TinyModule(freeze=("llm.",))
        module.halve_frozen = halves
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(module, tmp_path, precision, steps=1, limit_val_batches=0, accumulate_grad_batches=1)
        losses.append(float(module.trainer.callback_metrics["train/loss"]))
    told = [str(warning.message) for warning in caught if "halve_frozen" in str(warning.message)]
    assert len(told) == (losses[0] != losses[1]) == (precision != "bf16-mixed")
    assert all("32-true" in line and "Set trainer.precision to bf16-mixed" in line for line in told)


def test_what_is_halved() -> None:
    """Linear layers of which nothing is trained and no weight is used elsewhere, but for the autoencoder's."""
    model = nn.ModuleDict({"autoencoder": nn.Sequential(nn.Linear(2, 2)), "table": nn.Embedding(3, 2)})
    model["frozen"], model["trained"], model["tied"] = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 3, bias=False)
    model["norm"], model["convolution"] = nn.LayerNorm(2), nn.Conv2d(1, 1, 1)
    model["tied"].weight = model["table"].weight
    model.requires_grad_(False)["trained"].bias.requires_grad_(True)
    halve_frozen_layers(model)
    assert [name for name, module in model.named_modules() if isinstance(module, HalfLinear)] == ["frozen"]
    assert {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16} == {
        "frozen.weight",
        "frozen.bias",
    }


def test_without_autocast_it_computes_in_the_precision_of_its_input() -> None:
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"layer": nn.Linear(16, 8)}).requires_grad_(False), torch.randn(4, 16)
    expected = x @ model["layer"].weight.bfloat16().float().T + model["layer"].bias.bfloat16().float()
    halve_frozen_layers(model)
    torch.testing.assert_close(model["layer"](x), expected, rtol=1e-5, atol=1e-6)


def test_an_estimate_counts_halved_weights_by_half_but_not_while_they_are_read() -> None:
    sizes = []
    for halves in (False, True):
        module = TinyModule(freeze=("llm.",))
        module.halve_frozen = halves
        module.configure_model()
        sizes.append(sizes_of(module))
    whole, half = sizes
    smaller = sum(parameter.numel() for parameter in module.parameters() if parameter.dtype == torch.bfloat16)
    assert smaller > 0
    assert half.weights == whole.weights - 2 * smaller
    assert half.read == whole.read == whole.weights


def halved(**options) -> HarmonModule:
    """The embedded base, from a path as of any export."""
    lora = LoraConfig(("llm.model.*",), rank=2)
    return HarmonModule(
        init_from=str(embedded_base("harmon", "scenes32")), freeze=("llm.",), lora=lora, halve_frozen=True, **options
    )


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[Path, HarmonModule]:
    """A run of two steps, and its module."""
    folder, module = tmp_path_factory.mktemp("run"), halved()
    fit(folder, module=module, steps=2, val_every=100)
    return folder, module


def test_a_run_resumes_exactly(ended, tmp_path) -> None:
    whole, resumed = halved(), halved()
    fit(tmp_path / "whole", module=whole, steps=4, val_every=100)
    fit(tmp_path / "on", newest_checkpoint([ended[0]]), module=resumed, steps=4, val_every=100)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_run_may_go_on_without_it(ended, tmp_path) -> None:
    module, name = halved(), "llm.model.layers.0.mlp.down_proj"
    module.halve_frozen = False
    fit(tmp_path, newest_checkpoint([ended[0]]), module=module, steps=3, val_every=100)
    original = load_file(embedded_base("harmon", "scenes32") / "harmon.safetensors")[f"{name}.weight"].float()
    assert not torch.equal(original, original.bfloat16().float())
    assert torch.equal(module.base.get_parameter(f"{name}.base_layer.weight"), original)


def test_exports_have_the_weights_of_the_files_and_adapters_are_added_to_these(ended, tmp_path) -> None:
    folder, module = ended
    path = newest_checkpoint([folder])
    assert command_line(["export", "--ckpt", str(path), "--out", str(tmp_path / "out")]) == 0
    exported = load_file(tmp_path / "out" / "harmon.safetensors")
    with module.plain_base(exact=True) as base:
        live = base.official_weights()["harmon"]
    files = load_file(embedded_base("harmon", "scenes32") / "harmon.safetensors")
    initial = {name: value.float() for name, value in files.items() if name.startswith("llm.")}
    adapted = [name for name in initial if name.endswith("_proj.weight")]
    untouched = initial.keys() - adapted
    assert untouched and adapted
    assert all(torch.equal(exported[name], initial[name]) for name in untouched)
    assert all(torch.equal(exported[name], live[name]) for name in exported)
    state = read_run(path)["state_dict"]
    for name in adapted:
        layer = f"base.{name.removesuffix('.weight')}"
        down, up = (state[f"{layer}.lora_{matrix}.default.weight"] for matrix in "AB")
        torch.testing.assert_close(exported[name], initial[name] + 16.0 * up @ down, rtol=1e-5, atol=1e-6)
