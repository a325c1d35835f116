"""What is imported: little for help and mistakes, nothing that must not be, and in one direction only."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "lightning", "transformers", "diffusers", "numpy", "jsonargparse", "yaml", "PIL", "rich"}


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
    if not module.name.endswith(("__main__", "lmms_eval_model", "vlmevalkit_model")):
        importlib.import_module(module.name)
assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
print(*(name for name in sys.modules if name.startswith(("infotok_lit.", "torchvision"))))
"""


def test_every_module_imports_without_torchvision(tmp_path) -> None:
    """And does nothing else: draws no random number, writes no file, says nothing."""
    answer = python("-c", WITHOUT_TORCHVISION, folder=tmp_path)
    assert answer.returncode == 0, answer.stderr
    files = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "infotok_lit").rglob("*.py"))
    modules = {".".join(path.parts).removesuffix(".__init__") for path in files}
    # For the harnesses that load them.
    plugins = {f"infotok_lit.evaluation.{name}_model" for name in ("lmms_eval", "vlmevalkit")}
    assert set(answer.stdout.split()) == modules - {"infotok_lit", "infotok_lit.__main__"} - plugins
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
        ("weight_files.py", {"errors"}),
        ("sharded_checkpoints.py", {"errors", "weight_files"}),
        ("checkpoints.py", {"errors", "sharded_checkpoints", "weight_files"}),
        ("hub.py", {"checkpoints", "errors", "weight_files"}),
        ("pictures.py", {"files"}),
        ("progress.py", set()),
        ("tables.py", set()),
        ("objective", {"objective", "budgets", "batch", "errors"}),
        ("models", {"models", "assets", "batch", "checkpoints", "errors", "files", "hub", "seeding", "__version__"}),
        ("data", {"data", "batch", "errors", "files"}),
        ("scenes", {"scenes", "metrics", "batch", "assets", "errors", "files", "seeding"}),
        ("metrics", {"metrics", "batch", "errors"}),
        ("budgets.py", {"errors"}),
        ("video", {"video", "budgets", "data", "batch", "checkpoints", "errors", "files", "__version__"}),
        (
            "modules",
            {"modules", "models", "video", "budgets", "objective", "data", "scenes", "metrics", "assets"}
            | {"batch", "checkpoints", "errors", "files", "hub", "seeding", "sharded_checkpoints", "weight_files"},
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
