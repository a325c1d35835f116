"""The base that ships: small enough, complete, and able to do both tasks on scenes that it has not seen."""

import pytest
import torch

from infotok_lit.assets import embedded_base
from infotok_lit.data.scenes import Scenes
from infotok_lit.metrics.scene_scores import QAExactMatch, SceneScore
from infotok_lit.models.families import load_folder


@pytest.fixture(scope="module")
def base():
    return load_folder(embedded_base("harmon", "scenes32"))


def test_it_is_small() -> None:
    assert (embedded_base("harmon", "scenes32") / "harmon.safetensors").stat().st_size <= 6_000_000


def test_it_answers_questions(base) -> None:
    source = Scenes(split="val")
    samples = [source.sample("understanding", i, None) for i in range(128)]
    batch = base.processor.understanding(samples)
    metric = QAExactMatch()
    metric.update(base.describe(batch.pixel_values, batch.questions, 32), batch.answers, batch.questions)
    scores = metric.compute()
    assert scores["overall"] > 0.8, "measured: 0.895 on 1,000 questions"
    assert scores["overall"] > scores["chance"] + 0.3


def test_it_draws_what_captions_say(base) -> None:
    source = Scenes(split="val", categories=("single_object", "colors"))
    captions = [source.draw("generation", i)[1] for i in range(24)]
    metric = SceneScore()
    with torch.no_grad():
        metric.update(base.generate(captions, seed=0), captions)
    assert metric.compute()["overall"] > 0.75, "measured: 0.93 and 0.99 on 1,000 captions"
