"""Benchmark files with a row that cannot be read end in one message, before the first question, that names the row."""

import json
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
        ("mme", "OCR.txt", swap("\tNo", ""), "line 2 of FILE needs image, question and Yes or No"),
        ("mme", "OCR.txt", swap("\tNo", "\tPerhaps"), "line 2 of FILE needs image, question and Yes or No"),
        ("gqa", "testdev_balanced_questions.json", swap('"answer"', '"a"'), "row 100 of FILE has no answer"),
        ("gqa", "testdev_balanced_questions.json", becomes("[]"), "FILE holds no rows"),
        ("gqa", "testdev_balanced_questions.json", becomes("[" * 99_999), "FILE is not JSON"),
        ("seed", "SEED-Bench.json", swap('"choice_c"', '"c"'), "row 1 of FILE has no choice_c"),
        ("seed", "SEED-Bench.json", swap('"answer": "A"', '"answer": "E"'), "row 2 of FILE: answer cannot be 'E'"),
        ("seed", "SEED-Bench.json", swap('"8"', '"7"'), "two rows of FILE have the question_id 7"),
        ("seed", "SEED-Bench.json", becomes("{}"), "FILE holds no rows"),
        ("mmmu", "validation.jsonl", swap("'Bob']", "'Bob'"), "row 1 of FILE: options or answer is no list"),
        ("mmmu", "validation.jsonl", swap("['Ann', 'Bob']", "__import__('os')"), "row 1 of FILE: options or answer"),
        ("mmmu", "validation.jsonl", swap("image_1", "x"), "row 1 of FILE: there is no image"),
        ("mmmu", "validation.jsonl", swap("validation_Art_2", "2"), "row 2 of FILE: id '2' is not"),
        ("mmmu", "validation.jsonl", swap('"answer": "B"', '"answer": 3'), "row 1 of FILE: answer cannot be 3"),
        ("mm_vet", "mm-vet.json", swap('"capability"', '"c"'), "row v1_0 of FILE has no capability"),
        ("unibench", "uni_bench.json", swap('"QAs"', '"Q"'), "row 1 of FILE has no QAs"),
        ("unibench", "uni_bench.json", swap("Colour, Plain", "Colour"), "QA 0 of FILE has the tag 'Visual, Colour'"),
        ("unibench", "uni_bench.json", swap('"answer": "D"', '"answer": "F"'), "row 2 of the QAs of prompt 0"),
        ("wise", "natural_science.json", swap('"Prompt"', '"P"'), "row 1 of FILE has no Prompt"),
        ("wise", "natural_science.json", swap('"prompt_id": 1000', '"prompt_id": 1001'), "has no prompt_id 1001"),
        ("dpg_bench", "dpg_bench.csv", becomes("item_id,text\na\n"), "row 1 of FILE: text cannot be None"),
        ("dpg_bench", "dpg_bench.csv", becomes("item_id,text\n../../a,b\n"), "'../../a' is to name files, and cannot"),
        ("geneval2", "geneval2_data.jsonl", swap('"prompt"', '"p"'), "row 1 of FILE has no prompt"),
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
        ("wise", '{"prompt_id": 1, "consistency": "x"}', "row 1 of FILE: consistency cannot be 'x'"),
        ("wise_verified", '{"prompt_id": 1, "score": 1}\n{"score": 1}', "row 2 of FILE has no prompt_id"),
        ("dpg_bench", "/x/a.png, 1.0, much", "line 1 of FILE ends in no score"),
        ("dpg_bench", "nothing", "no line of FILE reads"),
        ("geneval2", "[[0.1], [0.2]]", "score list 1 is [0.1], not 2 numbers"),
        ("unibench", '[[99, 1, "A"]]', "record 1 is [99, 1, 'A'], not"),
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


def test_the_line_breaks_of_unicode_do_not_end_a_line_of_json(tmp_path: Path):
    """U+2028 stands in texts that were never escaped."""
    invented.geneval2(tmp_path / "geneval2")
    file = tmp_path / "geneval2" / "geneval2_data.jsonl"
    rows = [json.loads(line) | {"note": "one\u2028two"} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (benchmark,) = make_benchmarks(["geneval2"], Options(data=tmp_path))
    assert [drawing.prompt for drawing in benchmark.drawings()] == ["two white cats", "a dog"]
