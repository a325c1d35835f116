"""The command itself: the studies that ship, real runs from start to table, and what is said of mistakes."""

import csv
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infotok_lit import cli
from infotok_lit.commands.ablate import main
from infotok_lit.commands.fit import InfoTokCLI
from infotok_lit.commands.parsing import run
from infotok_lit.study.cells import Cell, point_job, row_cells
from infotok_lit.study.config import Dimension, Study

ROOT = Path(__file__).parents[2]
STUDIES = sorted([*ROOT.glob("configs/ablation/*.yaml"), *ROOT.glob("configs/sweep/*.yaml")])


def shipped(path: Path) -> Study:
    """A study as `ablate` reads it."""
    found = []

    def keep(study: Study) -> None:
        found.append(study)

    run(keep, ["ablate", "--config", str(path)], config=True)
    return found[0]


def configured(cell: Cell) -> InfoTokCLI:
    """What a cell would run."""
    return InfoTokCLI(cell.arguments, run=False)


def sample_cells(study: Study) -> list[Cell]:
    """One cell of each row, and of points that try every end and every choice of each dimension once."""
    cells = [cell for cell in row_cells(study) if cell.seed == study.seeds[0]]
    if study.search is not None:
        values = {name: ends(dimension) for name, dimension in study.search.space.items()}
        for number in range(max(map(len, values.values()))):
            point = {name: options[number % len(options)] for name, options in values.items()}
            cells.append(point_job(study, point).cells[0])
    return cells


def ends(dimension: Dimension) -> list:
    return [dimension.low, dimension.high] if dimension.options is None else dimension.options


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_cell_of_a_study_that_ships_can_be_run(path, tmp_path, monkeypatch) -> None:
    """In a folder that has images where the configuration for own data looks."""
    shutil.copytree(ROOT / "tests" / "fixtures" / "photos", tmp_path / "data" / "images")
    for name in ("train.json", "val.json"):
        shutil.copy(tmp_path / "data" / "images" / "annotations.json", tmp_path / "data" / name)
    monkeypatch.chdir(tmp_path)
    study = shipped(path)
    for cell in sample_cells(study):
        setup = configured(cell)
        assert setup.trainer.max_steps == study.steps
        assert setup.config.seed_everything == study.seeds[0]
        assert setup.config.data.init_args.seed == study.seeds[0]


def test_the_ablation_has_the_papers_rows_and_the_controls(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    study = shipped(ROOT / "configs" / "ablation" / "scenes32.yaml")
    cells = {cell.variant: configured(cell) for cell in row_cells(study) if cell.seed == 0}
    terms = {name: "".join(term[0] for term in setup.model.objective_config.terms) for name, setup in cells.items()}
    assert terms == {
        "base": "",
        "finetune": "",
        "C": "c",
        "CS": "cs",
        "CSA": "csa",
        "inline": "c",
        "HSIC": "csa",
        "RecA": "",
        "CSA-RecA": "csa",
        "noise": "c",
        "dropout": "",
    }
    assert [name for name, row in study.rows.items() if not row.train] == ["base"]
    weights = {name: setup.model.task_weights for name, setup in cells.items()}
    assert {name for name, weight in weights.items() if weight.reconstruction > 0} == {"RecA", "CSA-RecA"}
    noise = cells["noise"].model
    inline = cells["inline"].model.objective_config
    assert noise.optimiser_config.heads_lr == 0, "its strength stays"
    assert noise.objective_config.projection.initial_std == inline.projection.initial_std
    dropout = cells["dropout"].model.initial_model
    assert dropout.build().config.mar.dropout == 0.1, "the shipped weights are read, with the dropout asked for"


def test_the_study_with_scarce_data_validates_and_probes_under_the_texture_of_training(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    study = shipped(ROOT / "configs" / "ablation" / "scarce_scenes32.yaml")
    (cell,) = (cell for cell in row_cells(study) if (cell.variant, cell.seed) == ("CSA", 2))
    config = configured(cell).config
    train, val = (config.data.init_args[split].init_args for split in ("train", "val"))
    assert (train.num_samples, train.seed, train.split, val.split) == (1000, 2, "train", "held_out")
    assert train.texture == val.texture == 0.6
    callbacks = [callback.class_path.rpartition(".")[2] for callback in config.trainer.callbacks]
    assert callbacks == ["GeneratedImages", "ExportInference", "SceneProbes"], "added to those of a cell"
    probed = {metric.tag for metric in study.metrics.values() if "/probe/" in metric.tag}
    branches, kinds = ("understanding", "generation"), ("structure_bits", "texture_bits")
    assert probed == {f"val/{branch}/probe/{kind}" for branch in branches for kind in kinds}


def test_small_real_runs_from_start_to_table(tmp_path, monkeypatch, capsys) -> None:
    """Two runs at a time, of the embedded model: one that only measures, and one of two steps."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    overlay = {
        "data": {"init_args": dict.fromkeys(("understanding_batch_size", "generation_batch_size"), 2)},
        "trainer": {"callbacks": [], "num_sanity_val_steps": 0, "log_every_n_steps": 1, "accelerator": "cpu"},
    }
    overlay["data"]["init_args"] |= {"val_samples": 4, "val_batch_size": 4}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(overlay))
    study = {
        "name": "small",
        "out": str(tmp_path / "out"),
        "configs": ["configs/harmon/scenes32.yaml", str(tmp_path / "small.yaml")],
        "steps": 2,
        "seeds": [5],
        "rows": {"base": {"train": False}, "CS": {"configs": ["configs/objective/cs.yaml"]}},
        "metrics": {
            "answers": {"tag": "val/understanding/answers/overall"},
            "loss": {"tag": "val/generation/loss", "better": "lower"},
        },
        "keep_checkpoints": False,
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    arguments = ["ablate", "--config", str(tmp_path / "study.yaml"), "--workers", "2"]
    assert main(arguments) == 0
    report = capsys.readouterr().out.strip()
    assert report == str(tmp_path / "out" / "report.md")
    with open(tmp_path / "out" / "table.csv", newline="") as file:
        table = {(line["row"], line["metric"]): float(line["mean"]) for line in csv.DictReader(file)}
    for row, step in (("base", 0), ("CS", 2)):
        (folder,) = (tmp_path / "out" / "rows").glob(f"{row}-*/seed_5")
        events = EventAccumulator(str(folder / "run"))
        events.Reload()
        assert [event.step for event in events.Scalars("val/generation/loss")] == [max(step - 1, 0)]
        assert table[row, "loss"] == pytest.approx(events.Scalars("val/generation/loss")[-1].value)
        record = json.loads((folder / "cell.json").read_text())
        assert record["environment"] == {"OMP_NUM_THREADS": "1"} and record["attempts"][0]["outcome"] == "exit status 0"
        assert json.loads((folder / "run" / "result.json").read_text())["step"] == step
        assert not list(folder.rglob("*.ckpt"))
    assert table["base", "loss"] != table["CS", "loss"]
    assert main(arguments) == 0, "and there is nothing left to do"
    assert "started" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stepps": 3}, "stepps"),
        ({"rows": {"a": {"confgs": []}}}, "confgs"),
        ({"metrics": {"x": {"tag": "y", "better": "more"}}}, "more"),
        ({"references": ["b"]}, "references: b is not one of a"),
        ({"configs": ["nowhere.yaml"]}, "no configuration file at nowhere.yaml"),
        ({"search": {"space": {"x": {"low": 1}}, "objectives": ["m"], "trials": 1}}, "low < high"),
        ({"workers": 0}, "workers is 0"),
        ({"out": "/proc/nowhere"}, "out: /proc/nowhere cannot be written to"),
        ({"storage": "studies/journal.log"}, "journal files are not used any more"),
        ({"analysis": {"endpoint": ["m"], "contrasts": [["a", "b"]]}}, "analysis.contrasts: b is not one of a"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, change, said) -> None:
    study = {"name": "n", "out": str(tmp_path / "out"), "configs": [], "steps": 2, "rows": {"a": {}}}
    study["metrics"] = {"m": {"tag": "val/m"}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study | change))
    assert cli.main(["ablate", "--config", str(tmp_path / "study.yaml")]) == 2
    shown = capsys.readouterr().err
    assert said in shown and len(shown.splitlines()) == 1


def test_help_loads_no_model_code(tmp_path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "infotok_lit", "ablate", "--help"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert answer.returncode == 0 and "--workers" in answer.stdout and "--search" in answer.stdout
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in answer.stderr.splitlines()}
    assert "jsonargparse" in loaded
    assert not loaded & {"torch", "lightning", "optuna", "matplotlib", "tensorboard", "scipy", "numpy"}


def test_a_planned_study_is_one_file(tmp_path, monkeypatch) -> None:
    study = {
        "name": "planned",
        "out": str(tmp_path / "out"),
        "configs": [],
        "steps": 2,
        "seeds": list(range(8)),
        "rows": {"plain": {}, "CSA": {}, "placebo": {"seeds": [0], "control_of": "plain"}},
        "metrics": {"answers": {"tag": "val/answers"}, "drawings": {"tag": "val/score"}},
        "analysis": {"endpoint": ["answers", "drawings"], "contrasts": [["CSA", "plain"]], "margin": 0.02},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    found = shipped(tmp_path / "study.yaml")
    assert found.analysis.contrasts == [("CSA", "plain")] and found.analysis.margin == 0.02
    assert len(row_cells(found)) == 8 + 8 + 1
    # Nothing has run.
    assert main(["ablate", "--config", str(tmp_path / "study.yaml"), "--report_only"]) == 1
    assert (tmp_path / "out" / "decisions.csv").read_text().startswith("contrast,n,mean")


def test_sigterm_means_again_what_it_meant_before(tmp_path, monkeypatch) -> None:
    during = []
    monkeypatch.setattr("infotok_lit.study.run.run_study", lambda *_: during.append(signal.getsignal(signal.SIGTERM)))
    study = {"name": "none", "out": str(tmp_path / "out"), "configs": [], "steps": 1, "rows": {"plain": {}}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**study, "metrics": {"loss": {"tag": "train/loss"}}}))
    before = signal.getsignal(signal.SIGTERM)
    main(["ablate", "--config", str(tmp_path / "study.yaml")])
    assert during == [signal.default_int_handler]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("spelled", [["0", "1"], ["[0,1]"]])
def test_the_workers_get_the_gpus_that_are_named(tmp_path, monkeypatch, spelled) -> None:
    found = []
    monkeypatch.setattr("infotok_lit.study.run.run_study", lambda study, resources: found.append(resources) or True)
    study = {"name": "n", "out": str(tmp_path / "out"), "configs": [], "steps": 2, "rows": {"a": {}}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study | {"metrics": {"m": {"tag": "val/m"}}}))
    assert main(["ablate", "--config", str(tmp_path / "study.yaml"), "--workers", "3", "--gpus", *spelled]) == 0
    assert [found[0].environment(worker)["CUDA_VISIBLE_DEVICES"] for worker in range(3)] == ["0", "1", "0"]
