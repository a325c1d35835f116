"""`cache`: it encodes what training will ask for, once, and refuses what it cannot keep."""

import shutil
from pathlib import Path

import pytest

from infotok_lit.cli import main

PHOTOS = Path(__file__).parents[1] / "fixtures" / "photos"
TINY = [
    "--model.init_args.init_from=null",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=1",
    "--trainer.callbacks=[]",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--data.init_args.understanding_batch_size=2",
    "--data.init_args.generation_batch_size=2",
    "--data.init_args.val_batch_size=2",
    "--data.init_args.val_samples=4",
]


def scenes(samples: int) -> list[str]:
    return ["--config", "openuni/scenes32", *TINY, f"--data.init_args.train.init_args.num_samples={samples}"]


def test_what_is_missing_is_encoded_and_training_takes_it(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    cached = []
    for samples, part in ((6, "1"), (6, "2"), (8, "1"), (8, "2")):
        # The trainer's cards are not the ones that encode.
        asked = [*scenes(samples), "--trainer.accelerator=gpu", "--device=cpu", "--out=latents"]
        assert main(["cache", *asked, "--part", part, "--parts", "2"]) == 0
        cached.append(capsys.readouterr().out.split(";")[0])
    # OpenUni's autoencoder sees the images to generate alone; of these 6 (then 8) are trained on, and 4 validated on.
    assert cached == [
        "5 images encoded into latents, 0 were there already",
        "5 images encoded into latents, 0 were there already",
        "1 images encoded into latents, 5 were there already",
        "1 images encoded into latents, 5 were there already",
    ]
    assert main(["fit", *scenes(8), "--data.init_args.latents=latents"]) == 0
    capsys.readouterr()
    assert main(["fit", *scenes(9), "--data.init_args.latents=latents", "--trainer.max_steps=9"]) == 2
    said = capsys.readouterr().err
    assert "scenes32/train/generation/8: the latents in latents have none of this image as it is now" in said
    assert "Traceback" not in said
    other = "--model.init_args.settings={autoencoder: {kept: 2}}"
    assert main(["fit", *scenes(8), "--data.init_args.latents=latents", other]) == 2
    assert "the latents in latents are stale: when they were made" in capsys.readouterr().err


@pytest.mark.parametrize(("crop", "status"), [("true", 2), ("false", 0)])
def test_random_crops_are_refused(tmp_path, monkeypatch, capsys, crop, status) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PHOTOS, "photos")
    photos = ["--config", "harmon/scenes32", "--config", "data/own_images", *TINY]
    crops = f"--data.init_args.train.init_args.random_crop={crop}"
    assert main(["cache", *photos, crops, "--out", "latents"]) == status
    said = capsys.readouterr()
    if status:
        assert "is cropped at random in each epoch, and a cache would keep one crop: set random_crop: false" in said.err
    else:
        # 13 photographs in two branches; padded or cropped, the six square ones are the same image.
        assert said.out.startswith("20 images encoded into latents, 6 were there already;")
