"""Every annotation layout, odd captions, and what is said about rows that cannot be used."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infotok_lit.batch import BrokenSampleError
from infotok_lit.data.image_text import DESCRIBE_QUESTIONS, ImageTextFolder
from infotok_lit.data.rows import RowText, read_row_text

PHOTOS = Path(__file__).parents[1] / "fixtures" / "photos"


def write(path: Path, content) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def picture(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 12), colour).save(path)


def exchanges(source: ImageTextFolder, index: int = 0, draws: int = 300) -> dict[tuple[str, str], int]:
    """How often each question/answer pair is drawn."""
    counts: dict[tuple[str, str], int] = {}
    for seed in range(draws):
        sample = source.sample("understanding", index, np.random.default_rng(seed))
        counts[sample.question, sample.answer] = counts.get((sample.question, sample.answer), 0) + 1
    return counts


def test_photographs():
    source = ImageTextFolder(str(PHOTOS / "annotations.json"))
    rows = json.loads((PHOTOS / "annotations.json").read_text())
    assert len(source) == source.branch_length("understanding") == source.branch_length("generation") == 13
    for index, row in enumerate(rows):
        sample = source.sample("generation", index, np.random.default_rng(index))
        assert sample.caption in row["captions"]
        assert sample.name == f"{row['image']} (row {index})"
        assert (np.asarray(sample.image) == np.asarray(Image.open(PHOTOS / row["image"]).convert("RGB"))).all()
        assert 0 <= sample.crop_offset < 1 and not sample.drop_prompt


def test_questions_and_descriptions_are_drawn_alike():
    source = ImageTextFolder(str(PHOTOS / "annotations.json"))
    row = json.loads((PHOTOS / "annotations.json").read_text())[0]
    counts = exchanges(source, draws=1000)
    asked = {(pair["question"], pair["answer"]) for pair in row["qa"]}
    described = {(question, caption) for question in DESCRIBE_QUESTIONS for caption in row["captions"]}
    assert set(counts) == asked | described
    # 5 equally likely choices, 2 of them questions: 400 of 1000 +- 4 standard deviations of sqrt(1000 * .4 * .6)
    assert abs(sum(counts[pair] for pair in asked) - 400) < 62


def test_a_sample_is_a_function_of_index_and_generator():
    source = ImageTextFolder(str(PHOTOS / "annotations.json"))
    first, second = (source.sample("generation", 3, np.random.default_rng(5)) for _ in range(2))
    assert (first.caption, first.crop_offset) == (second.caption, second.crop_offset)
    offsets = {source.sample("generation", 3, np.random.default_rng(seed)).crop_offset for seed in range(20)}
    assert len(offsets) == 20


@pytest.mark.parametrize(
    ("row", "captions", "questions"),
    [
        ({"caption": " a cat "}, ("a cat",), ()),
        ({"captions": ["a", "b", "a", "", None, "  "]}, ("a", "b"), ()),
        ({"caption": "a", "captions": ["b"], "question": "q", "answer": "r"}, ("a", "b"), (("q", "r"),)),
        ({"question": "What?", "answer": "This."}, (), (("What?", "This."),)),
        ({"answer": 3}, (), ()),
        ({"qa": [{"question": "q", "answer": ""}, {"question": "q", "answer": "a"}]}, (), (("q", "a"),)),
        ({"caption": None, "qa": None, "conversations": None}, (), ()),
        (
            {
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?"},
                    {"from": "gpt", "value": "A dog."},
                    {"from": "human", "value": "Where?\n<image>"},
                    {"from": "gpt", "value": "On a lawn."},
                    {"from": "human", "value": "Nobody answers this."},
                ]
            },
            (),
            (("What is it?", "A dog."), ("Where?", "On a lawn.")),
        ),
        ({"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A dog."}]}, (), ()),
        ({"caption": "x" * 10_000}, ("x" * 10_000,), ()),
        ({"caption": "a 🐈‍⬛ naps 😴"}, ("a 🐈‍⬛ naps 😴",), ()),
        ({"caption": "half an emoji \ud83d"}, ("half an emoji ?",), ()),
    ],
)
def test_row_layouts(row, captions, questions):
    assert read_row_text(row) == RowText(captions, questions)


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"caption": 3}, "caption"),
        ({"captions": [["a"]]}, "captions"),
        ({"qa": {"question": "q"}}, "qa"),
        ({"question": ["q"], "answer": "a"}, "question"),
        ({"conversations": ["hello"]}, "conversations"),
    ],
)
def test_malformed_rows_name_the_key(row, key):
    with pytest.raises(ValueError, match=f'"{key}" must be'):
        read_row_text(row)


def test_options_of_the_layout():
    turns = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "a"}] * 2
    turns[2:] = [{"from": "human", "value": "b?"}, {"from": "gpt", "value": "b"}]
    assert read_row_text({"conversations": turns}, first_turn_only=True).questions == (("a?", "a"),)
    assert read_row_text({"text": "a cat", "caption": "no"}, caption_key="text").captions == ("a cat",)


def test_question_rows_in_jsonl_with_other_image_folder(tmp_path):
    picture(tmp_path / "pictures" / "a.png")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('\ufeff{"image": "a.png", "question": "What colour?", "answer": "red"}\n\n', encoding="utf-8")
    source = ImageTextFolder(str(rows), images=str(tmp_path / "pictures"))
    assert set(exchanges(source, draws=3)) == {("What colour?", "red")}
    with pytest.raises(ValueError, match=r'rows.jsonl: none of its 1 rows can train generation.*"captions"'):
        source.branch_length("generation")


def test_rows_that_name_their_image_by_another_key_are_told_the_right_one(tmp_path):
    picture(tmp_path / "a.png")
    rows = tmp_path / "metadata.jsonl"
    rows.write_text('{"path": "a.png", "text": "red"}\n')
    with pytest.raises(ValueError, match=r'generation, which needs "image" \(.*\) and "text" or'):
        ImageTextFolder(str(rows), caption_key="text").branch_length("generation")


def test_metadata_of_a_hugging_face_image_folder(tmp_path):
    picture(tmp_path / "train" / "a.png", "blue")
    rows = tmp_path / "train" / "metadata.jsonl"
    rows.write_text('{"file_name": "a.png", "text": "a blue square", "license": "MIT"}\n')
    source = ImageTextFolder(str(rows), caption_key="text")
    assert source.branch_length("understanding") == source.branch_length("generation") == 1
    sample = source.sample("generation", 0, np.random.default_rng(0))
    assert (sample.caption, sample.image.getpixel((0, 0))) == ("a blue square", (0, 0, 255))


def test_harmon_data_info(tmp_path):
    picture(tmp_path / "images" / "a.png", "blue")
    picture(tmp_path / "images" / "b.png", "green")
    write(tmp_path / "caps" / "a.json", {"caption": "blue", "long": "all is blue", "image": "elsewhere.png"})
    write(tmp_path / "caps" / "b.json", {"long": ["all is green"]})
    write(tmp_path / "info" / "1.json", [{"image": "a.png", "annotation": "a.json"}])
    write(tmp_path / "info" / "2.json", [{"image": "b.png", "annotation": "b.json"}])
    folders = {"images": str(tmp_path / "images"), "captions": str(tmp_path / "caps")}
    source = ImageTextFolder(str(tmp_path / "info"), caption_key="long", **folders)
    drawn = [source.sample("generation", index, np.random.default_rng(0)) for index in range(2)]
    assert [sample.caption for sample in drawn] == ["all is blue", "all is green"]
    assert [sample.image.getpixel((0, 0)) for sample in drawn] == [(0, 0, 255), (0, 128, 0)]
    assert set(exchanges(source)) == {(question, "all is blue") for question in DESCRIBE_QUESTIONS}

    short = ImageTextFolder(str(tmp_path / "info"), **folders)
    with pytest.raises(BrokenSampleError, match=r"b.png \(row 1\): it has no text for generation"):
        short.sample("generation", 1, np.random.default_rng(0))
    os.remove(tmp_path / "caps" / "a.json")
    with pytest.raises(BrokenSampleError, match=r"a.png \(row 0\): there is no annotation file .*a.json"):
        short.sample("understanding", 0, np.random.default_rng(0))


def test_rows_are_filtered_by_branch_and_counted(tmp_path, caplog):
    for name in "abcd":
        picture(tmp_path / f"{name}.png")
    path = write(
        tmp_path / "rows.json",
        [
            {"image": "a.png", "question": "q", "answer": "a"},
            {"image": "b.png", "caption": "b"},
            {"caption": "no image"},
            {"image": "c.png", "caption": "   "},
            {"image": "d.png", "caption": 7},
        ],
    )
    with caplog.at_level(logging.INFO):
        source = ImageTextFolder(path)
    assert "5 rows: 3 serve understanding, 2 serve generation; 2 left out" in caplog.text
    assert source.branch_length("understanding") == 3
    assert source.sample("generation", 0, np.random.default_rng(0)).name == "b.png (row 1)"
    with pytest.raises(BrokenSampleError, match=r'd.png \(row 4\): "caption" must be text'):
        source.sample("generation", 1, np.random.default_rng(0))


def test_broken_images_are_named(tmp_path):
    (tmp_path / "text.jpg").write_text("not a picture")
    path = write(tmp_path / "rows.json", [{"image": "text.jpg", "caption": "a"}, {"image": "gone.jpg", "caption": "b"}])
    source = ImageTextFolder(path)
    with pytest.raises(BrokenSampleError, match=r"text.jpg \(row 0\): not an image"):
        source.sample("generation", 0, np.random.default_rng(0))
    with pytest.raises(BrokenSampleError, match=r"gone.jpg \(row 1\): there is no file .*gone.jpg"):
        source.sample("understanding", 1, np.random.default_rng(0))


def test_own_questions(tmp_path):
    picture(tmp_path / "a.png")
    path = write(tmp_path / "rows.json", [{"image": "a.png", "caption": "red"}])
    assert set(exchanges(ImageTextFolder(path, describe_questions=["Was ist das?"]))) == {("Was ist das?", "red")}
    with pytest.raises(ValueError, match=r"describe_questions is empty"):
        ImageTextFolder(path, describe_questions=[])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no .json or .jsonl"),
        ({"a.json": "[]"}, "holds no rows"),
        ({"a.json": '["x.png"]'}, "a.json, row 0: a row must be a JSON object, not 'x.png'"),
        ({"a.json": '[{"image": '}, "a.json: not JSON"),
        ({"a.jsonl": '{"image": "x"}\n{"image'}, "a.jsonl, line 2: not JSON"),
        ({"a.json": b"\xff\xfe\xfa"}, "a.json: not JSON"),
    ],
)
def test_unusable_annotations_are_refused(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        ImageTextFolder(str(tmp_path))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_row_that_is_no_object_is_a_broken_sample_with_its_place(name, tmp_path):
    picture(tmp_path / "a.png")
    rows = [json.dumps({"image": "a.png", "caption": "red"}), '"a.png"']
    (tmp_path / name).write_text(f"[{','.join(rows)}]" if name == "rows.json" else "\n".join(rows))
    source = ImageTextFolder(str(tmp_path / name))
    assert source.branch_length("generation") == 2
    assert source.sample("generation", 0, np.random.default_rng(0)).caption == "red"
    place = "row 1" if name == "rows.json" else "line 2"
    with pytest.raises(BrokenSampleError, match=f"{name}, {place}: a row must be a JSON object, not 'a.png'"):
        source.sample("generation", 1, np.random.default_rng(0))


def test_missing_annotations_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no annotation file or folder .*nothing.json"):
        ImageTextFolder(str(tmp_path / "nothing.json"))


@pytest.mark.parametrize(("share", "kept"), [(0.15, 2), (0.5, 6), (0.001, 1), (0.99, 12)])
def test_a_split_parts_images_and_not_rows(tmp_path, share, kept):
    rows = json.loads((PHOTOS / "annotations.json").read_text())
    doubled = [{**row, "image": str(PHOTOS / row["image"])} for row in rows for _ in range(2)]
    source = ImageTextFolder(write(tmp_path / "rows.json", doubled))
    parts = source.split(share)
    for branch in ("understanding", "generation"):
        names = [
            {
                part.sample(branch, i, np.random.default_rng(0)).name.split(" (")[0]
                for i in range(part.branch_length(branch))
            }
            for part in parts
        ]
        assert [len(part) for part in names] == [13 - kept, kept] and not names[0] & names[1]
        assert sum(part.branch_length(branch) for part in parts) == 26


def test_links_to_an_image_are_on_its_side_of_a_split(tmp_path):
    """Wherever they lie; without links, names decide, as ever."""
    rows = json.loads((PHOTOS / "annotations.json").read_text())
    for row in rows:
        shutil.copy(PHOTOS / row["image"], tmp_path)
    (tmp_path / "again").symlink_to(tmp_path)
    links = [{**row, "image": f"again/{row['image']}"} for row in rows]
    for i, row in enumerate(rows):
        (tmp_path / f"z{i}").symlink_to(row["image"])
        os.link(tmp_path / row["image"], tmp_path / f"zz{i}")
        links += [{**row, "image": f"z{i}"}, {**row, "image": f"zz{i}"}, {**row, "image": f"./{row['image']}"}]

    def sides(rows: list[dict]) -> list[list[str]]:
        parts = ImageTextFolder(write(tmp_path / "rows.json", rows)).split(0.3)
        return [[part._rows[int(row)]["image"] for row in part._rows_of["generation"]] for part in parts]

    order = sorted((row["image"] for row in rows), key=lambda name: hashlib.sha256(name.encode()).digest())
    assert set(sides(rows)[1]) == set(order[:4])
    train, val = ({(tmp_path / name).stat().st_ino for name in side} for side in sides(rows + links))
    assert (len(train), len(val)) == (9, 4) and not train & val


def test_a_split_depends_on_names_alone(tmp_path):
    """Another order, and one image more, move none of the others but at the border."""
    rows = [{"image": f"{name}.png", "caption": name} for name in "abcdefghij"]

    def held_out(rows: list[dict]) -> set[str]:
        picture_of = ImageTextFolder(write(tmp_path / "rows.json", rows)).split(0.3)[1]
        return {picture_of._rows[int(row)]["caption"] for row in picture_of._rows_of["generation"]}

    first = held_out(rows)
    assert len(first) == 3 and held_out(rows[::-1]) == first
    assert len(first - held_out([*rows, {"image": "k.png", "caption": "k"}])) <= 1
    with pytest.raises(ValueError, match="two are needed"):
        held_out(rows[:1])
