"""A fourth base model that is written as docs/new_family.md says, and registered by nothing but where its files lie."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import infotok_lit.models
import infotok_lit.modules
from infotok_lit import cli
from infotok_lit.assets import embedded_base
from infotok_lit.checkpoints import newest_checkpoint, read_run
from infotok_lit.commands.fit import main
from infotok_lit.models.family import families, load_folder

TESTS = Path(__file__).parent
TOY = TESTS / "toy_family"
IMPORTED = ("infotok_lit.models.toy", "infotok_lit.modules.toy")
GUIDE = TESTS.parent / "docs" / "new_family.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of the toy family, which lies in the package for as long as this module's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infotok_lit.models, "__path__", [*infotok_lit.models.__path__, str(TOY / "models")])
        patch.setattr(infotok_lit.modules, "__path__", [*infotok_lit.modules.__path__, str(TOY / "modules")])
        patch.chdir(tmp_path_factory.mktemp("toy"))
        assert main(["fit", "--config", str(TOY / "toy.yaml")]) == 0
        yield Path("runs", "toy", "version_0").resolve()
    for name in [
        name for name in sys.modules if name.startswith(("infotok_lit.models.toy", "infotok_lit.modules.toy"))
    ]:
        del sys.modules[name]


def scalars(run: Path) -> set[str]:
    events = EventAccumulator(str(run))
    events.Reload()
    return set(events.Tags()["scalars"])


def test_it_is_found_and_trained_with_all_that_is_logged(run) -> None:
    assert "toy" in families()
    logged = scalars(run)
    for branch in ("understanding", "generation"):
        for name in ("rate_bits_per_token", "token_gradient/sufficiency", "part_gradient/encoder"):
            assert f"train/{branch}/{name}" in logged
        assert f"train/{branch}/part_gradient/llm" not in logged, "its tokens come before the language model"
    assert {"val/generation/score/overall", "val/understanding/answers/overall"} <= logged


def test_it_is_exported_at_the_end_and_on_demand(run, tmp_path) -> None:
    assert cli.main(["export", "--ckpt", str(run), "--out", str(tmp_path / "out"), "--format", "pth"]) == 0
    state = read_run(newest_checkpoint([run]))["state_dict"]
    for folder in (run / "export", tmp_path / "out"):
        model = load_folder(folder)
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[f"base.{name}"]), name
    official = torch.load(tmp_path / "out" / "toy.pth", weights_only=True)
    assert {"visual.proj.weight", "visual.pos_embed"} <= official.keys()


def test_an_earlier_export_is_replaced(run, tmp_path) -> None:
    command = ["export", "--ckpt", str(run), "--out", str(tmp_path / "out")]
    assert cli.main(command) == cli.main([*command, "--force"]) == 0


def test_it_describes_and_draws_also_beside_another_family(run, tmp_path, capsys) -> None:
    image = tmp_path / "x.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(image)
    folder = str(run / "export")
    other = str(embedded_base("harmon", "scenes32"))
    asked = ["--image", str(image), "--prompt", "what?", "--max_new_tokens", "4", "--json"]
    assert cli.main(["describe", "--model", folder, other, *asked]) == 0
    assert json.loads(capsys.readouterr().out)["answers"].keys() == {"export", "harmon_scenes32"}
    drawn = tmp_path / "drawn.png"
    assert cli.main(["generate", "--model", folder, "--prompt", "a red circle", "--out", str(drawn)]) == 0
    assert Image.open(drawn).size == (32, 32)
    official = tmp_path / "out"
    assert cli.main(["export", "--ckpt", str(run), "--out", str(official), "--format", "pth"]) == 0
    given = ["--model", str(official / "toy.pth"), "--family", "toy", "--model_size", "scenes32"]
    again = tmp_path / "again.png"
    assert cli.main(["generate", *given, "--prompt", "a red circle", "--out", str(again)]) == 0
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(drawn)))


@pytest.mark.parametrize(
    "options",
    [
        ["--ckpt_path", "last", "--trainer.max_steps", "6"],
        ["--model.init_args.init_from", "runs/toy/version_0", "--model.init_args.task_weights.reconstruction", "1.0"],
        ["--model.init_args.init_from", "runs/toy/version_0/export", "--model.init_args.freeze", "[encoder.,places]"],
        ["--model.init_args.lora", "{targets: [llm.model.*], rank: 2}"],
        ["--model.init_args.objective.bottleneck", "inline", "--model.init_args.activation_checkpointing", "true"],
    ],
)
def test_what_the_frame_offers_is_there(run, options) -> None:
    """Resuming, starting from a run or an export, reconstruction, freezing, adapters, the inline bottleneck."""
    assert main(["fit", "--config", str(TOY / "toy.yaml"), "--trainer.callbacks", "[]", *options]) == 0


def test_what_asks_for_more_of_a_family_is_refused_by_name(run, tmp_path, capsys) -> None:
    for command, wanted in (
        (["cache", "--out", str(tmp_path / "latents")], "encoded_branches"),
        (["fit", "--config", "objective/capacity"], "capacity_bits"),
    ):
        assert cli.main([command[0], "--config", str(TOY / "toy.yaml"), *command[1:]]) == 2
        assert wanted in capsys.readouterr().err


def test_the_guide_names_every_file_of_the_example() -> None:
    text = GUIDE.read_text()
    for path in [*TOY.rglob("*.py"), *TOY.rglob("*.yaml")]:
        assert f"`{path.relative_to(TOY)}`" in text, path
