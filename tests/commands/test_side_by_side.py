"""`describe` and `generate` with several models of different families."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import FAMILIES

from infotok_lit.batch import UnderstandingSample
from infotok_lit.commands.describe import describe
from infotok_lit.commands.generate import generate
from infotok_lit.commands.parsing import run
from infotok_lit.errors import SettingsError
from infotok_lit.model_choice import ModelChoice, ModelOptions, labels
from infotok_lit.pictures import MARGIN, TILE

PROMPTS = ("what?", "how many objects are there?")
TOKENS = 5


def ask(folders, *arguments: object) -> int:
    given = ["--max_new_tokens", TOKENS, "--device", "cpu", *(part for text in PROMPTS for part in ("--prompt", text))]
    return run(describe, ["describe", "--model", *map(str, folders.values()), *map(str, (*given, *arguments))])


def truth(model, path, prompt: str) -> str:
    batch = model.processor.understanding([UnderstandingSample(Image.open(path).convert("RGB"), prompt, "", "")])
    with torch.no_grad():
        return model.describe(batch.pixel_values, [prompt], TOKENS)[0]


def test_every_models_answer_stands_beside_the_others(models, folders, pictures, capsys) -> None:
    assert ask(folders, "--image", pictures, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    files = [pictures / name for name in ("a.png", "b.jpg", "c.png")]
    assert rows == [
        {
            "image": str(file),
            "prompt": prompt,
            "answers": {family: truth(model, file, prompt) for family, model in models.items()},
        }
        for file in files
        for prompt in PROMPTS
    ]


def test_without_a_terminal_columns_stand_between_tabs(models, folders, pictures, capsys) -> None:
    # The same image twice: no question may be lost or merged with its double.
    assert ask(folders, "--image", pictures / "a.png", pictures / "a.png") == 0
    head, *lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert head == ["image", "prompt", *FAMILIES]
    assert len(lines) == 4 and {len(line) for line in lines} == {2 + len(FAMILIES)}
    assert lines[:2] == lines[2:]


def test_on_a_terminal_there_is_a_table(folders, pictures, monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "200")
    assert ask(folders, "--image", pictures / "a.png") == 0
    drawn = sys.stdout.getvalue()
    for text in (*FAMILIES, *PROMPTS):
        assert text in drawn
    assert "┃" in drawn


def test_a_broken_image_is_named_once(folders, tmp_path, pictures, capsys) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert ask(folders, "--image", tmp_path / "broken.png", pictures / "a.png") == 1
    said = capsys.readouterr()
    assert said.err.count("broken.png") == 1
    assert len(said.out.splitlines()) == 1 + len(PROMPTS)


def draw(folders, *arguments: object) -> int:
    models = [part for path in folders.values() for part in ("--model", path)]
    return run(generate, ["generate", "--device", "cpu", *map(str, (*models, *arguments))])


def test_pictures_form_a_grid_of_prompts_by_models(models, folders, tmp_path) -> None:
    prompts = ("a red circle", "two squares")
    out = tmp_path / "grid.png"
    given = [part for prompt in prompts for part in ("--prompt", prompt)]
    assert draw(folders, *given, "--seed", 3, "--out", out) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    grid = np.asarray(Image.open(out)).astype(int)
    height = (grid.shape[0] - MARGIN) // len(prompts)
    assert grid.shape[1] == len(models) * (TILE + MARGIN) + MARGIN
    for row, prompt in enumerate(prompts):
        for column, model in enumerate(models.values()):
            top, left = MARGIN + row * height, MARGIN + column * (TILE + MARGIN)
            shown = grid[top : top + TILE, left : left + TILE]
            with torch.no_grad():
                image = model.generate([prompt], seed=3 + row)[0].permute(1, 2, 0).numpy()
            expected = (image * 127.5 + 128).clip(0, 255).astype(int).repeat(TILE // 32, 0).repeat(TILE // 32, 1)
            assert np.abs(shown - expected).max() <= 1
            words = grid[top + TILE : top + height - MARGIN, left : left + TILE]
            assert (words < 100).any(), "there are words below"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "folder"), "the images of 3 models become one picture: call --out a .png file"),
        (("--out", "x.png", "--temperature", "0.5"), "temperature means nothing to a showo2 model"),
        (("--out", "x.png", "--family", "harmon"), "is an exported folder, which brings everything"),
    ],
)
def test_what_does_not_suit_all_models_is_refused(folders, tmp_path, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=message):
        draw(folders, "--prompt", "a", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_models_of_one_name_are_told_apart_by_their_paths(folders, tmp_path) -> None:
    paths = [tmp_path / "one" / "export", tmp_path / "two" / "export", tmp_path / "three"]
    choices = [ModelChoice(str(path), path, "harmon", False, ModelOptions()) for path in paths]
    assert labels(choices) == [str(paths[0]), str(paths[1]), "three"]
