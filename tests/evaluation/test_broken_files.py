"""Benchmark files with a row that cannot be read end in one message, before the first question, that names the row."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluation import invented

from infotok_lit.errors import ExplainedError
from infotok_lit.evaluation.catalogue import Options, make_benchmarks

Edit = Callable[[str], str]


def swap(old: str, new: str) -> Edit:
    """The first place only."""

    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return edit


def becomes(text: str) -> Edit:
    return lambda _: text


@pytest.mark.parametrize(
    ("name", "file", "edit", "said"),
    [
        ("pope", "coco_pope_random.json", swap('"label"', '"lab"'), "row 1 of FILE has no label"),
        ("pope", "coco_pope_random.json", swap('"no"', '"maybe"'), "row 2 of FILE: label cannot be 'maybe'"),
        ("pope", "coco_pope_random.json", becomes("[1]"), "row 1 of FILE is 1, not an object"),
        ("pope", "val2014/COCO_a.jpg", becomes("no picture"), "FILE: not an image of a known format"),
        ("pope", "val2014/COCO_a.jpg", becomes("no picture"), "put whole ones there. The images are COCO's val2014"),
        ("mme", "OCR.txt", swap("\tNo", ""), "line 2 of FILE needs image, question and Yes or No"),
        ("mme", "OCR.txt", swap("\tNo", "\tPerhaps"), "line 2 of FILE needs image, question and Yes or No"),
        ("gqa", "testdev_balanced_questions.json", swap('"answer"', '"a"'), "row 100 of FILE has no answer"),
        ("gqa", "testdev_balanced_questions.json", becomes("[]"), "FILE holds no rows"),
        ("gqa", "testdev_balanced_questions.json", becomes("[" * 99_999), "FILE is not JSON"),
        (
            "gqa",
            "testdev_balanced_questions.json",
            becomes('[{"answer": "a"}]'),
            "FILE holds a list, not rows by their",
        ),
        ("gqa", "testdev_balanced_questions.json", becomes("\x1f\x8b\x08"), "FILE is not JSON"),
        ("seed", "SEED-Bench.json", swap('"choice_c"', '"c"'), "row 1 of FILE has no choice_c"),
        ("seed", "SEED-Bench.json", swap('"answer": "A"', '"answer": "E"'), "row 2 of FILE: answer cannot be 'E'"),
        ("seed", "SEED-Bench.json", becomes("{}"), "FILE holds no rows"),
        ("mmmu", "validation.jsonl", swap("'Bob']", "'Bob'"), "row 1 of FILE: options or answer is no list"),
        ("mmmu", "validation.jsonl", swap("['Ann', 'Bob']", "__import__('os')"), "row 1 of FILE: options or answer"),
        (
            "mmmu",
            "validation.jsonl",
            swap("['Ann', 'Bob']", "7"),
            "row 1 of FILE: options or answer is no list: it is 7",
        ),
        ("mmmu", "validation.jsonl", swap("['Ann', 'Bob']", "'Ann'"), "row 1 of FILE: options or answer is no list"),
        ("mmmu", "validation.jsonl", swap("['Ann', 'Bob']", "{[]: 1}"), "row 1 of FILE: options or answer is no list"),
        ("mmmu", "validation.jsonl", swap("['Ann', 'Bob']", "-" * 99_999 + "1"), "row 1 of FILE: options or answer"),
        ("mmmu", "validation.jsonl", swap("image_1", "x"), "row 1 of FILE: there is no image"),
        ("mmmu", "validation.jsonl", swap("validation_Art_2", "2"), "row 2 of FILE: id '2' is not"),
        ("mmmu", "validation.jsonl", swap('"answer": "B"', '"answer": 3'), "row 1 of FILE: answer cannot be 3"),
        ("mm_vet", "mm-vet.json", swap('"capability"', '"c"'), "row v1_0 of FILE has no capability"),
        ("mm_vet", "mm-vet.json", swap('["ocr", "math"]', '["ocr", ["math"]]'), "capability is no list of names"),
        (
            "mm_vet_v2",
            "mm-vet-v2.json",
            swap("<IMG>v2_0.png<IMG>and in<IMG>v2_1.png<IMG>", ""),
            "row v2_0 of FILE: there",
        ),
        ("unibench", "uni_bench.json", becomes('{"a": {"QAs": []}}'), "FILE holds a dict, not a list of rows"),
        (
            "unibench",
            "uni_bench.json",
            swap('"prompt_id": 1', '"prompt_id": 0'),
            "two rows of FILE have the prompt_id 0",
        ),
        ("unibench", "uni_bench.json", swap('"QA_id": 1', '"QA_id": 0'), "two rows of FILE have the QA_id 0"),
        ("unibench", "uni_bench.json", swap('"QAs"', '"Q"'), "row 1 of FILE has no QAs"),
        ("unibench", "uni_bench.json", swap("Colour, Plain", "Colour"), "QA 0 of FILE has the tag 'Visual, Colour'"),
        ("unibench", "uni_bench.json", swap('"answer": "D"', '"answer": "F"'), "row 2 of the QAs of prompt 0"),
        ("wise", "natural_science.json", swap('"Prompt"', '"P"'), "row 1 of FILE has no Prompt"),
        ("wise", "natural_science.json", swap('"prompt_id": 1000', '"prompt_id": 1001'), "has no prompt_id 1001"),
        ("dpg_bench", "dpg_bench.csv", becomes("item_id,text\na\n"), "row 1 of FILE: text cannot be None"),
        ("dpg_bench", "dpg_bench.csv", becomes("item_id,text\n..,b\n"), "'..' is to name files, and cannot"),
        ("dpg_bench", "dpg_bench.csv", becomes(f"item_id,text\na,{'b' * 150_000}\n"), "FILE is no CSV: field larger"),
        ("dpg_bench", "dpg_bench.csv", becomes("item_id,text\n../../a,b\n"), "'../../a' is to name files, and cannot"),
        ("geneval2", "geneval2_data.jsonl", swap('"prompt"', '"p"'), "row 1 of FILE has no prompt"),
        ("geneval2", "geneval2_data.jsonl", swap('["object"]', "[]"), "row 2 of FILE: skills is no list of names"),
        (
            "geneval2",
            "geneval2_data.jsonl",
            swap('"object"', '["object"]'),
            "row 2 of FILE: skills is no list of names",
        ),
    ],
)
def test_a_broken_row_is_named(name: str, file: str, edit: Edit, said: str, tmp_path: Path):
    getattr(invented, name)(tmp_path / name)
    path = tmp_path / name / file
    path.write_text(edit(path.read_text(encoding="latin-1")), encoding="utf-8")
    with pytest.raises(ExplainedError) as caught:
        make_benchmarks([name], Options(data=tmp_path))
    assert said.replace("FILE", str(path)) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("geneval", '{"tag": "colors", "metadata": "a"}', "row 1 of FILE has no correct"),
        ("geneval", "", "FILE holds no rows"),
        ("geneval", '{"tag": "colors", "metadata": "a", "correct": 5}', "row 1 of FILE: correct is 5, not 0 or 1"),
        ("wise", '{"prompt_id": 1, "consistency": "x"}', "row 1 of FILE: consistency cannot be 'x'"),
        ("wise_verified", '{"prompt_id": 1, "score": 1}\n{"score": 1}', "row 2 of FILE has no prompt_id"),
        ("dpg_bench", "/x/a.png, 1.0, much", "line 1 of FILE ends in no score"),
        ("dpg_bench", "nothing", "no line of FILE reads"),
        ("geneval2", "7", "FILE holds no list"),
        ("geneval2", "[[0.1], [0.2]]", "score list 1 is [0.1], not 2 numbers"),
        ("unibench", '{"a": 1}', "FILE holds no list"),
        ("unibench", '[[99, 1, "A"]]', "record 1 is [99, 1, 'A'], not"),
        ("mm_vet", '[{"score": [1]}]', "FILE holds a list, not rows by their names"),
        ("mm_vet", '{"v1_0": {"score": [5]}}', "row v1_0 of FILE is no question of MM-Vet with grades from 0 to 1"),
        ("mm_vet", '{"v9": {"score": [0.5]}}', "row v9 of FILE is no question of MM-Vet"),
    ],
)
def test_a_broken_verdict_is_named(name: str, text: str, said: str, tmp_path: Path):
    invented.write_all(tmp_path)
    (benchmark,) = make_benchmarks([name], Options(data=tmp_path))
    file = tmp_path / "verdicts"
    file.write_text(text)
    with pytest.raises(ExplainedError) as caught:
        benchmark.aggregate([file])
    assert said.replace("FILE", str(file)) in str(caught.value)


def test_all_images_that_cannot_be_asked_about_are_said_at_once(tmp_path: Path):
    """Before anything is asked: 3 that are missing, 4 that are no images; and what another benchmark lacks."""
    names = [f"{number}.jpg" for number in range(10)]
    invented.pictures(tmp_path / "pope", names)
    lines = [
        {"question_id": number, "image": name, "text": "Is there a cat in the image?", "label": "no"}
        for number, name in enumerate(names)
    ]
    for split in ("random", "popular", "adversarial"):
        invented.json_lines(tmp_path / "pope" / f"coco_pope_{split}.json", lines)
    invented.mmmu(tmp_path / "mmmu")
    options = Options(data=tmp_path)
    assert len(make_benchmarks(["pope", "mmmu"], options)) == 2
    for name in names[1:4]:
        (tmp_path / "pope" / name).unlink()
    for name in names[4:8]:
        (tmp_path / "pope" / name).write_text("no picture")
    (tmp_path / "mmmu" / "images" / "2.png").unlink()
    with pytest.raises(ExplainedError) as caught:
        make_benchmarks(["pope", "mmmu"], options)
    said = str(caught.value)
    assert "POPE: 7 of 10 images are missing or cannot be read" in said and "; and 2 more): put whole ones" in said
    assert f"{tmp_path / 'pope' / 'val2014' / '1.jpg'}: missing" in said and "4.jpg: not an image of a known" in said
    assert "6.jpg" not in said
    assert f"1 of 2 images are missing or cannot be read ({tmp_path / 'mmmu' / 'images' / '2.png'}: missing)" in said
    # What a small run will not ask about is not wanted.
    (benchmark,) = make_benchmarks(["pope"], options, limit=1)
    assert len(benchmark.questions()) == 10


def test_images_that_the_table_of_gqa_lacks_are_named(tmp_path: Path):
    instructions, images = (tmp_path / "gqa" / f"testdev_balanced_{part}" for part in ("instructions", "images"))
    invented.pictures(instructions, ())
    invented.pictures(images, ("n1.png",))
    questions = [{"id": name, "imageId": name, "question": "Who?", "answer": "man"} for name in ("n1", "n2")]
    invented.json_lines(instructions / "rows.jsonl", questions)
    invented.json_lines(images / "rows.jsonl", [{"id": "n1", "image": "n1.png"}])
    with pytest.raises(ExplainedError, match=r"GQA: 1 of 2 images .*testdev_balanced_images/n2: missing"):
        make_benchmarks(["gqa"], Options(data=tmp_path))


def test_a_prompt_that_stands_twice_is_named(tmp_path: Path):
    """In two files of WISE, of which each is good."""
    invented.wise(tmp_path / "wise")
    file = tmp_path / "wise" / "natural_science.json"
    file.write_text(json.dumps([json.loads(file.read_text())[0] | {"prompt_id": 400}]))
    with pytest.raises(ExplainedError, match=f"two rows of {re.escape(str(file.parent))} have the prompt_id 400"):
        make_benchmarks(["wise"], Options(data=tmp_path))


def test_labels_of_pope_that_are_not_all_there_are_not_passed_over(tmp_path: Path):
    """Otherwise the user's own would be put aside for those that ship, and nobody told."""
    invented.pope(tmp_path / "pope")
    (tmp_path / "pope" / "coco_pope_popular.json").unlink()
    with pytest.raises(ExplainedError, match="has labels of POPE, but not coco_pope_popular.json: put all three there"):
        make_benchmarks(["pope"], Options(data=tmp_path))


def test_a_table_that_is_damaged_further_in_is_named(tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    rows = [{"question_id": str(n), "question": f"What is {n}?", "answer": "Yes", "category": "OCR"} for n in range(99)]
    file = tmp_path / "mme" / "test.parquet"
    file.parent.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, compression="gzip")
    content = file.read_bytes()
    # The columns' pages lie before the footer, which stays whole.
    file.write_bytes(content[:4] + bytes(400) + content[404:])
    with pytest.raises(ExplainedError, match=f"{re.escape(str(file))} cannot be read"):
        make_benchmarks(["mme"], Options(data=tmp_path))


def test_the_line_breaks_of_unicode_do_not_end_a_line_of_json(tmp_path: Path):
    """U+2028 stands in texts that were never escaped."""
    invented.geneval2(tmp_path / "geneval2")
    file = tmp_path / "geneval2" / "geneval2_data.jsonl"
    rows = [json.loads(line) | {"note": "one\u2028two"} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (benchmark,) = make_benchmarks(["geneval2"], Options(data=tmp_path))
    assert [drawing.prompt for drawing in benchmark.drawings()] == ["two white cats", "a dog"]
