"""GenEval's rules against 240 recorded official verdicts and cases worked out by hand."""

from pathlib import Path

import pytest

from infotok_lit.errors import DataError
from infotok_lit.evaluation.geneval_rules import Detection, certain_objects, judge, read_scene, relations
from infotok_lit.evaluation.records import read_json_lines

RECORDED = Path(__file__).parent / "fixtures" / "geneval_detections.json.gz"


def test_recorded_scenes_get_the_official_verdict():
    scenes = [read_scene(content, "scene") for content in read_json_lines(RECORDED)]
    assert len(scenes) == 240
    assert {scene.correct for scene in scenes} == {True, False}
    assert {scene.metadata["tag"] for scene in scenes} >= {"counting", "position", "color_attr"}
    verdicts = [judge(scene.metadata, scene.detections).correct for scene in scenes]
    assert verdicts == [scene.correct for scene in scenes]


ONE_CAT = {"class": "cat", "box": [0, 0, 1, 1], "score": 1}


def cat(score: float, left: float = 0, colour: str = "red") -> Detection:
    return Detection("cat", (left, 0, left + 10, 10), score, colour)


def prompt(tag: str, **entry) -> dict:
    return {"tag": tag, "include": [{"class": "cat", "count": 1} | entry]}


@pytest.mark.parametrize(
    ("tag", "score", "correct"),
    [("single_object", 0.3, False), ("single_object", 0.31, True), ("counting", 0.9, False), ("counting", 0.91, True)],
)
def test_a_detection_must_be_above_its_threshold(tag, score, correct):
    assert judge(prompt(tag), [cat(score)]).correct is correct


def test_more_objects_than_asked_are_wrong_only_where_they_are_excluded():
    three = [cat(0.95), cat(0.94), cat(0.93)]
    counting = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}
    assert judge(prompt("single_object"), three).correct
    assert judge(counting, three[:2]).correct
    assert judge(counting, three).reasons == ("expected fewer than 3 of cat, found 3",)


def test_only_the_sixteen_most_certain_objects_of_a_class_exist():
    crowd = [cat(0.91 + 0.001 * number, left=number) for number in range(20)]
    kept = certain_objects(crowd, 0.3)["cat"]
    assert [one.box[0] for one in kept] == list(range(19, 3, -1))
    seventeen = {"tag": "counting", "include": [], "exclude": [{"class": "cat", "count": 17}]}
    assert judge(seventeen, crowd).correct


def test_colours_are_asked_of_the_most_certain_objects_only():
    red_is_second = [cat(0.5, colour="red"), cat(0.8, colour="blue")]
    assert not judge(prompt("colors", color="red"), red_is_second).correct
    assert judge(prompt("colors", color="blue"), red_is_second).correct


@pytest.mark.parametrize(
    ("left", "top", "expected"),
    [
        (-100, 0, {"left of"}),
        (100, 0, {"right of"}),
        (0, -100, {"above"}),
        (0, 100, {"below"}),
        # Offset (30, 40), shortened by 4 on each axis: 26/50 = 0.52 and 36/50 = 0.72.
        (30, 40, {"right of", "below"}),
        # Offset (28, 40): 24/48.8 = 0.49 and 36/48.8 = 0.74.
        (28, 40, {"below"}),
        # An offset of at most a tenth of both sizes leaves nothing.
        (4, 4, set()),
        (0, 0, set()),
    ],
)
def test_relations_of_two_boxes_of_twenty_pixels(left, top, expected):
    assert relations((left, top, left + 20, top + 20), (0, 0, 20, 20)) == expected


def test_a_position_must_hold_against_every_object_of_the_target():
    dog = Detection("dog", (50, 0, 60, 10), 0.9)
    metadata = {
        "tag": "position",
        "include": [{"class": "cat", "count": 2}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
    }
    assert judge(metadata, [cat(0.9), cat(0.8, left=20), dog]).correct
    assert not judge(metadata, [cat(0.9), cat(0.8, left=80), dog]).correct
    assert not judge(metadata, [cat(0.9), dog]).correct


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"metadata": {"tag": "colors"}, "detections": []},
        {"metadata": prompt("colors"), "detections": [{"class": "cat", "box": [0, 0, 1], "score": 0.5}]},
        {"metadata": prompt("position", position=["above", 3]), "detections": [ONE_CAT]},
        {"metadata": prompt("colors"), "detections": [ONE_CAT | {"score": float("nan")}]},
        {"metadata": prompt("colors"), "detections": [ONE_CAT | {"box": [0, 0, float("inf"), 1]}]},
        {"metadata": prompt("colors"), "detections": [], "correct": "false"},
        {"metadata": prompt("colors") | {"tag": ["colors"]}, "detections": []},
    ],
)
def test_what_is_no_scene_is_named(content):
    with pytest.raises(DataError, match="line 7 of x"):
        read_scene(content, "line 7 of x")
