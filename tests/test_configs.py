"""Every YAML that ships is parsed and instantiated; what is wrong in one is refused by name; help is light."""

import ast
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from infotok_lit import cli
from infotok_lit.assets import QUICKSTART_CONFIG
from infotok_lit.fit_setup import FitSetup

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def arguments(path: Path) -> list[str]:
    """The config on top of what it is an overlay of."""
    if path.parent.name == "harmon" and path.name != "1.5b.yaml":
        return ["--config", str(path)]
    base = ROOT / "configs" / "harmon" / "0.5b.yaml" if path.name == "1.5b.yaml" else QUICKSTART_CONFIG
    return ["--config", str(base), "--config", str(path)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_config_is_instantiated(path, tmp_path, monkeypatch) -> None:
    # Templates name files that are the user's to provide.
    make_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    setup = FitSetup([*arguments(path), "--trainer.accelerator=cpu", "--trainer.precision=32-true"])
    assert setup.model is not None and setup.datamodule is not None


def make_data(folder: Path) -> None:
    folder.mkdir()
    for name in ("train", "val"):
        (folder / f"{name}.json").write_text('[{"image": "a.jpg", "caption": "a photograph"}]')
    for name in [*(f"train-{i:06d}" for i in range(16)), "val-000000"]:
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for member, content in (("a.jpg", b"x"), ("a.txt", b"a caption")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("--model.init_args.objective.terms=[compactnes]", "compactnes"),
        ("--model.init_args.no_such_setting=1", "no_such_setting"),
        ("--trainer.no_such_setting=1", "no_such_setting"),
        ("--data.init_args.understanding_batch_size=many", "many"),
    ],
)
def test_what_is_wrong_is_named(override, named, capsys) -> None:
    with pytest.raises(SystemExit):
        FitSetup(["--config", str(QUICKSTART_CONFIG), override])
    assert named in capsys.readouterr().err


HEAVY = ("torch", "lightning", "transformers", "diffusers", "numpy", "jsonargparse", "yaml", "rich", "PIL")
BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise AssertionError("imported " + name)
sys.meta_path.insert(0, Blocker())
from infotok_lit.cli import main
sys.exit(main(ARGUMENTS))
"""


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        (["--help"], 0, "fine-tune a model"),
        (["--version"], 0, "infotok_lit 0"),
        (["fitt"], 2, "did you mean fit?"),
        (["fit", "--config", "typo.yaml"], 2, "no configuration file at typo.yaml"),
        (["fit", "--config=typo.yaml"], 2, "no configuration file at typo.yaml"),
    ],
)
def test_help_and_typing_errors_import_nothing_heavy(given, status, words) -> None:
    script = BLOCKER.replace("ARGUMENTS", repr(given))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert words in done.stdout + done.stderr


def test_a_config_with_a_typing_error_suggests_the_right_one(capsys) -> None:
    assert cli.main(["fit", "--config", str(ROOT / "configs" / "objective" / "csaa.yaml")]) == 2
    assert "did you mean csa.yaml?" in capsys.readouterr().err


def test_nothing_needs_torchvision() -> None:
    """The torchvision that pip pairs with a CPU build of torch is broken, and breaks whoever imports it."""
    script = """
import sys
import infotok_lit.training, infotok_lit.describe, infotok_lit.generate, infotok_lit.bench, infotok_lit.export
import infotok_lit.modules, infotok_lit.callbacks, infotok_lit.data.datamodule
print([name for name in ("torchvision", "timm", "deepspeed") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("objective", ("infotok_lit.models", "infotok_lit.modules", "infotok_lit.data", "lightning", "transformers")),
        ("models", ("infotok_lit.objective", "infotok_lit.modules", "infotok_lit.callbacks", "lightning")),
        ("data", ("infotok_lit.objective", "infotok_lit.modules", "infotok_lit.callbacks")),
        ("metrics", ("infotok_lit.objective", "infotok_lit.modules", "infotok_lit.callbacks")),
    ],
)
def test_arrows_between_packages_point_one_way(package, forbidden) -> None:
    files = list((ROOT / "infotok_lit" / package).rglob("*.py"))
    assert files
    for path in files:
        wrong = [name for name in imports_of(path) if name.startswith(forbidden)]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"
