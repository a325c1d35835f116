"""Names on the Hugging Face hub, against a hub on this machine that HF_ENDPOINT leads to."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml
from fake_hub import FakeHub, running_hub
from tiny import TinyModule, scenes_data, tiny_model

from infotok_lit.assets import embedded_base
from infotok_lit.checkpoints import exported_family
from infotok_lit.hub import full_name, is_on_hub
from infotok_lit.models.export import export_model

ROOT = Path(__file__).parents[2]
BASE = embedded_base("harmon", "scenes32")


@pytest.fixture
def hub(tmp_path):
    with running_hub(tmp_path / "cache") as hub:
        yield hub


def python(hub: FakeHub, code: str, **environment: str) -> subprocess.CompletedProcess:
    """huggingface_hub reads its environment when it is imported, so each look at another hub is another process."""
    env = os.environ | hub.environment | environment | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=500)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("wusize/Harmon-0_5B", True),
        ("showlab/show-o2-1.5B", True),
        ("hf://wusize/harmon/harmon_0.5b.pth", True),
        ("checkpoints/harmon_0.5b.pth", False),
        ("here/typo", False),
        ("./model", False),
        ("../model", False),
        ("/abs/model", False),
        ("model", False),
        ("a/b/c", False),
        ("embedded", False),
        ("owner/na me", False),
    ],
)
def test_what_is_taken_for_a_name_on_the_hub(tmp_path, monkeypatch, source, expected) -> None:
    """A path below a folder that is here never is, so that a typing error asks no server."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_on_hub(source) == expected
    assert full_name(source) == (f"hf://{source.removeprefix('hf://')}" if expected else source)


PUBLISH_AND_USE = """
import json, torch
from pathlib import Path
import infotok_lit
from infotok_lit.cli import main
from infotok_lit.models.family import load_folder
from infotok_lit.modules import HarmonModule

for name, more in (("mine", ["--private"]), ("older", [])):
    out = Path({folder!r}, name)
    assert main(["export", "--ckpt", {run!r}, "--out", str(out), "--push_to_hub", f"me/{{name}}", *more]) == 0
out = Path({folder!r}, "mine")
config = json.loads((out / "config.json").read_text())["config"]
module = HarmonModule(init_from="me/mine", settings=config)
local = load_folder(out).state_dict()
for other in (infotok_lit.load("me/mine", device="cpu").base.state_dict(), module.build_base().state_dict()):
    assert other.keys() == local.keys() and all(torch.equal(local[name], other[name]) for name in local)
print(json.dumps(module.initial_model.reference()))
"""
LOOK = """
from infotok_lit.commands.check import processor_of
from infotok_lit.modules import HarmonModule

for init_from in ("look/export", "hf://look/official/model.pth", "hf://look/several/base"):
    processor = processor_of(HarmonModule(init_from=init_from).initial_model)
    print("looked at", processor.tokenizer.name_or_path.split("/")[-1], len(processor.tokenizer))
"""
FETCH = """
from infotok_lit.hub import fetch
print(*sorted(path.name for path in fetch("me/mine").iterdir()))
"""


OLD = {"harmon.pth": b"old", "budget.safetensors": b"old", "figure.png": b"mine"}


@dataclass
class Visit:
    """A hub, and what one process did there: it published two exports of a run, loaded one, and looked at models."""

    hub: FakeHub
    folder: Path
    said: list[str]


@pytest.fixture(scope="module")
def visit(tmp_path_factory) -> Iterator[Visit]:
    """An export to a new name, one over an old export, and three models that hold more than a look needs."""
    folder = tmp_path_factory.mktemp("visit")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, max_epochs=1, default_root_dir=folder / "run", **quiet)
    trainer.fit(TinyModule(()), scenes_data())
    trainer.save_checkpoint(folder / "run" / "last.ckpt")
    export = files(BASE)
    with running_hub(folder / "cache") as hub:
        hub.repositories |= {
            "me/older": dict(OLD),
            "look/export": export,
            "look/official": {"model.pth": b"large"},
            "look/several": {f"base/{name}": content for name, content in export.items()} | {"o/harmon.pth": b"large"},
        }
        done = python(hub, PUBLISH_AND_USE.format(run=str(folder / "run"), folder=str(folder)) + LOOK)
        assert done.returncode == 0, done.stderr[-2000:]
        yield Visit(hub, folder, done.stdout.splitlines())


def test_an_export_is_published_and_loads_by_its_name(visit) -> None:
    """From the command to the server and back; then without the server."""
    hub, out = visit.hub, visit.folder / "mine"
    assert f"published {hub.environment['HF_ENDPOINT']}/me/mine" in visit.said
    (reference,) = (line for line in visit.said if line.startswith("{"))
    assert json.loads(reference) == {"init_from": "hf://me/mine", "tokenizer": "me/mine"}
    assert hub.repositories["me/mine"] == files(out) and hub.private == {"me/mine"}
    assert sorted(hub.fetched("me")) == sorted(files(out))
    header = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert header["license"] == "apache-2.0" and header["library_name"] == "infotok_lit"
    assert {"infotok", "harmon", "image-to-text", "text-to-image"} <= set(header["tags"])
    offline = python(hub, FETCH, HF_HUB_OFFLINE="1")
    assert offline.stdout.split() == sorted(files(out)), offline.stderr[-2000:]


def test_a_second_export_takes_the_place_of_the_first_one(visit) -> None:
    """Weights of the first under another name, and what read its tokens, would be taken for the second's."""
    assert visit.hub.repositories["me/older"] == files(visit.folder / "older") | {"figure.png": b"mine"}


def test_looking_at_data_fetches_no_weights(visit) -> None:
    """`check` is for the time before gigabytes are fetched: of a model it needs the tokenizer alone."""
    assert len([line for line in visit.said if line.startswith("looked at ")]) == 3 and visit.hub.fetched("look")
    assert not [name for name in visit.hub.fetched("look") if name.endswith((".safetensors", ".pth"))]


def test_only_what_is_read_is_fetched(hub, tmp_path) -> None:
    pytorch = {"pytorch_model-1.bin": b"1", "pytorch_model.bin.index.json": b"{}", "evil.py": b"import os"}
    hub.repositories |= {
        "o/both": {"config.json": b"{}", "model.safetensors": b"s", **pytorch, "text_encoder/model.safetensors": b"t"},
        "o/bin": {**pytorch, "optimizer.pt": b"o"},
        "o/inside": {"transformer/diffusion_pytorch_model.safetensors": b"d", "vae/diffusion_pytorch_model.bin": b"v"},
        "o/several": {"a_0.5b.pth": b"a", "a_1.5b.pth": b"b"},
    }
    code = (
        "from infotok_lit.hub import fetch\n"
        "for name in ('o/both', 'o/bin', 'hf://o/inside/transformer', 'hf://o/several/a_1.5b.pth'):\n"
        "    path = fetch(name)\n"
        "    print(path.read_bytes() if path.is_file() else sorted(file.name for file in path.iterdir()))\n"
        "for name in ('o/several', 'o/none', 'hf://o/bin/none.pth', 'hf://o', 'hf://o/bin/../x'):\n"
        "    try:\n"
        "        fetch(name)\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    done = python(hub, code)
    assert done.returncode == 0, done.stderr[-2000:]
    endpoint = hub.environment["HF_ENDPOINT"]
    assert done.stdout.splitlines() == [
        "['config.json', 'model.safetensors', 'pytorch_model.bin.index.json']",
        "['pytorch_model-1.bin', 'pytorch_model.bin.index.json']",
        "['diffusion_pytorch_model.safetensors']",
        "b'b'",
        "CheckpointError o/several on the hub holds no weights under a name that is known: name one of its files, "
        "such as hf://o/several/a_0.5b.pth",
        f"MissingFileError there is no o/none here, nor at {endpoint}; if it is private, log in (`hf auth login`)",
        "MissingFileError the repository has no such file: hf://o/bin/none.pth",
        "CheckpointError hf://o is no name on the hub: write hf://OWNER/NAME or hf://OWNER/NAME/FILE",
        "CheckpointError hf://o/bin/../x is no name on the hub: write hf://OWNER/NAME or hf://OWNER/NAME/FILE",
    ]
    assert not any("evil.py" in name or "optimizer" in name for name in hub.fetched())


def test_without_a_hub_or_a_login_there_is_one_message(hub, tmp_path) -> None:
    code = "import sys\nfrom infotok_lit.cli import main\nsys.exit(main(sys.argv[1:]))"
    describe = f"import sys; sys.argv[1:] = ['describe', '--model', 'o/n', '--image', {str(ROOT)!r}]\n{code}"
    gone = python(hub, describe, HF_HUB_OFFLINE="1")
    assert gone.returncode == 2 and len(gone.stderr.splitlines()) == 1 and "o/n is not here, and" in gone.stderr
    push = f"from infotok_lit.hub import push\nfrom pathlib import Path\npush(Path({str(BASE)!r}), 'me/mine', [])"
    refused = python(hub, push, HF_TOKEN="hf_wrong")
    assert "was not published: " in refused.stderr.splitlines()[-1] and hub.repositories == {}
    nobody = python(hub, push, HF_ENDPOINT="http://127.0.0.1:9").stderr.splitlines()[-1]
    assert (
        "CheckpointError" in nobody and "was not published: me/mine: http://127.0.0.1:9 cannot be reached: " in nobody
    )


@pytest.mark.parametrize(
    ("init_from", "licence", "base_model"),
    [
        (None, "apache-2.0", None),
        ("embedded", "apache-2.0", None),
        ("hf://showlab/show-o2-1.5B", "other", "showlab/show-o2-1.5B"),
        ("hf://wusize/harmon/harmon_0.5b.pth", "other", "wusize/harmon"),
        ("checkpoints/harmon_0.5b.pth", "other", None),
    ],
)
def test_the_cards_header_claims_what_is_known(tmp_path, init_from, licence, base_model) -> None:
    export_model(tiny_model(), tmp_path / "out", {"step": 3}, init_from=init_from)
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("---\n") and "- step: 3" in text
    header = yaml.safe_load(text.split("---")[1])
    assert header["license"] == licence and header.get("base_model") == base_model
    assert exported_family(tmp_path / "out") == "harmon"
