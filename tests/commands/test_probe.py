"""`probe`: exported models and runs, what is written and shown, and what no sample can exceed."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from tiny import TinyModule, scenes_data

from infotok_lit.batch import BranchOutput, TokenLayout
from infotok_lit.callbacks.scene_probes import probed_model
from infotok_lit.checkpoints import read_run
from infotok_lit.cli import main
from infotok_lit.modules.base_model import read_heads, rebuild_base
from infotok_lit.scenes import Scenes
from infotok_lit.scenes.probe import ProbeOptions, collect, measure, on_canvas

FEW = ["--train", "60", "--test", "20", "--batch_size", "40", "--device", "cpu"]
PARTS = ["place", "kind", "colour", "size", "frequency", "phase", "noise"]


def run_of(folder: Path, module: TinyModule) -> Path:
    """The checkpoint of a run of one step."""
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, scenes_data())
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_of(folder, TinyModule())
    return folder


def test_an_exported_model_of_any_family_is_probed(exported, model, tmp_path, capsys):
    out = tmp_path / "new" / "probe.json"
    assert main(["probe", "--model", str(exported), *FEW, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert (result["family"], result["train"], result["test"]) == (model.family, 60, 20)
    assert sum(result["structure_ceiling"].values()) == pytest.approx(16.4447, abs=1e-4)
    named = [(row["branch"], row["features"]) for row in result["rows"]]
    assert named == [(branch, kind) for branch in model.token_widths for kind in ("tokens", "mean token")]
    for row in result["rows"]:
        assert list(row["parts"]) == PARTS and row["rate_bits"] is None
        total = sum(row["parts"][part]["mean"] for part in PARTS[4:])
        assert row["texture"]["mean"] == pytest.approx(total, abs=1e-3)
    shown = capsys.readouterr().out
    assert "understanding: bits per image" in shown and "16.44" in shown and "frequency" in shown


@pytest.mark.parametrize("bottleneck", ["projected", "inline"])
def test_a_run_brings_its_posteriors_and_their_rate(tmp_path, bottleneck):
    checkpoint = run_of(tmp_path, TinyModule(bottleneck=bottleneck))
    out = tmp_path / "probe.json"
    assert main(["probe", "--model", str(tmp_path), *FEW, "--out", str(out)]) == 0
    rows = [row for row in json.loads(out.read_text())["rows"] if row["branch"] == "understanding"]
    assert [row["features"] for row in rows] == ["tokens", "mean token", "posterior mean", "posterior sample"]
    sample = rows[-1]
    error = sample["structure"]["error"] + sample["texture"]["error"]
    assert sample["structure"]["mean"] + sample["texture"]["mean"] <= sample["rate_bits"] + 4 * error
    saved = read_run(checkpoint)
    base = rebuild_base(saved)
    heads = read_heads(saved, base)
    source = Scenes("scenes32", "val", 80, 20_000, question_kinds=("description",))
    batch = base.processor.understanding([source.sample("understanding", index) for index in range(80)])
    with torch.no_grad():
        posterior = heads.posterior("understanding", base.understanding(batch).tokens)
    normal = torch.distributions.Normal(posterior.mean, (posterior.log_variance / 2).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1)).sum((1, 2)).mean()
    assert sample["rate_bits"] == pytest.approx(float(kl) / torch.log(torch.tensor(2.0)).item(), rel=1e-4)


def test_objectives_without_posterior_are_probed_by_their_tokens(tmp_path):
    saved = read_run(run_of(tmp_path, TinyModule(())))
    base = rebuild_base(saved)
    rows = measure(probed_model(base, read_heads(saved, base)), ProbeOptions(train=50, test=10))
    assert {row.features for row in rows} == {"tokens", "mean token"}


def test_both_branches_see_the_same_scenes_and_a_seed_repeats_them(model):
    source = Scenes("scenes32", "val", 10, 5, question_kinds=("description",))
    for branch in model.token_widths:
        first, again = (
            collect(probed_model(model), branch, source, ProbeOptions(), lambda done, what: None)[0] for _ in range(2)
        )
        torch.testing.assert_close(first["tokens"].values, again["tokens"].values, rtol=0, atol=0)
        assert len(first["tokens"].values) == 10
        if first["tokens"].local is not None:
            height, width = first["tokens"].local.shape[1:3]
            assert height * width <= first["tokens"].present.shape[1:].numel()


def test_tokens_lie_where_they_belong_and_hidden_places_are_zero():
    values = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    output = BranchOutput(None, None, values, torch.tensor([[0, 4], [2, 1]]), TokenLayout(1, (2, 2)), None, None)
    expected = [[[1, 1], [0, 0], [0, 0], [0, 0], [2, 1]], [[0, 0], [4, 1], [3, 1], [0, 0], [0, 0]]]
    assert on_canvas(output, values).tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nowhere"], "there is no model at nowhere"),
        (["--model", ".", "--train", "3"], "probes need 50 scenes to train"),
        (["--model", ".", "--scenes", "scenes16"], "scenes16"),
        (["--model", ".", "--texture", "1.5"], "texture must lie in [0, 1], got 1.5"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, said, run, monkeypatch, capsys):
    monkeypatch.chdir(run)
    assert main(["probe", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_run_is_probed_in_single_precision_only(run, capsys):
    assert main(["probe", "--model", str(run), "--dtype", "bfloat16"]) == 2
    assert "leave out --dtype" in capsys.readouterr().err
