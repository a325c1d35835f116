"""`generate`: which picture comes from which prompt and seed; files, folders, and what is refused."""

import json
from dataclasses import make_dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infotok_lit.cli import main
from infotok_lit.commands import generate as command
from infotok_lit.errors import SettingsError
from infotok_lit.inference import InferenceModel, sampling_options

PROMPTS = ("a red circle", "a small blue square to the left of a large green triangle", "two circles")


def generate(*arguments: object) -> int:
    return main(["generate", "--device", "cpu", *map(str, arguments)])


def prompts(*texts: str) -> list[str]:
    return [argument for text in texts for argument in ("--prompt", text)]


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def truth(model, prompt: str, seed: int, drawing: Any = None, size=None) -> np.ndarray:
    """The model's own picture, drawn alone; its values spread over 0 .. 255."""
    with torch.no_grad():
        image = model.generate([prompt], seed, drawing, size)[0]
    return np.floor((image.permute(1, 2, 0).numpy() * 127.5 + 128).clip(0, 255)).astype(int)


def refusal(capsys, *arguments: object) -> str:
    assert generate(*arguments) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_image_i_is_that_of_its_prompt_and_seed_whatever_the_batches(model, exported, tmp_path, batch_size) -> None:
    out = tmp_path / "drawn"
    count = ("--images_per_prompt", 2, "--seed", 5, "--batch_size", batch_size)
    assert generate("--model", exported, *prompts(*PROMPTS), *count, "--out", out) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    wanted = [(PROMPTS[i // 2], 5 + i) for i in range(6)]
    assert [(entry["prompt"], entry["seed"]) for entry in manifest] == wanted
    assert sorted(path.name for path in out.iterdir()) == sorted([e["file"] for e in manifest] + ["manifest.json"])
    for entry in manifest:
        drawn = pixels(out / entry["file"])
        assert drawn.shape == (32, 32, 3)
        assert np.abs(drawn - truth(model, entry["prompt"], entry["seed"])).max() <= 1
    assert np.abs(truth(model, PROMPTS[0], 5) - truth(model, PROMPTS[1], 5)).max() > 1, "prompts change nothing"


def test_one_image_goes_to_the_file_in_the_size_asked_for(model, exported, tmp_path) -> None:
    out = tmp_path / "new" / "x.png"
    assert generate("--model", exported, "--prompt", PROMPTS[0], "--seed", 3, "--size", "16x48", "--out", out) == 0
    assert [path.name for path in out.parent.iterdir()] == ["x.png"]
    assert Image.open(out).size == (48, 16)
    assert np.abs(pixels(out) - truth(model, PROMPTS[0], 3, size=(16, 48))).max() <= 1


OWN_OPTIONS = {
    "harmon": {"guidance_schedule": "linear", "temperature": 0.5},
    "showo2": {"time_shift": 0.5},
    "openuni": {"time_shift": 0.5, "negative_prompt": "a blue square"},
}


def test_sampling_options_override_the_models_own(model, exported, tmp_path) -> None:
    out = tmp_path / "x.png"
    given = {"iterations": 7, "guidance": 5.0} | OWN_OPTIONS[model.family]
    options = [part for name, value in given.items() for part in (f"--{name}", value)]
    assert generate("--model", exported, "--prompt", PROMPTS[0], *options, "--out", out) == 0
    drawing = replace(model.config.sampling, **given)
    assert np.abs(pixels(out) - truth(model, PROMPTS[0], 0, drawing)).max() <= 1
    assert np.abs(pixels(out) - truth(model, PROMPTS[0], 0)).max() > 1


def test_prompts_of_a_file_come_after_those_of_the_command_line(tmp_path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("first\n\n  second  \n")
    assert command.read_prompts(["zeroth"], file) == ["zeroth", "first", "second"]
    file.write_text("first\nsecond", encoding="utf-8-sig")  # as editors on Windows do
    assert command.read_prompts(None, file) == ["first", "second"]
    file.write_bytes("a red\u2028circle\r\na\x85blue\x0csquare\rtwo circles".encode())
    assert command.read_prompts(None, file) == ["a red\u2028circle", "a\x85blue\x0csquare", "two circles"]
    file.write_text("\n \n")
    with pytest.raises(ValueError, match="no prompt in"):
        command.read_prompts(None, file)
    with pytest.raises(ValueError, match="--prompt or --prompts"):
        command.read_prompts(None, None)


def test_nothing_is_overwritten_without_force(exported, tmp_path, capsys) -> None:
    file, folder = tmp_path / "x.png", tmp_path / "many"
    file.write_text("mine")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    one = ("--model", exported, "--prompt", "a")
    assert "exists" in refusal(capsys, *one, "--out", file)
    assert "not empty" in refusal(capsys, *one, "--out", folder)
    assert file.read_text() == "mine"
    assert generate(*one, "--out", file, "--force") == 0
    assert Image.open(file).size == (32, 32)
    for number in (0, 7):
        (folder / f"{number:05d}.png").write_text("mine")
    assert "00000.png, which no earlier request drew" in refusal(capsys, *one, "--out", folder, "--force")
    (folder / "00000.png").unlink()
    assert generate(*one, "--images_per_prompt", 3, "--out", folder, "--force") == 0
    assert generate(*one, "--images_per_prompt", 2, "--out", folder, "--force") == 0
    left = ["00000.png", "00001.png", "00007.png", "manifest.json", "notes.txt"]
    assert sorted(path.name for path in folder.iterdir()) == left
    assert (folder / "00007.png").read_text() == "mine"


@pytest.mark.parametrize("entry", ['{"file": "../victim.png"}', '{"file": 3}', '"x"', "[" * 100_000])
def test_a_manifest_that_is_not_ours_has_nothing_deleted(tmp_path, entry) -> None:
    (tmp_path / "victim.png").write_text("mine")
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "manifest.json").write_text(f"[{entry}]")
    command.write_folder(folder, command.plan(["a"], 1, seed=7), iter([np.zeros((8, 8, 3), np.uint8)]))
    assert (tmp_path / "victim.png").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_one_message(exported, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "x.png"
    assert f"{out} cannot be written" in refusal(capsys, "--model", exported, "--prompt", "a", "--out", out)


@pytest.mark.parametrize("name", ["there", "there/new"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_drawn(tmp_path, monkeypatch, name) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path / "there")
    with pytest.raises(SettingsError, match=f"there is no permission to write into {tmp_path / 'there'}$"):
        command.check_suits(command.plan(["a", "b"], 1, seed=0), tmp_path / name, force=False)


def test_a_target_that_does_not_suit_is_refused(exported, tmp_path, capsys) -> None:
    one = ("--model", exported, "--prompt", "a")
    assert "2 images do not fit" in refusal(capsys, *one, "--prompt", "b", "--out", tmp_path / "x.png")
    assert "x.png" in refusal(capsys, *one, "--out", tmp_path / "x.jpg")
    (tmp_path / "file").write_text("")
    assert "is a file, not a folder" in refusal(capsys, *one, "--out", tmp_path / "file")
    assert "not a multiple of 8" in refusal(capsys, *one, "--size", "30x32", "--out", tmp_path / "x.png")
    assert "HEIGHTxWIDTH" in refusal(capsys, *one, "--size", "32", "--out", tmp_path / "x.png")
    assert "0 is not above 0" in refusal(capsys, *one, "--iterations", 0, "--out", tmp_path / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_was_drawn_before_an_interruption_is_in_the_manifest(tmp_path) -> None:
    def drawn():
        yield np.zeros((8, 8, 3), np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        command.write_folder(tmp_path, command.plan(["a"], 2, seed=7), drawn())
    assert json.loads((tmp_path / "manifest.json").read_text()) == [{"file": "00000.png", "prompt": "a", "seed": 7}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.png", "manifest.json"]


def test_an_option_that_the_family_does_not_draw_with_is_refused(monkeypatch) -> None:
    given = {"iterations": 7, "guidance": 2.0}
    assert sampling_options("harmon", given) == given
    flow = SimpleNamespace(sampling=make_dataclass("SamplingConfig", [("guidance", float), ("steps", int)]))
    monkeypatch.setattr("infotok_lit.inference.family_called", {"flow": flow}.__getitem__)
    with pytest.raises(ValueError, match="iterations means nothing to a flow model, which draws with guidance, steps"):
        sampling_options("flow", given)


def test_a_value_that_an_option_cannot_have_is_refused() -> None:
    """What was no schedule was taken for the linear one, without a word."""
    with pytest.raises(ValueError, match="guidance_schedule is 'liner'; set it to 'constant' or 'linear'"):
        sampling_options("harmon", {"guidance_schedule": "liner"})
    with pytest.raises(ValueError, match="iterations is 2.5; set it to a whole number"):
        sampling_options("showo2", {"iterations": 2.5})


@pytest.mark.parametrize(
    ("family", "name"), [("harmon", "guidance"), ("harmon", "temperature"), ("openuni", "time_shift")]
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_that_are_not_finite_are_refused(family, name, value) -> None:
    """They drew a black picture, without a word."""
    with pytest.raises(SettingsError, match=f"{name} is {value}; set it to a finite number"):
        sampling_options(family, {name: value})


def test_what_is_drawn_without_being_finite_is_no_picture(exported, tmp_path, capsys, monkeypatch) -> None:
    spoilt = torch.full((1, 3, 32, 32), float("nan"))
    monkeypatch.setattr("infotok_lit.models.unified.UnifiedModel.generate", lambda *args: spoilt)
    out = tmp_path / "x.png"
    assert "its numbers are not finite" in refusal(capsys, "--model", exported, "--prompt", "a", "--out", out)
    assert not out.exists()


def test_progress_counts_images_by_iterations(model) -> None:
    seen = []
    # Show-o2 counts the points of its time grid, between which it steps.
    points = {"harmon": 2, "showo2": 3, "openuni": 2}[model.family]
    options = {"iterations": points, "guidance": 1.0}
    drawn = InferenceModel(model).pictures(["a", "b", "c"], 0, None, 2, options, lambda *args: seen.append(args))
    assert len(list(drawn)) == 3
    assert seen == [(0, 1, 2), (0, 2, 2), (2, 1, 2), (2, 2, 2)]


def test_bfloat16_draws(exported_kl16, tmp_path) -> None:
    out = tmp_path / "x.png"
    assert generate("--model", exported_kl16["safetensors"], "--prompt", "a", "--dtype", "bfloat16", "--out", out) == 0
    assert Image.open(out).size == (32, 32)
