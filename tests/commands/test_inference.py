"""`infotok_lit.load` and `infotok_lit.fit`: what people type in Python."""

import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TinyModule, scenes_data

import infotok_lit
from infotok_lit.assets import embedded_base
from infotok_lit.batch import BrokenSampleError, UnderstandingSample
from infotok_lit.data import image_file
from infotok_lit.errors import ExplainedError, MissingFileError, SettingsError
from infotok_lit.modules import HarmonModule

BASE = embedded_base("harmon", "scenes32")
QUESTIONS = ["what?", "how many objects are there?"]


@pytest.fixture(scope="module")
def loaded(exported):
    return infotok_lit.load(exported, device="cpu")


def answer(model, image: Image.Image, question: str) -> str:
    """The model's own answer, by the batch that training would make."""
    batch = model.processor.understanding([UnderstandingSample(image.convert("RGB"), question, "", "")])
    with torch.no_grad():
        return model.describe(batch.pixel_values, [question], 5)[0]


def test_images_and_questions_in_any_number(model, loaded, pictures) -> None:
    images = [Image.open(pictures / name) for name in ("a.png", "b.jpg")]
    truth = [[answer(model, image, question) for question in QUESTIONS] for image in images]
    say = {"max_new_tokens": 5}
    assert loaded.describe(images[0], QUESTIONS[0], **say) == truth[0][0]
    assert loaded.describe(images[0], QUESTIONS, **say) == truth[0]
    assert loaded.describe(images, QUESTIONS[1], **say) == [row[1] for row in truth]
    assert loaded.describe(images, QUESTIONS, batch_size=1, **say) == [truth[0][0], truth[1][1]]
    assert loaded.describe(pictures / "b.jpg", QUESTIONS[1], **say) == truth[1][1]
    assert loaded.describe([images[0]], QUESTIONS[0], **say) == [truth[0][0]]
    assert loaded.describe([], QUESTIONS[0]) == []
    with pytest.raises(SettingsError, match="2 questions about 3 images"):
        loaded.describe([*images, images[0]], QUESTIONS)
    with pytest.raises(BrokenSampleError, match=r"gone\.png"):
        loaded.describe("gone.png", "what?")
    for wrong in ({"max_new_tokens": 0}, {"batch_size": 0}):
        with pytest.raises(SettingsError, match="set it to 1 or more"):
            loaded.describe(images[0], "what?", **wrong)


def test_a_file_is_read_once_for_all_questions_about_it(loaded, pictures, monkeypatch) -> None:
    read, files = image_file.read_image, []
    monkeypatch.setattr(image_file, "read_image", lambda path: files.append(path) or read(path))
    assert len(loaded.describe(pictures / "a.png", [*QUESTIONS, "why?"], max_new_tokens=1)) == 3
    assert files == [pictures / "a.png"]


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "1", "LA"])
def test_other_kinds_of_images_are_seen_as_the_command_sees_their_files(loaded, pictures, tmp_path, mode) -> None:
    image = Image.open(pictures / "a.png").convert(mode)
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(file)
    assert loaded.describe(image, QUESTIONS[1], max_new_tokens=5) == loaded.describe(
        file, QUESTIONS[1], max_new_tokens=5
    )


def test_a_photograph_is_turned_upright(loaded, pictures, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(pictures / "c.png").convert("RGB").save(tmp_path / "turned.jpg", exif=exif, quality=100)
    say = {"max_new_tokens": 5}
    with Image.open(tmp_path / "turned.jpg") as image:
        assert loaded.describe(image, "what?", **say) == loaded.describe(tmp_path / "turned.jpg", "what?", **say)


def test_describing_makes_no_batch_of_training(loaded, pictures, monkeypatch) -> None:
    monkeypatch.setattr(type(loaded.base.processor), "understanding", lambda *_: pytest.fail("a training batch"))
    loaded.describe(pictures / "a.png", QUESTIONS[0], max_new_tokens=2)


def test_a_prompt_is_a_prompt_and_not_its_letters(model, loaded) -> None:
    texts = ["a red circle", "two squares", "a cross"]
    with torch.no_grad():
        truth = [
            model.generate([text], seed=4 + i)[0].permute(1, 2, 0).numpy() * 127.5 + 128 for i, text in enumerate(texts)
        ]
    one = loaded.generate(texts[0], seed=4)
    several = loaded.generate(texts, seed=4, batch_size=2)
    assert isinstance(one, Image.Image) and [type(image) for image in several] == [Image.Image] * 3
    for image, expected in zip([one, *several], [truth[0], *truth], strict=True):
        assert np.abs(np.asarray(image).astype(int) - np.floor(expected.clip(0, 255))).max() <= 1
    assert loaded.generate(["a"], image_size=(16, 32))[0].size == (32, 16)
    assert loaded.generate([]) == []
    with pytest.raises(SettingsError, match="steps means nothing to a"):
        loaded.generate("a", options={"steps": 3})


def save_run(folder: Path) -> TinyModule:
    module = TinyModule(())
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, max_epochs=1, default_root_dir=folder, logger=False, enable_checkpointing=False,
        limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, scenes_data())
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    return module


def test_a_run_loads_by_its_folder_and_by_its_checkpoint(tmp_path) -> None:
    module = save_run(tmp_path / "run")
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt"):
        state = infotok_lit.load(source, device="cpu").base.state_dict()
        assert all(torch.equal(state[name], value) for name, value in module.base.state_dict().items())
    with pytest.raises(SettingsError, match="is a run, which brings everything: leave out --tokenizer"):
        infotok_lit.load(tmp_path / "run", tokenizer="x")


def test_lightnings_way_to_load_says_what_to_use(tmp_path) -> None:
    save_run(tmp_path)
    path = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(ExplainedError, match=r"infotok_lit\.load\(.*last\.ckpt.*--ckpt_path.*model\.init_from"):
        HarmonModule.load_from_checkpoint(path)


def test_what_cannot_be_loaded_is_one_message(tmp_path) -> None:
    with pytest.raises(MissingFileError, match="there is no model at .*gone"):
        infotok_lit.load(tmp_path / "gone")
    with pytest.raises(SettingsError, match="parts: there is no vae; there are autoencoder, vlm, transformer"):
        infotok_lit.load(tmp_path, parts={"vae": "x"})
    for dtype in ("fp16", torch.float16):
        with pytest.raises(SettingsError, match=r"dtype is .*16.*; choose one of float32, bfloat16, float16"):
            infotok_lit.load(BASE, dtype=dtype)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        infotok_lit.lod("x")


def test_fit_is_the_command(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("infotok_lit.commands.fit.run", lambda arguments: arguments)
    assert infotok_lit.fit(["--trainer.max_steps", "3"]) == ["fit", "--trainer.max_steps", "3"]


def test_drawing_a_picture_imports_neither_a_trainer_nor_what_the_embedded_base_does_without(tmp_path) -> None:
    code = (
        "import sys\n"
        "from infotok_lit.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "unneeded = {'lightning', 'lightning_fabric', 'pytorch_lightning', 'matplotlib'}\n"
        "unneeded |= {'diffusers', 'vector_quantize_pytorch'}\n"
        "print(*unneeded & sys.modules.keys())\n"
    )
    out = tmp_path / "x.png"
    command = [
        "generate",
        "--model",
        str(BASE),
        "--prompt",
        "a",
        "--out",
        str(out),
        "--device",
        "cpu",
        "--iterations",
        "2",
    ]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"wrote {out}", ""]
