import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from infotok_lit.callbacks import GeneratedImages
from infotok_lit.scenes import SPECS, Scenes
from infotok_lit.scenes.grammar import draw_captioned_scene, parse_caption, write_caption
from infotok_lit.scenes.metrics import QAExactMatch, SceneScore, drawing_chance
from infotok_lit.scenes.negatives import is_shown
from infotok_lit.scenes.render import render


def batch(indices: range, **arguments) -> tuple[torch.Tensor, list[str]]:
    source = Scenes(**arguments)
    samples = [source.sample("generation", index) for index in indices]
    pixels = torch.from_numpy(np.stack([np.array(sample.image) for sample in samples]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, [sample.caption for sample in samples]


def test_ground_truth_scores_one_and_blank_images_zero():
    images, captions = batch(range(60))
    metric = SceneScore()
    metric.update(images, captions)
    scores = metric.compute()
    # Where all n of a category were right, as if it had been n + 1 of n + 2.
    numbers = Counter(parse_caption(caption).category for caption in captions).values()
    error = math.sqrt(sum((n + 1) / (n + 2) ** 2 / n for n in numbers)) / 6
    assert len(numbers) == 6 and float(scores.pop("standard_error")) == pytest.approx(error)
    assert len(scores) == 7 and all(value == 1 for value in scores.values())
    metric.reset()
    metric.update(torch.zeros_like(images), captions)
    scores = metric.compute()
    assert float(scores.pop("standard_error")) == pytest.approx(error)
    assert all(value == 0 for value in scores.values())


def test_overall_is_the_mean_of_the_categories_that_occurred():
    red_circle, _ = batch(range(1), categories=("colors",))
    circles = Scenes(categories=("colors",)).draw("generation", 0)[0].objects
    colour, shape = circles[0].colour, circles[0].kind
    other = "cross" if shape != "cross" else "circle"
    metric = SceneScore("scenes32")
    metric.update(red_circle.repeat(4, 1, 1, 1), [f"a {shape}", f"a {shape}", f"a {shape}", f"a {other}"])
    metric.update(red_circle, [f"a {other} and a {shape}"])
    metric.update(red_circle, [f"a {colour} {shape}"])
    scores = {name: float(value) for name, value in metric.compute().items()}
    del scores["standard_error"]
    # A mean over images would give 4/6.
    assert scores == pytest.approx({"single_object": 0.75, "two_objects": 0, "colors": 1, "overall": 1.75 / 3})


def test_scene_score_refuses_what_it_cannot_judge():
    images, captions = batch(range(2))
    with pytest.raises(ValueError, match="grammar"):
        SceneScore().update(images, ["a dog", captions[1]])
    with pytest.raises(ValueError, match="equally many"):
        SceneScore().update(images, captions[:1])
    with pytest.raises(ValueError, match="spec"):
        SceneScore("scenes128")


def test_answers_by_hand():
    metric = QAExactMatch()
    metric.update(
        [" Yes", "no", "yes", "two", "a dog"],
        ["yes", "yes", "no", "two", "a cat"],
        ["is there a red circle?"] * 3 + ["how many circles are there?", "who is it?"],
    )
    metric.update(["no"], ["yes"], ["is the red circle left of the blue square?"])
    scores = {name: float(value) for name, value in metric.compute().items()}
    expected = {"existence": 1 / 3, "counting": 1, "relation": 0, "other": 0, "overall": 2 / 6}
    # Always the most frequent answer: 2 of 3 existence questions, and the single one of the three other kinds.
    # Two of six were right.
    assert scores.pop("standard_error") == pytest.approx(math.sqrt(3 / 8 * 5 / 8 / 6))
    assert scores == pytest.approx(expected | {"chance": 5 / 6})
    with pytest.raises(ValueError, match="equally many"):
        metric.update(["yes"], ["yes", "no"], ["is there a red circle?"])


def test_the_standard_error_is_the_spread_of_scores_over_repetitions():
    """200 answers, each right with a probability of 0.8, and 40 drawings of each category, again and again."""
    random = np.random.default_rng(0)
    metric, drawn = QAExactMatch(), SceneScore()
    answers, drawings, errors = [], [], []
    for _ in range(400):
        metric.reset()
        metric.correct[0], metric.answer_counts[0, 0] = random.binomial(200, 0.8), 200
        drawn.reset()
        drawn.total[:] = 40
        drawn.correct[:] = torch.from_numpy(random.binomial(40, [0.95, 0.9, 0.8, 0.7, 0.6, 0.5]))
        metric._update_count = drawn._update_count = 1
        first, second = metric.compute(), drawn.compute()
        answers.append(float(first["overall"]))
        drawings.append(float(second["overall"]))
        errors.append((float(first["standard_error"]), float(second["standard_error"])))
    assert np.mean(errors, axis=0) == pytest.approx([np.std(answers), np.std(drawings)], rel=0.1)


def test_all_states_add_up_across_processes():
    questions = ["is there a red circle?", "describe the image.", "is the red circle large or small?"]
    parts = [(["yes", "x", "large"], ["yes", "y", "small"]), (["no", "x", "small"], ["yes", "x", "small"])]
    whole, summed = QAExactMatch(), QAExactMatch()
    for predictions, answers in parts:
        part = QAExactMatch()
        part.update(predictions, answers, questions)
        whole.update(predictions, answers, questions)
        summed.correct += part.correct
        summed.answer_counts += part.answer_counts
    summed._update_count = 1
    assert summed.compute() == whole.compute()
    for metric in (whole, SceneScore()):
        assert all(reduce is not None and reduce.__name__ == "dim_zero_sum" for reduce in metric._reductions.values())


@pytest.mark.parametrize("categories", [("position",), ("single_object", "colors", "two_objects")])
def test_chance_is_that_of_the_categories_that_are_asked_for(categories):
    """Against the truth of all pairs of scenes and captions, which takes no picture."""
    rng, spec = np.random.default_rng(1), SPECS["scenes32"]
    drawn = [draw_captioned_scene(rng, spec, "val", name) for name in categories for _ in range(100)]
    shown = [is_shown(scene, write_caption(prompt), spec) for prompt, _ in drawn for _, scene in drawn]
    # Each shows its own.
    wanted = (sum(shown) - len(drawn)) / (len(shown) - len(drawn))

    callback, logged = GeneratedImages(score="scenes32"), {}
    callback.metric = SceneScore("scenes32")
    callback.metric.update(*batch(range(20), categories=categories))
    callback.on_validation_epoch_end(None, SimpleNamespace(base=None, log_dict=logged.update))
    assert logged["val/generation/score/overall"] == 1
    assert logged["val/generation/score/chance"] == pytest.approx(wanted, abs=0.04)


def test_chance_is_the_mean_over_all_pairs():
    """Each image scored against every other one's caption; one caption for each gave 0.127 where this is 0.11."""
    rng, spec, names = np.random.default_rng(3), SPECS["scenes32"], ("single_object", "colors")
    drawn = [draw_captioned_scene(rng, spec, "train", names[number % 2]) for number in range(8)]
    metric = SceneScore("scenes32")
    for number, (_, scene) in enumerate(drawn):
        others = [write_caption(prompt) for other, (prompt, _) in enumerate(drawn) if other != number]
        image = torch.from_numpy(render(scene, spec)).permute(2, 0, 1) / 127.5 - 1
        metric.update(image.expand(len(others), -1, -1, -1), others)
    wanted = {name: float(value) for name, value in metric.compute().items() if name != "standard_error"}
    assert wanted["overall"] > 0
    assert drawing_chance("scenes32", num_scenes=8, seed=3, categories=names) == pytest.approx(wanted)


def test_chance_of_drawing_lies_where_counting_puts_it():
    chance = drawing_chance("scenes32", num_scenes=300, seed=0)
    # Asked for two coloured objects in a relation, an unrelated scene fits in about one case of 300.
    assert chance["position"] < 0.05 and chance["color_attribution"] < 0.05
    # Asked for one shape out of four, a scene of one to four objects fits in a quarter to two thirds of cases.
    assert 0.2 < chance["single_object"] < 0.67
    categories = chance.keys() - {"overall"}
    assert chance["overall"] == pytest.approx(np.mean([chance[name] for name in categories]))
