"""Every YAML that ships is a configuration that can be run; wrong ones are refused by name; imports stay light."""

import ast
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from infotok_lit.assets import ASSETS, QUICKSTART_CONFIG
from infotok_lit.commands.fit import InfoTokCLI, main
from infotok_lit.data.datamodule import UnifiedDataModule
from infotok_lit.modules.infotok_module import InfoTokModule

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "tests" / "fixtures" / "photos"
STUDIES = [*ROOT.glob("configs/ablation/*.yaml"), *ROOT.glob("configs/sweep/*.yaml")]
"""What `ablate` reads: tests/study/test_ablate.py is about them."""
VIDEO = [*ROOT.glob("configs/video_tokenizer/*.yaml")]
"""Of a model of another kind: tests/video/test_module.py is about them."""
CONFIGS = sorted({*ROOT.glob("configs/**/*.yaml"), *ASSETS.glob("*.yaml")} - {*STUDIES, *VIDEO})
ON_ANY_MACHINE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1"]
HEAVY = {"torch", "lightning", "transformers", "diffusers", "numpy", "jsonargparse", "yaml", "PIL", "rich"}


def configure(*arguments: str) -> LightningCLI:
    """Everything that a configuration names, instantiated and not run; no weights are read for it."""
    return InfoTokCLI(
        InfoTokModule,
        UnifiedDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        load_from_checkpoint_support=False,
        auto_configure_optimizers=False,
        run=False,
        args=list(arguments),
    )


def is_complete(path: Path) -> bool:
    content = yaml.safe_load(path.read_text())
    return all("class_path" in content.get(part, {}) for part in ("model", "data")) and "trainer" in content


@pytest.fixture
def your_data(tmp_path, monkeypatch) -> None:
    """A working folder that has what the configurations for own data point at."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    shutil.copytree(PHOTOS, folder / "images")
    rows = json.loads((PHOTOS / "annotations.json").read_text())
    for name in ("train.json", "val.json"):
        paths = [{**row, "image": f"images/{row['image']}"} for row in rows]
        (folder / name).write_text(json.dumps(paths))
    for name in ("val-000000.tar", *(f"train-{i:06}.tar" for i in range(16))):
        with tarfile.open(folder / name, "w") as tar:
            for file, content in (
                ("a.jpg", (PHOTOS / "coins.jpg").read_bytes()),
                ("a.json", json.dumps(rows[0]).encode()),
            ):
                member = tarfile.TarInfo(file)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.mark.filterwarnings("ignore:.*LightningCLI's args parameter.*")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_configuration_can_be_run(path, your_data) -> None:
    """An overlay is laid over the small configuration of its family, or over the quickstart."""
    small = path.parent / "scenes32.yaml"
    base = small if small.exists() and is_complete(small) else QUICKSTART_CONFIG
    under = [] if is_complete(path) else ["--config", str(base)]
    cli = configure(*under, "--config", str(path), *ON_ANY_MACHINE)
    assert isinstance(cli.model, InfoTokModule)
    assert isinstance(cli.datamodule, UnifiedDataModule)
    assert not hasattr(cli.model, "base"), "the model is built by the trainer, not by parsing"
    assert cli.trainer.max_steps > 0


def test_there_are_configurations() -> None:
    assert len(CONFIGS) >= 10 and QUICKSTART_CONFIG in CONFIGS
    assert sum(is_complete(path) for path in CONFIGS) >= 3


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--model.init_args.objective.terms=[compactness,sufficency]", "sufficency"),
        ("--model.init_args.objective.bottleneck=outline", "outline"),
        ("--model.init_args.objective.temprature=0.2", "temprature"),
        ("--model.init_args.sise=0.5b", "sise"),
        ("--model.init_args.size=7b", "7b"),
        ("--data.init_args.train.init_args.splitt=val", "splitt"),
        ("--data.init_args.prompt_dropuot=0.2", "prompt_dropuot"),
        ("--trainer.max_stepps=3", "max_stepps"),
        ("--model.init_args.optimiser.lr=fast", "fast"),
        ("--model.init_args.objective.understanding.beta=-1", "beta is -1.0; a weight must be 0 (off) or positive"),
        ("--ckpt_pth=last", "ckpt_pth"),
    ],
)
def test_a_wrong_option_is_refused_by_name(argument, said, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", argument])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model:\n  init_args:\n    objctive:\n      terms: []\n", "objctive"),
        ("modle:\n  init_args:\n    size: scenes32\n", "modle"),
        ("model:\n  init_args:\n    objective:\n      terms: [compression]\n", "compression"),
        ("trainer: [1, 2\n", "trainer"),
    ],
)
def test_a_wrong_file_is_refused_by_name(content, said, tmp_path, capsys) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(QUICKSTART_CONFIG), "--config", str(path)])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


# What is imported


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def imported(report: str) -> set[str]:
    """Top-level packages in what `-X importtime` wrote."""
    names = [line.rsplit("|", 1)[-1].strip() for line in report.splitlines() if line.startswith("import time:")]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "usage: python -m infotok_lit SUBCOMMAND"),
        (["--version"], 0, "infotok_lit 0."),
        ([], 2, "usage"),
        (["fti"], 2, "did you mean fit?"),
        (
            ["fit", "--config", "quikstart.yaml"],
            2,
            "no configuration file at quikstart.yaml; did you mean quickstart.yaml?",
        ),
        (["validate", "--config=nowhere/a.yaml"], 2, "no configuration file at nowhere/a.yaml"),
    ],
)
def test_help_and_typing_errors_import_nothing_heavy(arguments, code, said, tmp_path) -> None:
    (tmp_path / "quickstart.yaml").touch()
    answer = python("-X", "importtime", "-m", "infotok_lit", *arguments, folder=tmp_path)
    assert answer.returncode == code
    assert said in answer.stdout + answer.stderr
    modules = imported(answer.stderr)
    assert "infotok_lit" in modules, "the report of imports is there"
    assert not modules & HEAVY


def test_importing_the_package_does_no_work(tmp_path) -> None:
    code = "import sys; before = set(sys.modules); import infotok_lit; print(*(set(sys.modules) - before))"
    assert python("-c", code, folder=tmp_path).stdout.split() == ["infotok_lit"]
    assert list(tmp_path.iterdir()) == []


WITHOUT_TORCHVISION = """
import importlib, pkgutil, sys

class Without:
    '''A finder that finds what another does, but for torchvision and timm.'''
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ("torchvision", "timm") else self.finder.find_spec(name, path, target)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
import torch
state, threads = torch.get_rng_state(), torch.get_num_threads()
import infotok_lit
for module in pkgutil.walk_packages(infotok_lit.__path__, "infotok_lit."):
    if module.name != "infotok_lit.__main__":
        importlib.import_module(module.name)
assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
print(sum(name.startswith("infotok_lit.") for name in sys.modules), "torchvision" in sys.modules)
"""


def test_every_module_imports_without_torchvision(tmp_path) -> None:
    """And does nothing else: draws no random number, writes no file, says nothing."""
    answer = python("-c", WITHOUT_TORCHVISION, folder=tmp_path)
    assert answer.returncode == 0, answer.stderr
    count, present = answer.stdout.split()
    assert int(count) > 50 and present == "False"
    assert list(tmp_path.iterdir()) == []


# Which way the arrows point


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("batch.py", {"errors"}),
        ("checkpoints.py", {"errors", "files"}),
        ("pictures.py", {"files"}),
        ("objective", {"objective", "batch", "errors"}),
        ("models", {"models", "assets", "batch", "checkpoints", "errors", "files", "seeding", "__version__"}),
        ("data", {"data", "batch", "errors", "files"}),
        ("scenes", {"scenes", "metrics", "batch", "assets", "errors", "files", "seeding"}),
        ("metrics", {"metrics", "batch", "errors"}),
        ("budgets", {"budgets", "errors"}),
        ("video", {"video", "budgets", "data", "batch", "checkpoints", "errors", "files", "__version__"}),
        (
            "modules",
            {"modules", "models", "video", "budgets", "objective", "data", "scenes", "metrics", "assets"}
            | {"batch", "checkpoints", "errors", "files", "seeding"},
        ),
    ],
)
def test_arrows_point_one_way(folder, allowed) -> None:
    place = ROOT / "infotok_lit" / folder
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    assert files
    may_know_lightning = folder in ("data", "modules", "video")
    for path in files:
        for name in imports_of(path):
            top, _, inside = name.partition(".")
            if top == "infotok_lit" and inside:
                assert any(inside == part or inside.startswith(f"{part}.") for part in allowed), f"{path}: {name}"
            if not may_know_lightning:
                assert top not in ("lightning", "pytorch_lightning"), f"{path}: {name}"
            if folder == "objective":
                assert top in {"torch", "infotok_lit", *sys.stdlib_module_names}, f"{path}: {name}"
