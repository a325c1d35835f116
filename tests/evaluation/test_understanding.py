"""The understanding benchmarks: what is asked, how often, and scores worked out by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from evaluation import invented
from evaluation.fakes import FakeModel, noise

from infotok_lit.errors import MissingFileError, SettingsError
from infotok_lit.evaluation.benchmark import Benchmark
from infotok_lit.evaluation.gqa import Gqa
from infotok_lit.evaluation.mm_vet import MmVet, MmVetV2
from infotok_lit.evaluation.mme import Mme
from infotok_lit.evaluation.mmmu import Mmmu
from infotok_lit.evaluation.pope import Pope
from infotok_lit.evaluation.results import change, standard_errors
from infotok_lit.evaluation.running import Evaluation
from infotok_lit.evaluation.seed_bench import SeedBench, SeedBenchLikelihood
from infotok_lit.evaluation.unibench import UniBench


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return invented.write_all(tmp_path_factory.mktemp("data"))


def evaluated(benchmark: Benchmark, model: FakeModel, folder: Path) -> tuple[list[dict], dict[str, float]]:
    """Graded rows, and scores by name."""
    evaluation = Evaluation(model, benchmark, folder, batch_size=3)
    evaluation.open()
    rows = evaluation.graded()
    benchmark.write_official(folder, rows)
    return rows, {name: score.value for name, score in benchmark.scores(rows).items()}


def test_pope_asks_a_repeated_question_once_and_counts_it_thrice(data, tmp_path):
    model = FakeModel(lambda image, question: "Yes, there is." if "cat" in question or "kite" in question else "No.")
    rows, scores = evaluated(Pope(data / "pope"), model, tmp_path)
    assert len(rows) == 12 and len(model.asked) == 6
    # random: hits 1 (cat), misses 1 (car), false alarms 1 (kite); the others: hits 1, misses 1, false alarms 0.
    assert scores["random/accuracy"] == 0.5 and scores["popular/accuracy"] == 0.75
    assert scores["random/f1"] == pytest.approx(0.5) and scores["popular/f1"] == pytest.approx(2 / 3)
    assert scores["random/precision"] == 0.5 and scores["random/recall"] == 0.5 and scores["random/yes_ratio"] == 0.5
    assert scores["accuracy"] == pytest.approx(2 / 3) and scores["f1"] == pytest.approx((0.5 + 4 / 3) / 3)
    answers = [json.loads(line) for line in (tmp_path / "answers_popular.jsonl").read_text().splitlines()]
    assert [answer["question"].split()[3] for answer in answers] == ["cat", "dog", "car", "person"]
    assert answers[0]["answer"] == "Yes, there is."


def test_the_harness_rules_grade_the_same_answers_anew(data, tmp_path):
    model = FakeModel(lambda image, question: "Yes.")
    _, official = evaluated(Pope(data / "pope"), model, tmp_path)
    assert official["accuracy"] == 0.5
    rows, scores = evaluated(Pope(data / "pope", rules="lmms-eval"), FakeModel(most=0), tmp_path)
    assert scores["accuracy"] == 0 and all(row["parsed"] is None for row in rows)
    with pytest.raises(SettingsError, match="official, lmms-eval, vlmevalkit"):
        Pope(data / "pope", rules="mine")


def test_mme_adds_questions_and_pairs(data, tmp_path):
    """Everything is right but one answer about OCR: accuracy 3/4, pairs 1/2."""
    answers = iter(["yes", "yes", "yes", "no"])
    model = FakeModel(
        lambda image, question: next(answers) if "OCR" in question else "yes" if "really" in question else "no"
    )
    rows, scores = evaluated(Mme(data / "mme"), model, tmp_path)
    assert len(rows) == 12 and scores["existence"] == scores["code_reasoning"] == 200 and scores["OCR"] == 125
    assert scores["perception"] == scores["existence"] + scores["OCR"]
    assert scores["cognition"] == scores["code_reasoning"]
    assert scores["overall"] == scores["perception"] + scores["cognition"]
    lines = (tmp_path / "results" / "OCR.txt").read_text().splitlines()
    assert [len(line.split("\t")) for line in lines] == [4] * 4
    assert lines[0].split("\t") == ["1.jpg", "Is this really OCR? Please answer yes or no.", "Yes", "yes"]


def test_mme_in_the_release_layout(tmp_path):
    folder = tmp_path / "mme" / "posters"
    invented.pictures(folder / "images", ("7.png",))
    (folder / "questions_answers_YN").mkdir()
    (folder / "questions_answers_YN" / "7.txt").write_text("Is it A? Please answer yes or no.\tYes\nB?\tNo\n")
    benchmark = Mme(tmp_path / "mme")
    first, second = benchmark.questions()
    assert first.images == second.images and first.text.startswith("Is it A?")
    assert np.array_equal(np.asarray(benchmark.open_image(first.images[0], tmp_path)), np.asarray(noise(0)))


def test_gqa_is_exact_up_to_full_stops_and_case(data, tmp_path):
    model = FakeModel(lambda image, question: {"What": "Blue.", "Is i": "no, it is day"}.get(question[:4], "woman"))
    rows, scores = evaluated(Gqa(data / "gqa"), model, tmp_path)
    assert scores == {"accuracy": pytest.approx(2 / 3)}
    assert model.asked[0] == "What colour is the sky?\nAnswer the question using a single word or phrase."
    predictions = json.loads((tmp_path / "testdev_balanced_predictions.json").read_text())
    assert predictions[0] == {"questionId": "100", "prediction": "blue"}


def test_seed_by_letter_and_by_likelihood(data, tmp_path):
    rows, scores = evaluated(SeedBench(data / "seed"), FakeModel(lambda image, question: "B"), tmp_path / "letters")
    assert len(rows) == 2 and scores == {"accuracy": 0.5, "dimension 5": 1.0, "dimension 1": 0.0}
    model = FakeModel()
    rows, scores = evaluated(SeedBenchLikelihood(data / "seed"), model, tmp_path / "likelihood")
    # The fake finds the longest option likeliest: "Twenty", which is B.
    assert [row["parsed"] for row in rows] == ["B", "B"] and scores["accuracy"] == 0.5
    assert model.asked == ["How many?", "And now?"]


def test_seed_asks_each_row_of_a_repeated_id(data, tmp_path):
    """The official scripts count rows. GPT-4V's published answers to 17,990 of them have 17,989 ids."""
    shutil.copytree(data / "seed", tmp_path / "seed")
    file = tmp_path / "seed" / "SEED-Bench.json"
    file.write_text(file.read_text().replace('"8"', '"7"'))
    model = FakeModel(lambda image, question: "B")
    rows, scores = evaluated(SeedBench(tmp_path / "seed"), model, tmp_path / "out")
    assert len(model.asked) == 2 and [row["score"] for row in rows] == [1, 0] and scores["accuracy"] == 0.5
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert lines == [{"question_id": "7", "prediction": "B"}] * 2
    # Nothing is asked again.
    assert evaluated(SeedBench(tmp_path / "seed"), model, tmp_path / "out")[0] == rows and len(model.asked) == 2


def test_mmmu_joins_images_and_reads_both_kinds(data, tmp_path):
    shapes = {}

    def reply(image, question):
        shapes[question.split("\n")[0]] = image.size
        return "It is 3.50 in all" if "how many" in question else "(B)"

    rows, scores = evaluated(Mmmu(data / "mmmu"), FakeModel(reply), tmp_path)
    assert shapes == {
        "<image 1> Who?": (24, 24), "<image 1> and <image 2>: how many?": (48, 24), "<image 1> Where?": (24, 24),
    }  # fmt: skip
    assert [row["score"] for row in rows] == [1, 1, 0]
    assert scores["Art"] == 1 and scores["Basic_Medical_Science"] == 0 and scores["accuracy"] == pytest.approx(2 / 3)
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    assert predictions["validation_Art_1"] == "B" and predictions["validation_Art_2"] == "It is 3.50 in all"
    (first, second) = json.loads((tmp_path / "parse_and_eval" / "Art" / "output.json").read_text())
    assert first["index2ans"] == {"A": "Ann", "B": "Bob"} and first["all_choices"] == ["A", "B"]
    assert second["answer"] == ["3.5", "three and a half"] and second["question_type"] == "open"
    silent = Mmmu(data / "mmmu").grade([{"id": row["id"], "answer": ""} for row in rows])
    assert [row["parsed"] for row in silent] == [None] * 3


def test_mm_vet_answers_wait_for_a_judge(data, tmp_path):
    rows, scores = evaluated(MmVet(data / "mm_vet"), FakeModel(lambda image, question: "fun"), tmp_path)
    assert scores == {} and [row["score"] for row in rows] == [None, None]
    assert json.loads((tmp_path / "answers.json").read_text()) == {"v1_0": "fun", "v1_1": "fun"}


def test_mm_vet_v2_puts_the_images_of_a_question_side_by_side(data, tmp_path):
    model = FakeModel(lambda image, question: f"{image.size} {question}")
    rows, _ = evaluated(MmVetV2(data / "mm_vet_v2"), model, tmp_path)
    assert rows[0]["answer"] == "(48, 24) What is in and in together?"


def test_mm_vet_adds_up_an_official_grade_file(data, tmp_path):
    benchmark = MmVet(data / "mm_vet")
    file = tmp_path / "grades.json"
    file.write_text(json.dumps({"v1_0": {"score": [0.5, 0.7]}, "v1_1": {"score": [1.0, 1.0]}}))
    scores = {name: score.value for name, score in benchmark.scores(benchmark.aggregate([file])).items()}
    assert scores == pytest.approx({"total": 0.8, "ocr": 0.6, "math": 0.6, "rec": 1.0})


def test_unibench_asks_about_its_own_images(data, tmp_path):
    """The letter of every answer is right, but for the second image of the first prompt."""
    benchmark = UniBench(data / "unibench", images_per_prompt=2)
    second = np.asarray(noise(1025))

    def reply(image, question):
        if np.array_equal(np.asarray(image), second):
            return "I do not know"
        return "(D)" if "How many" in question else "(B) blue" if len(model.asked) > 3 else "(A)"

    model = FakeModel(reply)
    rows, scores = evaluated(benchmark, model, tmp_path)
    assert [seed for _, seed in model.drawn] == [1024, 1025, 1026, 1027]
    answers = [row for row in rows if "answer" in row]
    assert len(answers) == 6 and len(model.asked) == 6
    assert [row["parsed"] for row in answers] == ["A", "D", None, None, "B", "B"]
    # Plain 1/2 and Odd 1 make Colour 0.75; Count 1/2 makes Number 0.5.
    assert scores["Colour"] == 0.75 and scores["Number"] == 0.5 and scores["uniscore"] == 0.625
    assert scores["case_uniscore"] == 0.75 and scores["all_correct"] == 0.5
    records = json.loads((tmp_path / "records.json").read_text())
    assert records == [[0, 1, "A"], [1, 1, "D"], [0, -1, ""], [1, -1, ""], [2, 1, "B"], [2, 1, "B"]]
    again = {
        name: score.value for name, score in benchmark.scores(benchmark.aggregate([tmp_path / "records.json"])).items()
    }
    assert again == scores
    # The official run writes "None" where nothing was read.
    (tmp_path / "official.json").write_text(
        json.dumps([[name, right, letter or "None"] for name, right, letter in records])
    )
    assert [row["parsed"] for row in benchmark.aggregate([tmp_path / "official.json"])] == [
        "A",
        "D",
        None,
        None,
        "B",
        "B",
    ]


def test_unibench_lets_an_answer_explain_before_its_letter(data, tmp_path):
    class Cut(FakeModel):
        def answer(self, images, questions, max_new_tokens):
            answers = super().answer(images, questions, max_new_tokens)
            return [" ".join(answer.split()[:max_new_tokens]) for answer in answers]

    benchmark = UniBench(data / "unibench", images_per_prompt=1)
    rows, _ = evaluated(benchmark, Cut(lambda image, question: "well " * 20 + "(A)"), tmp_path)
    assert [row["score"] for row in rows if row.get("label") == "A"] == [1]
    # Answers of earlier versions, which were cut after 16 tokens and do not say so, are not taken for these.
    settings = json.loads((tmp_path / "settings.json").read_text())
    del settings["benchmark"]["max_new_tokens"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(SettingsError, match=r"other settings \(benchmark.max_new_tokens\)"):
        evaluated(benchmark, FakeModel(), tmp_path)


def test_a_standard_error_is_that_of_independent_groups(data):
    """For a mean over independent questions: s / sqrt(n)."""
    benchmark = Gqa(data / "gqa")
    values = np.random.default_rng(0).integers(0, 2, 60).astype(float)
    rows = [{"group": str(number), "score": value} for number, value in enumerate(values)]
    assert standard_errors(benchmark, rows)["accuracy"] == pytest.approx(values.std(ddof=1) / 60**0.5)
    # Two copies of everything in the same groups tell nothing new.
    assert standard_errors(benchmark, rows * 2)["accuracy"] == pytest.approx(values.std(ddof=1) / 60**0.5)
    assert standard_errors(benchmark, rows[:1]) == {}


def test_the_standard_error_of_a_category_is_that_of_its_own_groups(data):
    """Groups of other categories tell nothing about it, and one group alone tells nothing either."""
    benchmark = SeedBench(data / "seed")
    values = {"one": [1.0], "three": [0.0, 1.0, 1.0], "many": np.random.default_rng(0).integers(0, 2, 40).tolist()}
    pairs = [(part, float(value)) for part, own in values.items() for value in own]
    rows = [{"group": str(number), "part": part, "score": value} for number, (part, value) in enumerate(pairs)]
    errors = standard_errors(benchmark, rows)
    assert errors == pytest.approx(
        {
            "accuracy": np.std([value for _, value in pairs], ddof=1) / 44**0.5,
            "three": np.std(values["three"], ddof=1) / 3**0.5,
            "many": np.std(values["many"], ddof=1) / 40**0.5,
        }
    )
    moved = [row | {"score": 1.0} for row in rows]
    changes = change(benchmark, rows, moved)
    assert changes["one"] == (0.0, None) and changes["three"].error == pytest.approx(errors["three"])
    # Where the two runs do not have the same groups, nothing is paired.
    assert change(benchmark, rows, moved[:2] + moved[3:])["three"].error is None


def test_missing_files_say_what_to_fetch(tmp_path):
    with pytest.raises(MissingFileError, match="dpg|hf download lmms-lab/MME"):
        Mme(tmp_path / "mme")
    pope = Pope(tmp_path / "pope")
    assert len(pope.questions()) == 5127
    with pytest.raises(MissingFileError, match="val2014.zip"):
        pope.open_image(pope.questions()[0].images[0], tmp_path)
