"""The bases that ship: small enough, complete, and able to do what their cards say on unseen scenes."""

import pytest
import torch

from infotok_lit.assets import embedded_base
from infotok_lit.models.family import load_folder
from infotok_lit.scenes import Scenes
from infotok_lit.scenes.metrics import QAExactMatch, SceneScore

SHIPPED = ("harmon", "openuni", "showo2")
LEAST_DRAWN = {("single_object", "colors"): 0.85, ("position",): 0.6}
"""Of captions of these categories."""


@pytest.fixture(scope="module", params=SHIPPED)
def base(request):
    return load_folder(embedded_base(request.param, "scenes32"))


@pytest.mark.parametrize("family", SHIPPED)
def test_they_are_small(family) -> None:
    folder = embedded_base(family, "scenes32")
    assert 0 < sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 6_000_000


def test_it_answers_questions(base) -> None:
    source = Scenes(split="val")
    samples = [source.sample("understanding", i, None) for i in range(128)]
    batch = base.processor.understanding(samples)
    metric = QAExactMatch()
    metric.update(base.describe(batch.pixel_values, batch.questions, 32), batch.answers, batch.questions)
    scores = metric.compute()
    assert scores["overall"] > 0.8, "measured: 0.983, 0.983 and 0.948 on 1,000 questions"
    assert scores["overall"] > scores["chance"] + 0.3


@pytest.mark.parametrize("categories", LEAST_DRAWN)
def test_it_draws_what_captions_say(categories, base) -> None:
    source = Scenes(split="val", categories=categories)
    captions = [source.draw("generation", i)[1] for i in range(24)]
    metric = SceneScore()
    with torch.no_grad():
        metric.update(base.generate(captions, seed=0), captions)
    assert metric.compute()["overall"] > LEAST_DRAWN[categories], "measured on 1,000 captions: see the base's card"
