"""Scenes and Garments as benchmarks: who knows the truth gets what their judges can tell, and nobody else does."""

import pytest
from evaluation.fakes import FakeModel
from PIL import ImageChops

from infotok_lit.commands.evaluate import evaluate_model
from infotok_lit.evaluation.benchmark import Benchmark
from infotok_lit.evaluation.results import Result, summarise, table
from infotok_lit.evaluation.running import Evaluation, Progress, World
from infotok_lit.evaluation.scenes import GarmentsBenchmark, ScenesBenchmark


def test_what_is_missing_from_a_layout_is_named_and_the_rest_counted(tmp_path, capsys, monkeypatch):
    benchmark = ScenesBenchmark(count=2)
    monkeypatch.setattr(benchmark, "check_complete", lambda folder: [f"images/{n}.png: missing" for n in range(13)])
    list(evaluate_model(FakeModel(), [benchmark], tmp_path, limit=None, batch_size=2, world=World()))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("scenes32: ")]
    assert told == [*(f"scenes32: images/{n}.png: missing" for n in range(10)), "scenes32: and 3 more files"]


class Knowing(FakeModel):
    """Draws and answers as the scenes themselves do; or, `wrong`, draws what the next caption asks for."""

    def __init__(self, scenes, count: int, wrong: bool = False):
        super().__init__()
        drawn = [scenes.sample("generation", number) for number in range(count)]
        self.pictures = {
            sample.caption: other.image for sample, other in zip(drawn, drawn[wrong:] + drawn, strict=False)
        }
        self.samples = [scenes.sample("understanding", number) for number in range(count)]

    def generate(self, prompts, seeds):
        return [self.pictures[prompt] for prompt in prompts]

    def answer(self, images, questions, max_new_tokens):
        return [
            next(
                sample.answer.upper() for sample in self.samples
                if sample.question == question and not ImageChops.difference(sample.image, image).getbbox()
            )
            for image, question in zip(images, questions, strict=True)
        ]  # fmt: skip


def scored(benchmark: Benchmark, folder, wrong: bool = False) -> Result:
    model = Knowing(benchmark.scenes, benchmark.count, wrong)
    evaluation = Evaluation(model, benchmark, folder, batch_size=50)
    evaluation.open()
    rows = evaluation.graded()
    return Result("knowing", benchmark, summarise(benchmark, rows, {}, Progress()))


@pytest.mark.parametrize(("kind", "floor"), [(ScenesBenchmark, 0.99), (GarmentsBenchmark, 0.7)])
def test_the_truth_scores_what_the_judge_can_tell(kind, floor, tmp_path):
    benchmark = kind(count=60)
    result = scored(benchmark, tmp_path / "right")
    assert result.scores["generation"]["value"] >= floor and result.scores["understanding"]["value"] == 1
    # GenEval's formula: the mean of its six categories.
    parts = [score["value"] for part, score in result.scores.items() if part.startswith("generation/")]
    assert len(parts) == 6 and result.scores["generation"]["value"] == pytest.approx(sum(parts) / 6)
    accuracy = result.content["grader"]["accuracy"]
    assert 0.85 < accuracy <= 1 and f"{accuracy:.1%} of the objects in true ones" in table([result])
    other = scored(benchmark, tmp_path / "wrong", wrong=True)
    assert other.scores["generation"]["value"] < 0.4 and other.scores["understanding"]["value"] == 1
