"""`evaluate`, from the command line to the result folder."""

import errno
import gzip
import json
from pathlib import Path

import pytest
from evaluation import invented
from tiny import TINY_CONFIGS

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.cli import main
from infotok_lit.commands.evaluate import labels
from infotok_lit.evaluation.catalogue import BENCHMARKS
from infotok_lit.evaluation.models import OwnModel
from infotok_lit.models.export import export_model
from infotok_lit.models.family import family as family_called

RECORDED = Path(__file__).parent / "fixtures" / "geneval_detections.json.gz"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    export_model(family_called("harmon").build(TINY_CONFIGS["harmon"](0.0), str(SCENES_TOKENIZER)), folder, {})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return invented.write_all(tmp_path_factory.mktemp("data"))


def test_everything_runs_and_runs_again_for_nothing(model, data, tmp_path, capsys, monkeypatch):
    command = ["evaluate", "--model", model, "--benchmark", "all", "--limit", "2", "--data", data, "--out", tmp_path]
    command = [*map(str, command), "--batch_size", "16"]
    assert main(command) == 0
    first = capsys.readouterr()
    for line in ("geneval: 8 images to draw", "tiny: about "):
        assert line in first.err
    for name in BENCHMARKS:
        folder = tmp_path / "tiny" / name
        result = json.loads((folder / "result.json").read_text())
        items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
        assert len(items) == result["rows"] > 0 and result["benchmark"] == name
        assert result["model"]["family"] == "harmon" and result["model"]["dtype"] == "float32"
        assert result["model"]["sampler"]["iterations"] == 4 and result["versions"]["torch"]
        if result["graded"]:
            assert all(0 <= score["value"] <= 2800 and score["n"] for score in result["scores"].values())
    complete = {
        name for name in BENCHMARKS if json.loads((tmp_path / "tiny" / name / "result.json").read_text())["complete"]
    }
    # Two prompts or pictures are all that is in the invented files of these, and no judge is wanted.
    assert complete == {"unibench", "pope", "gqa", "seed", "seed_likelihood"}
    pope = json.loads((tmp_path / "tiny" / "pope" / "result.json").read_text())
    assert 0 <= pope["unparsed"] <= 1 and pope["rules"] == "official"
    assert "pope: 6 answers of at most 16 tokens; the files hold 6 questions, the benchmark has 5127" in first.err
    table = (tmp_path / "table.md").read_text()
    assert "The files hold 12 questions, the benchmark has 2374" in table
    assert table == first.out
    assert "| Harmon 1.5B, baseline (paper) |" in table and "0.74" in table and "† cannot come from 40 prompts" in table
    assert "| Harmon, finetune (paper) | 0.72 |" in table and "| Show-o2, finetune (paper) | 0.6 |" in table
    assert "tiny: 0 graded of 8 made; name what judges them" in table
    assert "tiny: 4 graded of 4 made; not the whole benchmark" in table

    def no_work(*arguments, **options):
        raise AssertionError("drawn or asked again")

    monkeypatch.setattr("infotok_lit.evaluation.models.OwnModel.generate", no_work)
    monkeypatch.setattr("infotok_lit.evaluation.models.OwnModel.answer", no_work)
    monkeypatch.setattr("infotok_lit.evaluation.models.OwnModel.likelihoods", no_work)
    assert main(command) == 0
    assert capsys.readouterr().out == first.out


def test_all_with_rules_that_some_lack(model, data, tmp_path, capsys):
    """Each benchmark uses them if it has them, and its own if not, which is said, and stands in its result."""
    command = ["evaluate", "--model", model, "--benchmark", "all", "--limit", "1", "--data", data, "--out", tmp_path]
    assert main([*map(str, command), "--rules", "vlmevalkit"]) == 0
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "no vlmevalkit rules" in line)
    told = set(said.split(":")[0].split(", "))
    used = {
        name: json.loads((tmp_path / "tiny" / name / "result.json").read_text())["rules"]
        for name in ("pope", "mme", "gqa", "seed", "mmmu", "mm_vet")
    }
    assert used == dict.fromkeys(("pope", "mme", "gqa", "seed"), "vlmevalkit") | dict.fromkeys(
        ("mmmu", "mm_vet"), "official"
    )
    assert told & used.keys() == {"mmmu", "mm_vet"}


def test_benchmarks_with_their_own_number_of_images_say_so(model, data, tmp_path, capsys):
    names = ("geneval", "geneval++", "scenes32", "pope")
    command = ["evaluate", "--model", model, "--benchmark", *names, "--limit", "1", "--data", data, "--out", tmp_path]
    for number, said in (("4", ["geneval++, scenes32: one image per prompt"]), ("1", [])):
        assert main([*map(str, command[:-1]), str(tmp_path / number), "--images_per_prompt", number]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "--images_per_prompt" in line]
        assert [line.partition(", whatever")[0] for line in lines] == said


def test_models_stand_side_by_side(model, tmp_path, capsys):
    other = tmp_path / "elsewhere" / "tiny"
    other.parent.mkdir()
    other.symlink_to(model)
    command = [
        "evaluate",
        "--model",
        model,
        other,
        "--benchmark",
        "scenes32",
        "--limit",
        "1",
        "--out",
        tmp_path / "out",
    ]
    assert main([*map(str, command)]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    assert [row[0] for row in rows] == ["| tiny-1", "| tiny-2"] and rows[0][1:] == rows[1][1:]


def test_results_stay_in_the_folder_that_was_asked_for(tmp_path, monkeypatch):
    (tmp_path / "run" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / "here")
    assert labels(["..", "../..", "."]) == ["run", tmp_path.name, "here"]


def test_help_names_every_benchmark(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    words = capsys.readouterr().out.replace(",", " ").replace(";", " ").split()
    assert set(BENCHMARKS) < set(words)


def test_a_run_that_the_user_stops_says_how_to_go_on(model, tmp_path, capsys, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("infotok_lit.evaluation.models.OwnModel.answer", stop)
    command = ["evaluate", "--model", str(model), "--benchmark", "scenes32", "--limit", "1", "--out", str(tmp_path)]
    assert main(command) == 130
    assert f"kept in {tmp_path}, and the same command goes on" in capsys.readouterr().err
    assert len(list((tmp_path / "tiny" / "scenes32" / "images").iterdir())) == 1


def test_two_runs_do_not_work_in_one_folder(model, tmp_path, capsys, monkeypatch):
    """Each would take the other's half-made parts. When the first has ended, its folder is free."""
    command = ["evaluate", "--model", str(model), "--benchmark", "scenes32", "--limit", "1", "--out", str(tmp_path)]
    answer, second = OwnModel.answer, []

    def meanwhile(self, *arguments):
        second.append(main(command))
        return answer(self, *arguments)

    monkeypatch.setattr(OwnModel, "answer", meanwhile)
    assert main(command) == 0 and set(second) == {2}
    assert f"another run evaluates into {tmp_path / 'tiny' / 'scenes32'}" in capsys.readouterr().err
    assert main(command) == 0


def test_a_full_disk_is_named(model, tmp_path, capsys, monkeypatch):
    def full(self, row):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("infotok_lit.evaluation.records.Log.append", full)
    command = ["evaluate", "--model", str(model), "--benchmark", "scenes32", "--limit", "1", "--out", str(tmp_path)]
    assert main(command) == 2
    assert f"{tmp_path}: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["as it is", "unpacked", "lines", "packed lines"])
def test_stored_detections_are_judged_again(kind, tmp_path, capsys):
    scenes = json.loads(gzip.decompress(RECORDED.read_bytes()))
    lines = "".join(json.dumps(scene) + "\n" for scene in scenes).encode()
    contents = {
        "as it is": RECORDED.read_bytes(), "unpacked": json.dumps(scenes).encode(), "lines": lines,
        "packed lines": gzip.compress(lines),
    }  # fmt: skip
    file = tmp_path / "detections"
    file.write_bytes(contents[kind])
    assert main(["evaluate", "--benchmark", "geneval", "--detections", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "verdicts agree: 240 of 240"


def test_a_verdict_that_differs_is_named(tmp_path, capsys):
    (scene,) = json.loads(gzip.decompress(RECORDED.read_bytes()))[:1]
    file = tmp_path / "one.json"
    file.write_text(json.dumps([scene | {"correct": not scene["correct"]}, {**scene, "correct": None}]))
    assert main(["evaluate", "--detections", str(file)]) == 0
    *_, named, last = capsys.readouterr().out.splitlines()
    assert named.startswith("scene 1 is correct in one.json; here: expected 1 of") and last == "verdicts agree: 0 of 1"


def test_an_official_run_is_added_up(tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    invented.json_lines(file, [{"tag": "colors", "correct": True, "metadata": str(n)} for n in range(4)])
    assert main(["evaluate", "--benchmark", "geneval", "--verdicts", str(file)]) == 0
    assert "| stored verdicts | 1.000 ± 0.000 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--benchmark", "genevall"], "no benchmark 'genevall'; did you mean geneval?"),
        (["--benchmark", "mme", "gqa"], "mme, gqa: the files do not ship"),
        (["--benchmark", "seed", "seed_likelihood"], "infotok_lit: seed: the files do not ship"),
        (["--benchmark", "mme", "--data", "nowhere"], "hf download lmms-lab/MME"),
        (["--benchmark", "pope", "--data", "nowhere"], "val2014.zip"),
        (["--benchmark", "pope", "--data", "x", "--rules", "mine"], "rules"),
        (["--benchmark", "mmmu", "--rules", "vlmevalkit"], "MMMU, validation has no rules called 'vlmevalkit'"),
        (["--benchmark", "all", "mmmu", "--data", "x", "--rules", "vlmevalkit"], "choose from official, lmms-eval"),
        (["--benchmark", "geneval", "--detector", "d"], "give both --detector and --classifier"),
        (["--benchmark", "geneval", "--judge", "http://x/v1"], "--judge_model"),
        (["--benchmark", "geneval", "geneval++", "--verdicts", "x"], "name that one by --benchmark"),
        (["--benchmark", "geneval", "--verdicts", "x", "./x"], "names a file twice"),
        (["--benchmark", "scenes32"], "say which --model"),
        (["--detections", "gone.json"], "there is no file gone.json"),
        (["--out", "x"], "say which --benchmark"),
        (["--benchmark", "pope", "--detections", "x"], "by GenEval's rules alone"),
        (["--benchmark", "geneval++", "--judge", "localhost:8000", "--judge_model", "j"], "no URL"),
        (["--benchmark", "geneval++", "--judge", "http://x/v1", "--judge_model", "j", "--judge_limit", "1"], "prices"),
    ],
)
def test_mistakes_are_said_in_one_sentence(options, message, capsys):
    assert main(["evaluate", *options]) == 2
    assert message in capsys.readouterr().err
