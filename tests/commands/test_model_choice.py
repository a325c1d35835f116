"""Which model a command runs: exported folders, official files, and one clear sentence for what is missing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from infotok_lit.assets import embedded_base
from infotok_lit.errors import ExplainedError, MissingFileError
from infotok_lit.model_choice import ModelChoice, ModelOptions, choose, tell_what_was_found
from infotok_lit.models.family import families


def load(source: object, **options: object):
    """The model itself."""
    return choose(source, ModelOptions(device="cpu", **options)).load()


def assert_same_model(loaded, wanted) -> None:
    assert not loaded.training
    expected, actual = wanted.state_dict(), loaded.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("file_format", ["safetensors", "pth"])
def test_both_export_formats_load(kl16_model, exported_kl16, file_format) -> None:
    assert_same_model(load(exported_kl16[file_format]), kl16_model)


def official(folder: Path) -> dict[str, str]:
    return {"family": "harmon", "model_size": "0.5b", "tokenizer": str(folder)}


def test_a_base_that_ships_goes_by_its_name_unless_a_file_has_it(
    exported_kl16, kl16_model, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for family in families():
        assert choose(f"{family}_scenes32").path == embedded_base(family, "scenes32")
    shutil.copytree(exported_kl16["safetensors"], tmp_path / "harmon_scenes32")
    assert_same_model(load("harmon_scenes32"), kl16_model)
    with pytest.raises(MissingFileError, match=r"no model at embedded; those that ship are harmon_scenes32, openuni_"):
        choose("embedded")


def test_of_a_folder_the_checkpoint_that_was_taken_is_named(tmp_path, capsys) -> None:
    """`--model .` may mean any of the runs below."""
    newest, options = tmp_path / "version_1" / "last.ckpt", ModelOptions()
    tell_what_was_found([ModelChoice(str(tmp_path), newest, "harmon", True, options)])
    assert capsys.readouterr().err == f"infotok_lit: {tmp_path}: taking the newest checkpoint, {newest}\n"
    named = ModelChoice(str(newest), newest, "harmon", True, options)
    tell_what_was_found([named, ModelChoice("harmon_scenes32", tmp_path, "harmon", False, options)])
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("tiny_official_size")
def test_official_files_load(kl16_model, exported_kl16) -> None:
    folder = exported_kl16["pth"]
    weights, options = folder / "harmon.pth", official(folder)
    assert_same_model(load(weights, **options, autoencoder=str(folder / "kl16.ckpt")), kl16_model)
    with pytest.raises(ValueError, match=r"holds no image autoencoder.*kl16.ckpt"):
        load(weights, **options)
    with pytest.raises(FileNotFoundError, match=r"there is no autoencoder at nowhere.ckpt"):
        choose(weights, ModelOptions(**options, autoencoder="nowhere.ckpt"))


@pytest.mark.usefixtures("tiny_official_size")
def test_a_conversion_folder_brings_autoencoder_and_tokenizer(kl16_model, exported_kl16, tmp_path) -> None:
    """As transformers saves it: its own config.json, shards, the autoencoder under vae., tied weights once."""
    weights = {name: value.clone() for name, value in kl16_model.official_weights()["harmon"].items()}
    del weights["llm.lm_head.weight"]
    autoencoder = {f"vae.{name}": value.clone() for name, value in kl16_model.official_weights()["kl16"].items()}
    for name, shard in (("1.safetensors", weights), ("2.safetensors", autoencoder)):
        save_file({key: value.contiguous() for key, value in shard.items()}, tmp_path / name)
    index = dict.fromkeys(weights, "1.safetensors") | dict.fromkeys(autoencoder, "2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "harmon", "architectures": ["HarmonModel"]}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(exported_kl16["pth"] / name, tmp_path)
    loaded = load(tmp_path, family="harmon", model_size="0.5b")
    assert_same_model(loaded, kl16_model)
    with pytest.raises(ValueError, match="neither an exported folder nor a run.*--family"):
        choose(tmp_path)


def test_what_is_missing_or_does_not_belong_is_said(exported, tmp_path) -> None:
    weights = tmp_path / "harmon_0.5b.pth"
    weights.write_bytes(b"")
    for source, options, message in (
        (tmp_path / "gone", {}, "there is no model at .*gone"),
        (weights, {}, "neither an exported folder nor a run.*--family .harmon, .*and --model_size"),
        (weights, {"family": "harmon"}, "needs its --model_size: choose one of .*0.5b, 1.5b"),
        (weights, {"family": "harmon", "model_size": "7b"}, "no size '7b': choose one of .*0.5b, 1.5b"),
        (weights, {"family": "marvin"}, "family 'marvin'; this version knows harmon"),
        (exported, {"model_size": "0.5b"}, "brings everything: leave out --model_size"),
        ("https://h/model.safetensors", {}, "is a URL.*download it first"),
        (weights, official(tmp_path) | {"autoencoder": "s3://b/kl16.ckpt"}, "is a URL.*download it first"),
    ):
        with pytest.raises(ExplainedError, match=message):
            choose(source, ModelOptions(**options))
    alien = tmp_path / "alien"
    alien.mkdir()
    (alien / "config.json").write_text(json.dumps({"format": 1, "family": "marvin", "config": {}}))
    with pytest.raises(ValueError, match="family 'marvin'; this version knows harmon"):
        choose(alien)


@pytest.mark.usefixtures("tiny_official_size")
def test_a_truncated_official_file_is_named(exported_kl16, tmp_path) -> None:
    weights = tmp_path / "harmon_0.5b.pth"
    weights.write_bytes((exported_kl16["pth"] / "harmon.pth").read_bytes()[:5000])
    with pytest.raises(ValueError, match="harmon_0.5b.pth cannot be read.*truncated"):
        load(weights, **official(exported_kl16["pth"]), autoencoder=str(weights))


def test_the_weights_have_the_dtype_asked_for_and_the_tables_keep_theirs(exported) -> None:
    loaded = load(exported, dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in loaded.buffers() if buffer.is_floating_point()} == {torch.float32}
    if loaded.official_aliases:
        assert loaded.llm.lm_head.weight is loaded.llm.get_input_embeddings().weight


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused(exported) -> None:
    with pytest.raises(ValueError, match="no CUDA device here"):
        choose(exported, ModelOptions(device="cuda")).load()


@pytest.mark.parametrize(
    "arguments",
    [
        ["describe", "--help"],
        ["generate", "--help"],
        ["bench", "--help"],
        ["describe", "--model", "gone", "--image", "x.png"],
        ["describe", "--model", "FOLDER", "--image", "x.png"],
        ["describe", "--model", __file__, "--family", "harmon", "--model_size", "7b", "--image", "x.png"],
        ["generate", "--model", "FOLDER", "--prompt", "a", "--out", "x.jpg"],
        ["bench", "--steps", "0"],
    ],
)
def test_help_and_typing_errors_import_nothing_heavy(arguments) -> None:
    script = (
        "import sys\n"
        "from infotok_lit.cli import main\n"
        "try:\n"
        "    code = main(sys.argv[1:])\n"
        "except SystemExit as stopped:\n"
        "    code = stopped.code\n"
        "heavy = {'torch', 'transformers', 'lightning', 'numpy', 'rich'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else code)\n"
    )
    filled = [str(embedded_base("harmon", "scenes32")) if argument == "FOLDER" else argument for argument in arguments]
    done = subprocess.run([sys.executable, "-c", script, *filled], capture_output=True, text=True)
    assert done.returncode == (0 if "--help" in arguments else 2), done.stderr
