"""`check`: what is said of data before it is trained on, against data whose faults are known."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infotok_lit.cli import main
from infotok_lit.commands.check import Findings, drawn_broken_share
from infotok_lit.data.stream import BrokenSampleTally

PHOTOS = Path(__file__).parents[1] / "fixtures" / "photos"
FAMILIES = ("harmon", "showo2", "openuni")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Writes rows beside the photographs, where the preset for own images looks for them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    shutil.copytree(PHOTOS, tmp_path / "photos")
    rows = json.loads((PHOTOS / "annotations.json").read_text())

    def write(*more: dict) -> list[str]:
        (tmp_path / "photos" / "annotations.json").write_text(json.dumps([*rows, *more]))
        # No card is needed to look at data.
        return ["--config", "data/own_images", "--data.init_args.num_workers", "0", "--trainer.accelerator", "gpu"]

    return write


@pytest.mark.parametrize("family", FAMILIES)
def test_photographs_without_a_fault(family, photos, capsys) -> None:
    assert main(["check", "--config", f"{family}/scenes32", *photos()]) == 0
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    found = [
        (part[0], branch[0], int(part[1]))
        for part, branch in zip(lines, lines[1:], strict=False)
        if part and part[0] in ("train", "validation")
    ]
    assert found == [
        ("train", "understanding", 11),
        ("train", "generation", 11),
        ("validation", "understanding", 2),
        ("validation", "generation", 2),
    ]
    assert "213, 320, 320" in said, "the sides of the photographs"
    assert "broken:" not in said and "cut:" not in said


@pytest.mark.parametrize("family", FAMILIES)
def test_faults_are_named(family, photos, tmp_path, capsys) -> None:
    Image.new("RGB", (300, 60)).save(tmp_path / "photos" / "wide.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "photos" / "tiny.png")
    arguments = photos(
        {"image": "gone.jpg", "caption": "is not there"},
        {"image": "wide.png", "caption": "wide " * 5000},
        {"image": "tiny.png", "caption": "tiny"},
    )
    assert main(["check", "--config", f"{family}/scenes32", *arguments, "--data.init_args.val_share", "0.1"]) == 0
    said = capsys.readouterr().out
    assert "broken: gone.jpg (row 13): there is no file photos/gone.jpg" in said
    assert said.count("gone.jpg (row") == 1, "once, though both branches draw it"
    assert "longer than the model takes, and cut: wide.png (row 14)" in said
    # Of the photographs two are 320 x 213; wherever the others fell, some part has a wide and a tiny one.
    assert sum(int(line.split(": ")[1].split()[0]) for line in said.splitlines() if "lose over a third" in line) == 3
    small = [line for line in said.splitlines() if "have a side under the model's 32 px" in line]
    assert [line.split(": ")[1].split()[0] for line in small] == ["1", "1"], "in both branches of one part"


def test_a_few_words_too_many_are_a_cut_and_three_to_two_is_no_third(photos, tmp_path, capsys) -> None:
    Image.new("RGB", (96, 64)).save(tmp_path / "photos" / "camera.png")
    # Both fit into the limit by themselves, and not beside the template.
    arguments = photos(
        {"image": "camera.png", "caption": "red " * 126},
        {"image": "camera.png", "question": "red " * 2040, "answer": "red"},
    )
    assert main(["check", "--config", "openuni/scenes32", *arguments]) == 0
    said = capsys.readouterr().out
    for row in (13, 14):
        assert f"longer than the model takes, and cut: camera.png (row {row})" in said
    # The two photographs of 320 x 213.
    assert sum(int(line.split(": ")[1].split()[0]) for line in said.splitlines() if "lose over a third" in line) == 2


def test_so_much_broken_that_training_would_stop(photos, capsys) -> None:
    missing = [{"image": f"gone{number}.jpg", "caption": "is not there"} for number in range(30)]
    assert main(["check", "--config", "harmon/scenes32", *photos(*missing)]) == 1
    said = capsys.readouterr().out
    assert "of the samples are broken, so training would stop" in said and "above 20.0%" in said
    assert "broken: 10 more" in said, "twenty are named"


@pytest.mark.parametrize(("broken", "sizes"), [((0.3, 0.0), (8, 24)), ((0.1, 0.4), (5, 5)), ((0.2, 0.2), (1, 9))])
def test_training_would_stop_where_it_does(broken, sizes) -> None:
    """Both branches are judged together, as in training: against its tally of draws that are made."""
    rng, tally = np.random.default_rng(0), BrokenSampleTally(max_share=1, source_size=1)
    for _ in range(2000):
        for share, size in zip(broken, sizes, strict=True):
            tally.count(size, ["broken"] * int((rng.geometric(1 - share, size) - 1).sum()))
    findings = [Findings("", 1000, looked_at=1000, broken=[""] * round(1000 * share)) for share in broken]
    assert drawn_broken_share(findings, sizes) == pytest.approx(tally.broken / (tally.broken + tally.good), abs=0.01)
    findings[0].broken *= 10
    findings[0].looked_at = len(findings[0].broken)
    assert drawn_broken_share(findings, sizes) == 1, "no sample is whole"


def test_long_answers_and_a_limit(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["--limit", "30", "--model.init_args.answer_tokens", "5"]
    assert main(["check", "--config", "harmon/scenes32", *arguments]) == 0
    said = capsys.readouterr().out
    words = said.split()
    assert words.count("1,000,000") == 4 and "at most 30 samples of each were looked at" in said
    assert words.count("understanding") == words.count("generation") == 2, "no name is broken on 80 columns"
    assert "true answers are longer than model.answer_tokens (5)" in said
