"""Where the weights of a run come from: each kind of source, and what does not fit."""

import pytest
import torch
from transformers import AutoTokenizer

from infotok_lit.assets import SCENES_TOKENIZER, embedded_base
from infotok_lit.checkpoints import CHECKPOINT_KEY, CheckpointError
from infotok_lit.cli import main as command_line
from infotok_lit.models.export import export_model
from infotok_lit.models.family import load_folder
from infotok_lit.modules import HarmonModule
from infotok_lit.modules.base_model import InitialModel

BASE = embedded_base("harmon", "scenes32")


def weights(module: HarmonModule) -> dict[str, torch.Tensor]:
    module.configure_model()
    return module.base.state_dict()


def test_the_embedded_base_by_name_and_by_folder() -> None:
    expected = load_folder(BASE).state_dict()
    for source in ("embedded", str(BASE)):
        loaded = weights(HarmonModule(init_from=source))
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_size_without_an_embedded_base_is_one_message(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert command_line(["fit", "--model.init_args.size", "0.5b"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("infotok_lit: no base of family harmon and size 0.5b ships with the package, only harmon_")
    assert said.endswith("set model.init_from to weights of your own, or to null for random ones")


def test_an_official_file_alone(tmp_path) -> None:
    base = load_folder(BASE)
    export_model(base, tmp_path / "out", {}, file_format="pth")
    loaded = weights(HarmonModule(init_from=str(tmp_path / "out" / "harmon.pth")))
    assert all(torch.equal(loaded[name], value) for name, value in base.state_dict().items())


def test_an_exported_folder_brings_its_tokenizer(tmp_path) -> None:
    export_model(load_folder(BASE), tmp_path / "out", {})
    module = HarmonModule(init_from=str(tmp_path / "out"))
    module.configure_model()
    assert module.initial_model.reference()["tokenizer"] == str(tmp_path / "out")
    assert (
        HarmonModule(init_from=str(tmp_path / "out"), tokenizer="scenes32").initial_model.reference()["tokenizer"]
        == "scenes32"
    )


def test_a_run_brings_its_tokenizer_wherever_it_is_read(tmp_path, monkeypatch) -> None:
    """Whose words have other ids than those of the size's own; it was named from the folder of the run's start."""
    monkeypatch.chdir(tmp_path)
    other = AutoTokenizer.from_pretrained(str(SCENES_TOKENIZER))
    other.add_tokens(["purple circle"])
    other.save_pretrained("words")
    module = HarmonModule(init_from=None, tokenizer="words")
    module.configure_model()
    recipe = module.initial_model.rebuilding(module, None)
    torch.save({"state_dict": module.state_dict(), CHECKPOINT_KEY: recipe}, "run.ckpt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    following = HarmonModule(init_from="../run.ckpt")
    following.configure_model()
    wanted = [len(other) - 1]
    assert following.base.processor.encode("purple circle") == wanted
    again = InitialModel(**recipe["initial"]).build()
    assert again.processor.encode("purple circle") == wanted
    assert (
        HarmonModule(init_from="../run.ckpt", tokenizer="scenes32").initial_model.reference()["tokenizer"] == "scenes32"
    )


@pytest.mark.parametrize("source", ["run", "export"])
def test_settings_that_give_the_same_weights_another_meaning_are_refused(tmp_path, source) -> None:
    """Every shape fits with half of the heads, and with other frequencies of positions."""
    settings = {"mar": {"encoder_heads": 2}, "llm": {"rope_theta": 1000.0}}
    module = HarmonModule(init_from=None, settings=settings)
    module.configure_model()
    recipe = module.initial_model.rebuilding(module, None)
    checkpoint = {"state_dict": module.state_dict(), CHECKPOINT_KEY: recipe}
    torch.save(checkpoint, tmp_path / "run.ckpt")
    export_model(module.base, tmp_path / "export", {})
    found = tmp_path / ("run.ckpt" if source == "run" else "export")
    with pytest.raises(CheckpointError, match="than model.size and model.settings ask for: mar, llm differ"):
        HarmonModule(init_from=str(found)).configure_model()
    free = {**settings, "mar": {**settings["mar"], "noise_draws": 2}}
    loaded = weights(HarmonModule(init_from=str(found), settings=free))
    assert all(torch.equal(loaded[name], value) for name, value in module.base.state_dict().items())


def test_another_size_is_refused_before_anything_large_is_built() -> None:
    with pytest.raises(
        CheckpointError, match="than model.size and model.settings ask for: autoencoder, mar, llm differ"
    ):
        HarmonModule(size="1.5b", init_from=str(BASE)).configure_model()


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at no/such/harmon_1\.5b\.pth"):
        HarmonModule(size="1.5b", init_from="no/such/harmon_1.5b.pth").configure_model()


def test_the_autoencoder_must_be_given_for_an_official_size(tmp_path) -> None:
    torch.save({"mar.z_proj.bias": torch.zeros(1)}, tmp_path / "harmon_1.5b.pth")
    with pytest.raises(ValueError, match=r"holds no image autoencoder: set `autoencoder` to the official kl16\.ckpt"):
        HarmonModule(size="1.5b", init_from=str(tmp_path / "harmon_1.5b.pth")).configure_model()
