"""Export leaves the model, all of the model, and nothing but the model."""

from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from safetensors import safe_open
from tiny import FAMILIES, TinyModule, scenes_data, tiny_config, tiny_model

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.callbacks import ExportInference
from infotok_lit.commands.export import export
from infotok_lit.commands.parsing import run
from infotok_lit.errors import ExplainedError
from infotok_lit.models.common.model_config import KL16Config
from infotok_lit.models.export import export_model
from infotok_lit.models.family import load_folder
from infotok_lit.models.harmon.family import FAMILY as HARMON
from infotok_lit.scenes import Scenes

QUESTIONS = ["what shape is the red object?", "how many circles are there?"]


def train(tmp_path, module: TinyModule) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        max_epochs=1,
        default_root_dir=tmp_path,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ExportInference(str(tmp_path / "exported"))],
    )
    trainer.fit(module, scenes_data())
    return trainer


def outputs(model) -> list[torch.Tensor]:
    """Everything that inference gives: answers' logits, both losses, pixels."""
    model.eval()
    source = Scenes(split="val")
    reading = model.processor.understanding([source.sample("understanding", i, None) for i in range(2)])
    drawing = model.processor.generation([source.sample("generation", i, None) for i in range(2)])
    with torch.no_grad():
        torch.manual_seed(0)
        losses = [model.understanding(reading).loss_sum, model.generation(drawing).loss_sum]
        answers = model.describe(reading.pixel_values, QUESTIONS, 8)
        pixels = model.generate(["a red circle", "a cross"], seed=0)
    return [*losses, torch.tensor([ord(c) for c in "|".join(answers)]), pixels]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bottleneck", ["projected", "inline"])
def test_the_exported_model_is_bitwise_the_trained_one_without_heads(tmp_path, bottleneck, family) -> None:
    module = TinyModule(bottleneck=bottleneck, family=family)
    train(tmp_path, module)
    assert list(module.infotok.parameters()), "there were heads to strip"
    folder = tmp_path / "exported"
    for before, after in zip(outputs(module.base), outputs(load_folder(folder)), strict=True):
        assert torch.equal(before, after)
    with safe_open(folder / f"{family}.safetensors", "pt") as file:
        names = set(file.keys())
    expected = set(module.base.official_weights()[family]) - set(module.base.official_aliases)
    assert names == expected, "the tied head is stored once, everything else under its official name"
    assert "terms: compactness" in (folder / "README.md").read_text()


def tiny_kl16():
    """A tiny model that has an autoencoder with weights."""
    autoencoder = KL16Config(latent_channels=4, base_width=8, num_groups=4)
    config = replace(tiny_config(), autoencoder=autoencoder, image_size=32)
    mar = replace(config.mar, default_grid=(2, 2))
    torch.manual_seed(0)
    return HARMON.build(replace(config, mar=mar), str(SCENES_TOKENIZER)).eval()


def test_pth_files_are_what_the_official_code_loads(tmp_path) -> None:
    model = tiny_kl16()
    export_model(model, tmp_path / "out", {}, file_format="pth")
    harmon = torch.load(tmp_path / "out" / "harmon.pth", weights_only=True)
    assert harmon.keys() == model.official_weights()["harmon"].keys()
    kl16 = torch.load(tmp_path / "out" / "kl16.ckpt", weights_only=True)["model"]
    assert kl16.keys() == model.official_weights()["kl16"].keys()
    assert kl16["encoder.mid.attn_1.q.weight"].ndim == 4
    for before, after in zip(outputs(model), outputs(load_folder(tmp_path / "out")), strict=True):
        assert torch.equal(before, after)


def test_half_precision_is_a_cast(tmp_path) -> None:
    model = tiny_model()
    export_model(model, tmp_path / "out", {}, dtype="float16")
    with safe_open(tmp_path / "out" / "harmon.safetensors", "pt") as file:
        stored = file.get_tensor("proj_in.0.weight")
    assert torch.equal(stored, model.project_in[0].weight.half())


@pytest.mark.parametrize("file_format", ["safetensors", "pth"])
def test_others_may_read_what_is_exported(tmp_path, file_format) -> None:
    export_model(tiny_model(), tmp_path / "out", {}, file_format=file_format)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}


def test_the_command_exports_a_checkpoint_and_a_run_folder(tmp_path) -> None:
    module = TinyModule()
    trainer = train(tmp_path, module)
    trainer.save_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    for number, source in enumerate((tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt")):
        out = tmp_path / f"out{number}"
        assert run(export, ["export", "--ckpt", str(source), "--out", str(out)]) == 0
        for before, after in zip(outputs(module.base), outputs(load_folder(out)), strict=True):
            assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "truncated"), (b"PK\x03\x04 half a file", "truncated"), (None, "no_such")]
)
def test_a_damaged_or_missing_checkpoint_is_one_clear_message(tmp_path, content, message) -> None:
    path = tmp_path / ("no_such.ckpt" if content is None else "damaged.ckpt")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExplainedError, match=message):
        run(export, ["export", "--ckpt", str(path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
