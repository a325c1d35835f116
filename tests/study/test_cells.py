"""From a study to command lines: the same configuration is the same folder, another one never is."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from infotok_lit.errors import MissingFileError, SettingsError
from infotok_lit.study.cells import row_cells
from infotok_lit.study.config import Analysis, Dimension, Metric, Row, Search, Study

METRICS = {"answers": Metric("val/answers"), "rate": Metric("val/rate", better="none", optional=True)}


@pytest.fixture
def study(tmp_path) -> Study:
    for name, content in {"base": {"model": {"lr": 0.1}}, "overlay": {"model": {"terms": ["compactness"]}}}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return Study(
        name="test",
        out=str(tmp_path / "out"),
        configs=[str(tmp_path / "base.yaml")],
        metrics=METRICS,
        steps=30,
        validate_every=10,
        rows={
            "base": Row(train=False),
            "c": Row(configs=[str(tmp_path / "overlay.yaml")], overrides={"model.lr": 0.5, "model.names": ["a", None]}),
        },
        overrides={"model.lr": 0.2, "trainer.accelerator": "cpu"},
        seeds=[4, 7],
    )


def folders(study: Study) -> dict[tuple[str, int], Path]:
    return {(cell.variant, cell.seed): cell.folder for cell in row_cells(study)}


def test_a_command_names_files_in_order_then_the_budget_then_what_the_row_overrides(study, tmp_path) -> None:
    cells = {(cell.variant, cell.seed): cell for cell in row_cells(study)}
    cell = cells["c", 7]
    assert cell.arguments[:-1] == (
        "fit",
        "--config",
        str(tmp_path / "base.yaml"),
        "--config",
        str(tmp_path / "overlay.yaml"),
        "--trainer.max_steps=30",
        "--trainer.val_check_interval=10",
        "--model.lr=0.5",
        "--trainer.accelerator=cpu",
        '--model.names=["a", null]',
        "--seed_everything=7",
        "--data.init_args.seed=7",
    )
    assert str(cell.folder / "run") in cell.arguments[-1]
    assert cell.last_step == 30
    base = cells["base", 4]
    assert base.arguments[0] == "validate" and base.last_step == 0
    assert base.arguments[1:5] == ("--config", str(tmp_path / "base.yaml"), *cell.arguments[5:7])


def test_steps_between_validations_are_counted_in_batches_for_lightning(study, tmp_path) -> None:
    """By what the row says, else the study, else the last configuration, also one that is laid under another."""
    (tmp_path / "eight.yaml").write_text(yaml.safe_dump({"trainer": {"accumulate_grad_batches": 8}}))
    (tmp_path / "over.yaml").write_text(yaml.safe_dump({"over": "eight.yaml", "trainer": {"precision": "32"}}))
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"trainer": {"accumulate_grad_batches": 2}}))
    rows = {
        "under": Row(),
        "last": Row([str(tmp_path / "two.yaml")]),
        "overridden": Row([str(tmp_path / "two.yaml")], {"trainer.accumulate_grad_batches": 3}),
    }
    accumulating = replace(study, configs=[*study.configs, str(tmp_path / "over.yaml")], rows=rows, seeds=[0])
    assert intervals(accumulating) == {"under": 80, "last": 20, "overridden": 30}
    overrides = study.overrides | {"trainer.accumulate_grad_batches": 5}
    assert intervals(replace(accumulating, overrides=overrides)) == {"under": 50, "last": 50, "overridden": 30}


def intervals(study: Study) -> dict[str, int]:
    name = "--trainer.val_check_interval="
    return {
        cell.variant: int(argument.removeprefix(name))
        for cell in row_cells(study)
        for argument in cell.arguments
        if argument.startswith(name)
    }


def test_seeds_take_turns_so_that_an_early_look_compares_rows(study) -> None:
    assert [(cell.seed, cell.variant) for cell in row_cells(study)] == [(4, "base"), (4, "c"), (7, "base"), (7, "c")]


def test_a_folder_stands_for_a_configuration(study, tmp_path) -> None:
    before = folders(study)
    assert len(set(before.values())) == 4
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("# a comment\n" + overlay.read_text())
    assert folders(study) == before
    assert folders(replace(study, metrics={"answers": Metric("x")}, confidence=0.9)) == before
    overlay.write_text(yaml.safe_dump({"model": {"terms": []}}))
    after = folders(study)
    assert after["base", 4] == before["base", 4] and after["c", 4] != before["c", 4]


@pytest.mark.parametrize(
    "change", [{"steps": 60}, {"validate_every": 30}, {"overrides": {"model.lr": 0.3}}, {"seeded": ["seed_everything"]}]
)
def test_whatever_decides_the_results_changes_the_folder(study, change) -> None:
    before, after = folders(study), folders(replace(study, **change))
    assert not set(before.values()) & set(after.values())


def test_a_missing_file_is_named(study) -> None:
    with pytest.raises(MissingFileError, match="no configuration file at nowhere.yaml"):
        row_cells(replace(study, configs=["nowhere.yaml"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": {}}, "nothing to run"),
        ({"metrics": {}}, "at least one of metrics"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"seeds": [-1]}, "not negative"),
        ({"validate_every": 7}, "must divide steps"),
        ({"validate_every": 0}, "validate_every is 0"),
        ({"confidence": 95}, "confidence is 95"),
        ({"rows": {"a/b": Row()}}, "a name becomes a folder"),
        ({"rows": {"..": Row()}}, "a name becomes a folder"),
        ({"references": ["nobody"]}, "references: nobody is not one of base, c"),
        ({"search": Search({"x": Dimension(low=0, high=1)}, ["speed"], trials=2)}, "search.objectives: speed"),
        ({"metrics": {"rate": METRICS["rate"]}}, "every metric is optional"),
        ({"rows": {"a": Row(control_of="b")}}, "rows.a.control_of: b is not one of a"),
        ({"rows": {"a": Row(control_of="a")}}, "rows.a.control_of: a row always equals itself"),
        ({"overrides": {"trainer.max_steps": 60}}, "^overrides: trainer.max_steps cannot be set there"),
        ({"rows": {"a": Row(overrides={"trainer.max_steps": 60})}}, "^rows.a.overrides: trainer.max_steps cannot"),
        ({"overrides": {"trainer": {"max_steps": 60}}}, "^overrides: trainer cannot be set whole"),
        ({"overrides": {"trainer.logger": False}}, "^overrides: trainer.logger cannot be set there"),
        ({"overrides": {"trainer.logger.init_args.name": "x"}}, "^overrides: trainer.logger cannot be set there"),
        (
            {"search": Search({"trainer.max_steps": Dimension(choices=[30, 60])}, ["answers"], sampler="grid")},
            "^search.space: trainer.max_steps cannot",
        ),
        (
            {
                "search": Search(
                    {"x": Dimension(variants={"y": Row(overrides={"seed_everything": 3})})}, ["answers"], sampler="grid"
                )
            },
            "^search.space.x.variants.y.overrides: seed_everything takes the seed of each run",
        ),
        ({"overrides": {"data.init_args.seed": 3}}, "^overrides: data.init_args.seed takes the seed of each run"),
        ({"storage": "studies/journal.log"}, "journal files are not used any more"),
        ({"analysis": Analysis(["speed"], [("base", "c")])}, "analysis.endpoint: speed is not one of"),
        ({"analysis": Analysis(["rate"], [("base", "c")])}, "rate must be better higher or lower"),
        ({"analysis": Analysis(["answers"], [("base", "d")])}, "analysis.contrasts: d is not one of"),
        (
            {
                "metrics": METRICS | {"loss": Metric("val/loss", better="lower")},
                "analysis": Analysis(["answers", "loss"], [("base", "c")]),
            },
            "all better higher, or all lower",
        ),
        ({"search": Search({"x": Dimension(low=0, high=1)}, ["rate"], trials=2)}, "not optional"),
    ],
)
def test_a_wrong_study_is_refused_by_name(study, change, said) -> None:
    with pytest.raises(SettingsError, match=said):
        replace(study, **change)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"endpoint": []}, "at least one metric in endpoint"),
        ({"contrasts": [("a", "a")]}, "compared with itself"),
        ({"margin": 0.0}, "margin > 0"),
        ({"level": 0.9}, "level < 0.5"),
        ({"power": 0.01}, "level < power"),
    ],
)
def test_a_wrong_analysis_is_refused(settings, said) -> None:
    with pytest.raises(SettingsError, match=said):
        Analysis(**{"endpoint": ["answers"], "contrasts": [("a", "b")]} | settings)


def test_a_row_may_have_seeds_of_its_own(study) -> None:
    rows = study.rows | {"base": Row(train=False, seeds=[7, 9])}
    cells = [(cell.seed, cell.variant) for cell in row_cells(replace(study, rows=rows))]
    assert cells == [(4, "c"), (7, "base"), (7, "c"), (9, "base")]
    with pytest.raises(SettingsError, match="seeds of a row is empty"):
        Row(seeds=[])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "exactly one of"),
        ({"low": 0.0}, "low < high"),
        ({"low": 2.0, "high": 1.0}, "low < high"),
        ({"low": 0.0, "high": 1.0, "choices": [1]}, "exactly one of"),
        ({"low": 0.0, "high": 1.0, "log": True}, "low above 0"),
        ({"low": 0.5, "high": 4.0, "integer": True}, "whole ends"),
        ({"choices": []}, "must not be empty"),
        ({"choices": [[1, 2]]}, "use variants"),
    ],
)
def test_a_wrong_dimension_is_refused(settings, said) -> None:
    with pytest.raises(SettingsError, match=said):
        Dimension(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"space": {}, "sampler": "grid"}, "search.space is empty"),
        ({"space": {"x": Dimension(low=0, high=1)}, "sampler": "grid"}, "choices instead of a range for x"),
        ({"space": {"x": Dimension(choices=[1])}, "sampler": "tpe"}, "how many points"),
        ({"space": {"x": Dimension(choices=[1])}, "trials": 0}, "trials is 0"),
        ({"space": {"x": Dimension(choices=[1])}, "objectives": []}, "search.objectives is empty"),
    ],
)
def test_a_wrong_search_is_refused(settings, said) -> None:
    with pytest.raises(SettingsError, match=said):
        Search(**{"objectives": ["answers"]} | settings)
