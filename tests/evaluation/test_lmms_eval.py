"""Our models inside lmms-eval, offline. Skipped where lmms-eval is not installed, as in the project's environment."""

import io
import sys
from pathlib import Path

import pytest

from infotok_lit.assets import embedded_base

lmms_eval = pytest.importorskip("lmms_eval", reason="lmms-eval is a host of ours, not a dependency")
datasets = pytest.importorskip("datasets", reason="comes with lmms-eval")

TASK = """
task: scenes_answers
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {parquet}}}, token: false}}
test_split: test
output_type: generate_until
doc_to_visual: !function helpers.picture
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 8, until: ["\\n"]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}
"""
CHOICES = """
task: scenes_choices
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {parquet}}}, token: false}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function helpers.picture
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["purple", "yes", "7", "no"]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
HELPERS = "def picture(doc):\n    return [doc['image'].convert('RGB')]\n"
COUNT = 12


@pytest.fixture
def task_folder(tmp_path) -> Path:
    from infotok_lit.scenes import Scenes

    scenes = Scenes(split="val", num_samples=COUNT, question_kinds=("existence",))
    columns: dict[str, list] = {"image": [], "question": [], "answer": []}
    for number in range(COUNT):
        sample = scenes.sample("understanding", number)
        content = io.BytesIO()
        sample.image.save(content, "PNG")
        columns["image"].append({"bytes": content.getvalue(), "path": None})
        columns["question"].append(sample.question)
        # Every third truth is false, so that the score is not 1.
        columns["answer"].append(sample.answer if number % 3 else "purple")
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "test.parquet")
    (tmp_path / "helpers.py").write_text(HELPERS)
    (tmp_path / "scenes_answers.yaml").write_text(TASK.format(parquet=tmp_path / "test.parquet"))
    (tmp_path / "scenes_choices.yaml").write_text(CHOICES.format(parquet=tmp_path / "test.parquet"))
    return tmp_path


@pytest.mark.parametrize(("task", "metric"), [("scenes_answers", "exact_match,none"), ("scenes_choices", "acc,none")])
def test_a_task_of_local_files_is_scored_as_expected(task_folder, monkeypatch, task, metric):
    """By what is generated, and by the likelihood of each option."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from infotok_lit.evaluation.lmms_eval_model import InfoTok

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", [str(task_folder), *sys.path])
    model = InfoTok(str(embedded_base("harmon", "scenes32")), batch_size=5)
    result = simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        batch_size=5,
    )
    # The embedded base answers these kinds without a mistake.
    assert result["results"][task][metric] == pytest.approx(8 / 12, abs=1 / 12)


def test_the_entry_point_names_a_class_that_exists():
    from importlib import import_module

    from infotok_lit.evaluation import lmms_eval_models

    manifest = lmms_eval_models()
    module, _, name = manifest.simple_class_path.rpartition(".")
    assert manifest.model_id == "infotok" and getattr(import_module(module), name).is_simple
