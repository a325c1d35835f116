"""`describe`: what it answers, whatever the batches; what it reads; what it refuses."""

import json
import shutil

import pytest
import torch
from PIL import Image

from infotok_lit.batch import UnderstandingSample
from infotok_lit.commands.describe import IMAGE_SUFFIXES, find_images
from infotok_lit.commands.describe import describe as describe_command
from infotok_lit.commands.parsing import run
from infotok_lit.data.rows import read_rows
from infotok_lit.data.shard_index import _IMAGES
from infotok_lit.errors import MissingFileError, SettingsError
from infotok_lit.inference import QUESTION
from infotok_lit.video.video_file import frame_files

PROMPTS = ("what?", "is there a red circle to the left of the small blue square?", "how many objects are there?")
TOKENS = "6"


def describe(*arguments: object) -> int:
    return run(describe_command, ["describe", "--device", "cpu", "--max_new_tokens", TOKENS, *map(str, arguments)])


def truth(model, path, prompt: str) -> str:
    """The answer of the model itself to one image alone."""
    batch = model.processor.understanding([UnderstandingSample(Image.open(path).convert("RGB"), prompt, "", "")])
    with torch.no_grad():
        return model.describe(batch.pixel_values, [prompt], int(TOKENS))[0]


def prompts(*texts: str) -> list[str]:
    return [argument for text in texts for argument in ("--prompt", text)]


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_every_prompt_about_every_image_is_answered_as_if_alone(model, exported, pictures, capsys, batch_size) -> None:
    status = describe(
        "--model", exported, "--image", pictures, *prompts(*PROMPTS), "--batch_size", batch_size, "--json"
    )
    assert status == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    files = [pictures / name for name in ("a.png", "b.jpg", "c.png")]
    expected = [
        {"image": str(file), "prompt": prompt, "answer": truth(model, file, prompt)}
        for file in files
        for prompt in PROMPTS
    ]
    assert rows == expected
    assert len({row["answer"] for row in rows}) > len(files), "the answers say nothing about the questions"


def test_a_line_holds_image_prompt_and_answer_between_tabs(model, exported, pictures, monkeypatch, capsys) -> None:
    spoken = "a\tcat\non a\x1b mat\u2028."
    monkeypatch.setattr(
        type(model), "describe", lambda self, images, prompts, *rest, **options: [spoken] * len(prompts)
    )
    image = pictures / "a.png"
    assert describe("--model", exported, "--image", image, "--prompt", "a\tb\nc?") == 0
    assert describe("--model", exported, "--image", image) == 0
    lines = capsys.readouterr().out.splitlines()
    answer = "a cat on a  mat ."
    assert [line.split("\t") for line in lines] == [
        [str(image), "a b c?", answer],
        [str(image), QUESTION, answer],
    ]


def test_a_broken_image_is_named_and_the_others_are_answered(exported, pictures, tmp_path, capsys) -> None:
    (tmp_path / "broken.png").write_bytes((pictures / "a.png").read_bytes()[:200])
    shutil.copy(pictures / "a.png", tmp_path / "whole.png")
    missing = tmp_path / "gone.png"
    assert describe("--model", exported, "--image", tmp_path, missing) == 1
    said = capsys.readouterr()
    assert [line.split("\t")[0] for line in said.out.splitlines()] == [str(tmp_path / "whole.png")]
    assert "broken.png" in said.err
    assert f"there is no file {missing}" in said.err


def test_images_are_found_in_folders_and_by_patterns(pictures, tmp_path) -> None:
    a, b, c = (pictures / name for name in ("a.png", "b.jpg", "c.png"))
    assert find_images([str(c), str(pictures)]) == [c, a, b, c]
    assert find_images([str(pictures / "*.png")]) == [a, c]
    assert {suffix.lstrip(".") for suffix in IMAGE_SUFFIXES} == set(_IMAGES), "what is read of shards is found here too"
    odd = tmp_path / "x[1].dat"
    shutil.copy(a, odd)
    assert find_images([str(odd)]) == [odd]


def test_hidden_files_of_a_folder_are_no_images(pictures, tmp_path) -> None:
    """macOS writes ._a.png beside a.png on foreign disks: it was reported as a broken image, with status 1."""
    shutil.copy(pictures / "a.png", tmp_path)
    (tmp_path / "._a.png").write_bytes(b"\x00\x05\x16\x07")
    assert find_images([str(tmp_path)]) == frame_files(tmp_path) == [tmp_path / "a.png"]
    assert find_images([str(tmp_path / "._a.png")]) == [tmp_path / "._a.png"], "what is named is read"
    (tmp_path / "a.json").write_text('[{"caption": "a"}]')
    (tmp_path / "._a.json").write_bytes(b"\x00\x05\x16\x07")
    assert list(read_rows(tmp_path)) == [{"caption": "a"}]


def test_a_question_that_the_model_cannot_be_asked_is_refused_in_a_sentence(folders, pictures) -> None:
    with pytest.raises(SettingsError, match="'<image> or <image>' has 2 times <image>, but there is one image"):
        describe("--model", folders["openuni"], "--image", pictures / "a.png", "--prompt", "<image> or <image>")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "no image in the folder"),
        ("empty/*.png", "no image in the pattern"),
        ("gone.png", "there is no image"),
        ("", "--image is empty"),
    ],
)
def test_nothing_to_look_at_is_an_error(tmp_path, name, message) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match=message):
        find_images([str(tmp_path / name) if name else ""])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_precisions_answer(exported, exported_kl16, pictures, capsys, dtype) -> None:
    for folder in (exported, exported_kl16["safetensors"]):
        assert describe("--model", folder, "--image", pictures, "--dtype", dtype) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
