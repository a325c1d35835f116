"""Images lie where the official scorers look, and the scorers' result files are added up as they say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from evaluation import invented
from evaluation.fakes import FakeModel, noise
from PIL import Image

from infotok_lit.assets import BENCHMARKS
from infotok_lit.errors import DataError
from infotok_lit.evaluation.benchmark import Benchmark
from infotok_lit.evaluation.dpg_bench import DpgBench
from infotok_lit.evaluation.geneval import GenEval, RewrittenGenEval
from infotok_lit.evaluation.geneval_2 import GenEval2
from infotok_lit.evaluation.geneval_plus_plus import TAGS, GenEvalPlusPlus, checklist
from infotok_lit.evaluation.mm_vet import MmVet
from infotok_lit.evaluation.running import Evaluation
from infotok_lit.evaluation.wise import Wise, WiseVerified


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return invented.write_all(tmp_path_factory.mktemp("data"))


def drawn(benchmark: Benchmark, folder: Path, limit: int | None = None) -> list[dict]:
    evaluation = Evaluation(FakeModel(), benchmark, folder, batch_size=16, limit=limit)
    evaluation.open()
    rows = evaluation.graded()
    benchmark.write_official(folder, rows)
    return rows


def scores(benchmark: Benchmark, rows: list[dict]) -> dict[str, float]:
    return {name: score.value for name, score in benchmark.scores(rows).items()}


def test_geneval(tmp_path):
    drawn(GenEval(), tmp_path, limit=3)
    lines = (BENCHMARKS / "geneval" / "evaluation_metadata.jsonl").read_text().splitlines()
    folders = sorted((tmp_path / "images").iterdir())
    assert [folder.name for folder in folders] == ["00000", "00184", "00368"]
    for folder in folders:
        assert json.loads((folder / "metadata.jsonl").read_text()) == json.loads(lines[int(folder.name)])
        samples = sorted((folder / "samples").iterdir())
        assert [sample.name for sample in samples] == [f"{number:05d}.png" for number in range(4)]
        assert all(Image.open(sample).format == "PNG" for sample in samples)
    problems = GenEval().check_complete(tmp_path)
    assert len(problems) == 2200 and problems[0] == "images/00001/samples/00000.png: missing"


def test_a_file_that_is_no_image_is_not_complete(tmp_path):
    benchmark = GenEval(images_per_prompt=1)
    benchmark.metadata = benchmark.metadata[:2]
    drawn(benchmark, tmp_path)
    assert benchmark.check_complete(tmp_path) == []
    (tmp_path / "images" / "00001" / "samples" / "00000.png").write_bytes(b"half an ima")
    (problem,) = benchmark.check_complete(tmp_path)
    assert problem.startswith("images/00001/samples/00000.png: not an image")


def test_rewritten_prompts_differ_in_nothing_but_the_prompt():
    plain, rewritten = GenEval(), RewrittenGenEval()
    assert len(plain.metadata) == len(rewritten.metadata) == 553
    for one, other in zip(plain.metadata, rewritten.metadata, strict=True):
        assert len(other["prompt"]) > len(one["prompt"])
        assert {**one, "prompt": ""} == {**other, "prompt": ""}
    assert plain.facts["rewritten"] is False and rewritten.facts["rewritten"] is True
    assert plain.facts["prompts_sha256"] != rewritten.facts["prompts_sha256"]


def test_geneval_adds_up_an_official_result_file(tmp_path):
    """Two prompts of one tag and one of another: (3/4 + 0) / 2."""
    entries = [("colors", 1, "a"), ("colors", 1, "a"), ("colors", 1, "b"), ("colors", 0, "b"), ("position", 0, "c")]
    file = tmp_path / "results.jsonl"
    invented.json_lines(file, [{"tag": tag, "correct": bool(right), "metadata": text} for tag, right, text in entries])
    found = scores(GenEval(), GenEval().aggregate([file]))
    assert found == {
        "colors": 0.75, "position": 0, "overall": 0.375, "correct_images": 0.6,
        "prompts_with_a_correct_image": pytest.approx(2 / 3),
    }  # fmt: skip


def test_geneval_plus_plus(tmp_path):
    rows = drawn(GenEvalPlusPlus(), tmp_path, limit=5)
    assert sorted(path.name for path in (tmp_path / "image").iterdir()) == [
        "1.jpg",
        "113.jpg",
        "169.jpg",
        "225.jpg",
        "57.jpg",
    ]
    picture = Image.open(tmp_path / "image" / "57.jpg")
    (row,) = [row for row in rows if row["id"] == "57"]
    difference = np.abs(np.asarray(picture, int) - np.asarray(noise(row["seed"]), int))
    assert picture.format == "JPEG" and difference.mean() < 2


def test_geneval_plus_plus_counts_an_unread_verdict_as_wrong(tmp_path):
    benchmark = GenEvalPlusPlus()
    tags = [line["tag"] for line in benchmark.metadata]
    first = [tags.index(tag) + 1 for tag in TAGS]
    unread = len(tags) - tags[::-1].index("counting")
    verdicts = {**dict.fromkeys(first, 1), unread: -1}
    file = tmp_path / "Output.json"
    entries = [
        {"id": number, "tag": tags[number - 1], "prompt": "", "result": {"correct": correct, "reason": ""}}
        for number, correct in verdicts.items()
    ]
    # What the official script writes, beside its own sums.
    file.write_text(json.dumps({"overall_results": entries, "tag_accuracy": {}, "overall_score_mean_of_tags": 0.9286}))
    found = scores(benchmark, benchmark.aggregate([file]))
    assert found["counting"] == 0.5 and found["overall"] == pytest.approx((6 + 0.5) / 7)
    # A reply without `correct` counts as wrong there, too.
    file.write_text(json.dumps({"overall_results": [*entries[:-1], entries[-1] | {"result": {"reason": "x"}}]}))
    assert scores(benchmark, benchmark.aggregate([file])) == found
    wrong_ones = {
        '[{"id": 1}]': "holds no rows",
        '{"overall_results": [{"id": 1}]}': "row 1 .* has no result",
        '{"overall_results": [{"id": 281, "result": {}}]}': "no prompt 281, only 1 to 280",
    }
    for wrong, said in wrong_ones.items():
        file.write_text(wrong)
        with pytest.raises(DataError, match=said):
            benchmark.aggregate([file])


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ('{"correct": 1, "reason": "x"}', 1), ('```json\n{"correct": 0}\n```', 0), ('{"correct": 2}', None),
        ("yes", None), ('{"right": 1}', None), ("{", None), ('{"correct": "1"}', None),
    ],
)  # fmt: skip
def test_geneval_plus_plus_reads_json_alone(reply, verdict):
    assert GenEvalPlusPlus().read_verdict(reply) == verdict


def test_a_checklist_names_everything_that_is_asked():
    for metadata in GenEvalPlusPlus().metadata:
        lines = checklist(metadata).splitlines()
        assert len(lines) == len(metadata["include"]) + len(metadata.get("exclude", ()))
        for wanted, line in zip(metadata["include"], lines, strict=False):
            assert all(str(value) in line for value in wanted.values())


def test_wise(data, tmp_path):
    benchmark = Wise(data / "wise")
    drawn(benchmark, tmp_path)
    names = {path.name for path in (tmp_path / "images").iterdir()}
    assert names == {f"{number}.png" for number in (1, 400, 401, 567, 700, 701, 900, 1000)}
    assert benchmark.category(567) == "time" and benchmark.category(568) == "space"
    assert [WiseVerified(data / "wise_verified").category(number) for number in (520, 521, 1000)] == [
        "time", "space", "chemistry",
    ]  # fmt: skip


def test_wise_adds_up_official_lines_as_its_formula_says(data, tmp_path):
    """Weights 0.7, 0.2, 0.1 over 2; the overall weights are the categories' shares; 999 is a failure."""
    rng = np.random.default_rng(0)
    lines = [
        {"prompt_id": number, "Subcategory": "s"}
        | {name: float(rng.integers(0, 3)) for name in ("consistency", "realism", "aesthetic_quality")}
        for number in range(1, 1001)
    ]
    value = {
        line["prompt_id"]: (0.7 * line["consistency"] + 0.2 * line["realism"] + 0.1 * line["aesthetic_quality"]) / 2
        for line in lines
    }
    bounds = {
        "culture": (1, 400),
        "time": (401, 567),
        "space": (568, 700),
        "biology": (701, 800),
        "physics": (801, 900),
        "chemistry": (901, 1000),
    }
    means = {name: np.mean([value[number] for number in range(low, high + 1)]) for name, (low, high) in bounds.items()}
    weights = {"culture": 0.4, "time": 0.167, "space": 0.133, "biology": 0.1, "physics": 0.1, "chemistry": 0.1}
    benchmark = Wise(data / "wise")
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    invented.json_lines(files[0], lines[:400])
    invented.json_lines(files[1], lines[400:])
    found = scores(benchmark, benchmark.aggregate(files))
    assert found == pytest.approx(means | {"overall": sum(weights[name] * means[name] for name in means)})
    # Without some verdicts, a category still weighs the same.
    invented.json_lines(files[0], lines[:100])
    fewer = means | {"culture": np.mean([value[number] for number in range(1, 101)])}
    found = scores(benchmark, benchmark.aggregate(files))
    assert found == pytest.approx(fewer | {"overall": sum(weights[name] * fewer[name] for name in fewer)})
    invented.json_lines(files[0], [lines[0] | {"consistency": 999, "realism": 999, "aesthetic_quality": 999}])
    (row,) = benchmark.aggregate(files[:1])
    assert row["score"] is None and benchmark.scores([row]) == {}


def test_wise_verified_adds_up_official_lines(data, tmp_path):
    """Lines as its script writes them; a score that is neither 0 nor 1 is left out there."""
    file = tmp_path / "scores.jsonl"
    scored = {1: 1, 2: 0.0, 3: 0.5, 401: 1, 521: 0, 641: 1, 761: 1.0, 881: 0}
    invented.json_lines(
        file, [{"prompt_id": number, "Subcategory": "s", "score": one} for number, one in scored.items()]
    )
    benchmark = WiseVerified(data / "wise_verified")
    assert scores(benchmark, benchmark.aggregate([file])) == pytest.approx(
        {
            "overall": 0.4 * 0.5 + 0.12 * 3,
            "culture": 0.5,
            "time": 1,
            "space": 0,
            "biology": 1,
            "physics": 1,
            "chemistry": 0,
        }
    )


@pytest.mark.parametrize(("kind", "name"), [(Wise, "wise"), (WiseVerified, "wise_verified")])
def test_wise_writes_the_lines_that_it_adds_up(kind, name, data, tmp_path):
    """Of images with a verdict alone; without any, no file."""
    benchmark = kind(data / name)
    readings = ["Consistency: 2\nRealism: 1\nAesthetic quality: 0", "Consistency: 0\nRealism: 1\nAesthetic quality: 2"]
    readings = readings if kind is Wise else ["Score: 1", "Score: 0"]
    verdicts = [{"verdict": {"reading": benchmark.read_verdict(reading)}} for reading in [*readings, "?"]]
    rows = [{"id": str(number), "group": str(number)} for number in (1, 401, 1000)]
    graded = benchmark.grade([row | verdict for row, verdict in zip(rows, verdicts, strict=True)])
    benchmark.write_official(tmp_path, graded)
    file = tmp_path / "scores.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["prompt_id"], line["Subcategory"]) for line in lines] == [(1, "s1"), (401, "s401")]
    assert set(lines[0]) == {"prompt_id", "Subcategory", *kind.stored}
    assert scores(benchmark, benchmark.aggregate([file])) == scores(benchmark, graded)
    # Nor are the lines of an earlier judge left.
    benchmark.write_official(tmp_path, graded[2:])
    assert not file.exists()


@pytest.mark.parametrize(
    ("reply", "grade"),
    [("0.7", 0.7), ("1", 1), (" 0.3\n", 0.3), (".5", 0.5), ("1.0 |", 1), ("10", None), ("1/10", None), ("-0.5", None),
     ("2", None), ("nan", None), ("good", None), ("", None)],
)  # fmt: skip
def test_mm_vet_takes_the_number_that_a_reply_begins_with(data, reply, grade):
    assert MmVet(data / "mm_vet").read_verdict(reply) == grade


@pytest.mark.parametrize(
    ("reply", "grades"),
    [
        ("Consistency: 2\nRealism: 1\nAesthetic Quality: 0", (2, 1, 0)),
        ("**Consistency:** 1\n**Realism:** 1\n**Aesthetic Quality:** 1", (1, 1, 1)),
        ("Consistency: 2\nRealism: 1", None),
        ("Consistency: 3\nRealism: 1\nAesthetic Quality: 0", None),
        ("Consistency: 20\nRealism: 1\nAesthetic Quality: 0", None),
        ("Consistency: -1\nRealism: 1\nAesthetic Quality: 0", None),
        ("Consistency: 1.5\nRealism: 1\nAesthetic Quality: 0", None),
        ("Consistency (0-2): 1\nRealism: 1\nAesthetic Quality: 0", None),
        ("consistency = 0\nREALISM 2\nAesthetic quality: 1/2", (0, 2, 1)),
    ],
)
def test_wise_reads_three_grades_or_none(data, reply, grades):
    names = ("consistency", "realism", "aesthetic_quality")
    expected = None if grades is None else dict(zip(names, map(float, grades), strict=True))
    assert Wise(data / "wise").read_verdict(reply) == expected


@pytest.mark.parametrize(
    ("reply", "score"),
    [("Score: 1", 1), ("**Score:** 0", 0), ("Score: 10", None), ("1", None), ("Score: -1", None), ("Score: 0.5", None)],
)
def test_wise_verified_reads_right_or_wrong(data, reply, score):
    assert WiseVerified(data / "wise_verified").read_verdict(reply) == score


def test_dpg_bench_lays_four_images_in_a_square(data, tmp_path):
    benchmark = DpgBench(data / "dpg_bench")
    rows = drawn(benchmark, tmp_path)
    assert [row["prompt"] for row in rows[::4]] == ["A long, dense text.", "Another,\nlonger text."]
    square = np.asarray(Image.open(tmp_path / "grids" / "midjourney1.png"))
    assert square.shape == (48, 48, 3)
    # The official scorer's four crops.
    corners = [(0, 0), (0, 24), (24, 0), (24, 24)]
    for row, (top, left) in zip(rows[4:], corners, strict=True):
        assert np.array_equal(square[top : top + 24, left : left + 24], np.asarray(noise(row["seed"])))
    assert benchmark.check_complete(tmp_path) == []
    (tmp_path / "grids" / "midjourney1.png").unlink()
    assert benchmark.check_complete(tmp_path) == ["grids/midjourney1.png: missing"]


def test_dpg_bench_adds_up_the_official_result_file(data, tmp_path):
    file = tmp_path / "results.txt"
    file.write_text(
        "/x/COCO1.png, 1.0, 0.5, 1.0, 0.5, 0.75\n/x/b.png, 0.0, 0.5, 0.0, 0.5, 0.25\nModel: m\nDPG-Bench score: 50\n"
    )
    benchmark = DpgBench(data / "dpg_bench")
    assert scores(benchmark, benchmark.aggregate([file])) == {"overall": 0.5}


def test_geneval_2_maps_prompts_to_files(data, tmp_path):
    benchmark = GenEval2(data / "geneval2")
    drawn(benchmark, tmp_path)
    paths = json.loads((tmp_path / "image_paths.json").read_text())
    assert list(paths) == ["two white cats", "a dog"]
    assert all(Image.open(path).size == (24, 24) for path in paths.values())
    file = tmp_path / "score_lists.json"
    file.write_text(json.dumps([[0.25, 1.0], [0.5]]))
    found = scores(benchmark, benchmark.aggregate([file]))
    assert found == pytest.approx(
        {"soft_tifa_gm": 0.5, "soft_tifa_am": (0.625 + 0.5) / 2, "count": 0.25, "attribute": 1.0, "object": 0.5}
    )
    file.write_text("[[0.25, 1.0]]")
    with pytest.raises(DataError, match="2 prompts"):
        benchmark.aggregate([file])


def test_geneval_2_takes_scores_that_float32_rounds_above_one(data, tmp_path):
    """As lists of the official scorer have them: probabilities of "Yes", "yes" and more are added up."""
    benchmark, file = GenEval2(data / "geneval2"), tmp_path / "score_lists.json"
    file.write_text("[[1.0000000118760255, 0.9999984523358844], [1.0000001256242361]]")
    found = scores(benchmark, benchmark.aggregate([file]))
    assert found["soft_tifa_gm"] == pytest.approx(((1.0000000118760255 * 0.9999984523358844) ** 0.5 + 1.0000001256) / 2)
    file.write_text("[[1.01, 1.0], [1.0]]")
    with pytest.raises(DataError, match="score list 1"):
        benchmark.aggregate([file])


def test_shipped_files_are_what_their_authors_publish():
    """Sizes in bytes, as published; every folder with its licence."""
    sizes = {
        "geneval/evaluation_metadata.jsonl": 85_209,
        "geneval/object_names.txt": 642,
        "geneval_rewritten/geneval_meta_data_rewritten.jsonl": 449_603,
        "geneval_plus_plus/Geneval++.jsonl": 64_253,
        "pope/coco_pope_random.json": 368_166,
        "pope/coco_pope_popular.json": 370_190,
        "pope/coco_pope_adversarial.json": 370_401,
    }
    assert {name: (BENCHMARKS / name).stat().st_size for name in sizes} == sizes
    for name in sizes:
        assert re.search("MIT License|Apache License", (BENCHMARKS / name).with_name("LICENSE").read_text())
