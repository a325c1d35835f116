"""The image path of GenEval's scorer, on masks made by hand and on tiny random detectors and classifiers."""

import json

import numpy as np
import pytest
import torch
from evaluation.fakes import FakeModel
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from infotok_lit.errors import DataError, MissingFileError
from infotok_lit.evaluation.geneval import GenEval, judge_stored
from infotok_lit.evaluation.geneval_rules import COLOURS, Detection
from infotok_lit.evaluation.geneval_vision import CLASSES, ImageJudge, crop_on_grey, instances
from infotok_lit.evaluation.running import Evaluation


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=8, encoder_layers=1,
        num_attention_heads=1, dim_feedforward=8, decoder_layers=2, num_queries=5,
        id2label=dict(enumerate(CLASSES)), label2id={name: number for number, name in enumerate(CLASSES)},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("detector")
    model = Mask2FormerForUniversalSegmentation(config)
    # So certain of its classes that something is seen.
    model.class_predictor.weight.data *= 100
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + ["-"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=small | {"vocab_size": len(words), "eos_token_id": len(words) - 1, "max_position_embeddings": 64},
        vision_config=small | {"image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image_judge(detector, classifier):
    return ImageJudge(detector, classifier)


def test_instances_are_what_the_masks_say():
    # Two queries, two classes and "nothing". Query 0: class 0 surely; query 1: class 1 at 1/2.
    class_logits = torch.tensor([[20.0, 0.0, 0.0], [-20.0, 3.0, 3.0]])
    masks = torch.full((2, 8, 8), -50.0)
    masks[0, 2:4, 1:7] = 50.0
    masks[1, :, :4] = 50.0
    # Of the padded 16 x 16 the image is the upper left 16 x 8; it was 32 x 16 before.
    found = instances(class_logits, masks, padded=(16, 16), unpadded=(16, 8), size=(32, 16), labels=["cat", "dog"])
    cat, dog = sorted(found)
    assert cat.label == "cat" and dog.label == "dog"
    assert cat.score == pytest.approx(1, abs=0.05) and dog.score == pytest.approx(0.5, abs=0.03)
    assert dog.box == (0, 0, 16, 32) and dog.mask.all()
    # Rows 2 to 3 of 8 are rows 8 to 15 of 32; columns from 1 of 4 are from 4 of 16. Bilinear edges may move by 1.
    assert np.abs(np.array(cat.box) - (4, 8, 16, 16)).max() <= 1
    assert cat.mask.shape == (32, 16) and cat.mask[10:14, 6:].all() and not cat.mask[:6].any()


def test_a_crop_shows_the_object_on_grey():
    image = Image.new("RGB", (6, 4), (255, 0, 0))
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    mask[1, 2] = False
    crop = np.asarray(crop_on_grey(image, Detection("cat", (2.0, 1.0, 5.0, 3.0), 1.0, mask=mask)))
    expected = np.full((2, 3, 3), (255, 0, 0), np.uint8)
    expected[0, 0] = 0x99
    assert np.array_equal(crop, expected)


def test_a_colour_is_the_text_that_is_nearest_to_the_crop(image_judge, classifier):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
    detections = []
    for left in (0, 20, 40):
        mask = np.zeros((40, 60), bool)
        mask[5:30, left : left + 18] = True
        detections.append(Detection("dog", (left, 5, left + 18, 30), 0.9, mask=mask))
    named = image_judge.colours(image, detections)
    model, tokenizer = CLIPModel.from_pretrained(classifier).eval(), CLIPTokenizer.from_pretrained(classifier)
    processor = CLIPImageProcessorPil.from_pretrained(classifier)
    for detection, colour in zip(detections, named, strict=True):
        pixels = processor(crop_on_grey(image, detection), return_tensors="pt")["pixel_values"]
        likeness = {}
        for candidate in COLOURS:
            total = torch.zeros(12)
            for ending in (" dog", "-colored dog", " object"):
                text = f"a photo of a {candidate}{ending}"
                with torch.no_grad():
                    output = model(pixel_values=pixels, **tokenizer(text, return_tensors="pt"))
                total += output.text_embeds[0]
            likeness[candidate] = float(output.image_embeds[0] @ total / total.norm())
        assert colour == max(likeness, key=likeness.get)


def test_an_image_is_judged_by_what_is_seen_in_it(image_judge):
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (70, 50, 3), np.uint8))
    seen = image_judge.detect(image)
    assert seen and all(one.label in CLASSES and one.score > 0.3 and one.mask.shape == (70, 50) for one in seen)
    for one in seen:
        rows, columns = np.nonzero(one.mask)
        assert one.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    label = seen[0].label
    metadata = {"tag": "single_object", "include": [{"class": label, "count": 1}]}
    verdict, detections = image_judge(image, metadata)
    assert verdict.correct and len(detections) == len(seen) and not any(one.colour for one in detections)
    absent = next(name for name in CLASSES if name not in {one.label for one in seen})
    verdict, _ = image_judge(image, {"tag": "single_object", "include": [{"class": absent, "count": 1}]})
    assert verdict.reasons == (f"expected 1 of {absent}, found 0",)
    metadata["include"][0]["color"] = "red"
    _, detections = image_judge(image, metadata)
    coloured = [one for one in detections if one.colour]
    assert len(coloured) == 1 and coloured[0].label == label and coloured[0].colour in COLOURS


def test_what_cannot_judge_is_refused(tmp_path, detector, classifier):
    with pytest.raises(MissingFileError, match="hf download"):
        ImageJudge(tmp_path, classifier)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(detector)
    model.config.id2label = {number: f"thing {number}" for number in range(80)}
    model.save_pretrained(tmp_path)
    Mask2FormerImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(DataError, match="does not know 80 of GenEval's 80 classes"):
        ImageJudge(tmp_path, classifier)
    with pytest.raises(DataError, match="cannot be used to judge"):
        ImageJudge(classifier, classifier)


def test_verdicts_are_kept_as_scenes_that_can_be_judged_again(image_judge, tmp_path):
    benchmark = GenEval(images_per_prompt=2, image_judge=image_judge)
    evaluation = Evaluation(FakeModel(), benchmark, tmp_path, limit=3)
    evaluation.open()
    rows = evaluation.graded()
    benchmark.write_official(tmp_path, rows)
    assert len(rows) == 6 and all(row["score"] in (0, 1) for row in rows)
    (log,) = tmp_path.glob("verdicts.*.jsonl")
    _, told = judge_stored(log)
    assert told[-1] == "verdicts agree: 6 of 6"
    official = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["correct"] for line in official] == [bool(row["score"]) for row in rows]
    assert {line["tag"] for line in official} == {row["tag"] for row in rows}
    assert json.loads(official[0]["metadata"]) == benchmark.metadata[0]
