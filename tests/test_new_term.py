"""A term that is written as docs/new_term.md says, in files of its own outside the package."""

import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_model

from infotok_lit.batch import BRANCHES
from infotok_lit.cli import main
from infotok_lit.commands.fit import InfoTokCLI
from infotok_lit.errors import SettingsError
from infotok_lit.modules.losses import TaskWeights, check_trainable, trained_branches
from infotok_lit.objective.config import ObjectiveConfig

TESTS = Path(__file__).parent
OWN = TESTS / "own_term"
GUIDE = TESTS.parent / "docs" / "new_term.md"
SHORT = [
    f"--config={OWN / 'likeness.yaml'}",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.callbacks=[]",
    "--trainer.enable_progress_bar=false",
    "--data.init_args.num_workers=0",
    "--data.init_args.understanding_batch_size=4",
    "--data.init_args.generation_batch_size=4",
    "--data.init_args.val_batch_size=4",
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(OWN)
    yield tmp_path
    sys.modules.pop("likeness", None)


def test_it_is_what_its_formula_says() -> None:
    from likeness import likeness

    alike, apart = torch.ones(4, 8), 3 * torch.eye(8)[:4]
    opposite = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None] * torch.ones(4, 8)
    # Of six pairs, two point the same way and four the opposite way.
    expected = torch.tensor([1.0, 0.0, (2 - 4) / 6])
    torch.testing.assert_close(likeness(torch.stack([alike, apart, opposite])), expected)


@pytest.mark.parametrize("terms", ["[]", "[compactness,sufficiency,alignment]"])
def test_it_trains_beside_others_and_alone_and_is_logged(here, terms) -> None:
    assert main(["fit", "--config=harmon/scenes32", *SHORT, f"--model.init_args.objective.terms={terms}"]) == 0
    (run,) = here.rglob("version_0")
    events = EventAccumulator(str(run))
    events.Reload()
    logged = set(events.Tags()["scalars"])
    for branch in ("understanding", "generation"):
        own = (f"train/{branch}/likeness", f"train/{branch}/token_gradient/likeness", f"val/{branch}/likeness")
        assert set(own) <= logged
        assert events.Scalars(f"train/{branch}/token_gradient/likeness")[0].value > 0


def test_its_weight_decides_how_far_it_moves_the_model(here) -> None:
    """With weight 0 it is measured alone: the model ends as plain fine-tuning leaves it."""
    ends = []
    for own in (["--model.init_args.likeness_weight=0"], ["--model.init_args.likeness_weight=5"], None):
        options = [option for option in SHORT if own is not None or "likeness" not in option]
        arguments = ["fit", "--config=harmon/scenes32", *options, *(own or []), "--trainer.limit_val_batches=0"]
        cli = InfoTokCLI([*arguments, "--model.init_args.objective.terms=[]", "--trainer.enable_checkpointing=false"])
        ends.append(torch.cat([parameter.detach().flatten() for parameter in cli.model.base.parameters()]))
    measured, strong, plain = ends
    assert torch.equal(measured, plain)
    assert not torch.equal(strong, plain)


def test_a_branch_without_a_weight_or_a_term_is_left_out_as_the_guide_says() -> None:
    assert trained_branches(tiny_model(), (), TaskWeights(generation=0)) == ("understanding",)
    assert trained_branches(tiny_model(), ("generation",), TaskWeights(generation=0)) == BRANCHES
    with pytest.raises(SettingsError, match="nothing to train: all task_weights are 0, and objective.terms is empty"):
        check_trainable(TaskWeights(0, 0), ObjectiveConfig(terms=()))


def test_a_wrong_weight_is_one_sentence(capsys) -> None:
    assert main(["fit", "--config=harmon/scenes32", *SHORT, "--model.init_args.likeness_weight=-1"]) == 2
    assert "likeness_weight is -1.0; set it to 0 (off) or more" in capsys.readouterr().err


def test_the_guide_names_every_file_of_the_example() -> None:
    text = GUIDE.read_text()
    for path in [*OWN.rglob("*.py"), *OWN.rglob("*.yaml")]:
        assert f"`{path.relative_to(OWN)}`" in text, path
