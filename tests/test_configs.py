"""Every YAML that ships is a configuration that can be run; wrong ones are refused by name."""

import io
import json
import multiprocessing
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from infotok_lit.assets import DEFAULTS_CONFIG, QUICKSTART_CONFIG, SCENES_TOKENIZER, config_chain, find_config
from infotok_lit.cli import main
from infotok_lit.commands.fit import InfoTokCLI
from infotok_lit.commands.gpu_check import SIZES
from infotok_lit.commands.stand_in_fit import read_settings
from infotok_lit.errors import SettingsError
from infotok_lit.modules.optimiser import build_optimiser

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs"
PHOTOS = ROOT / "tests" / "fixtures" / "photos"
STUDIES = [*FOLDER.glob("ablation/*.yaml"), *FOLDER.glob("sweep/*.yaml"), FOLDER / "video_tokenizer" / "masks.yaml"]
"""What `ablate` reads: tests/study/test_ablate.py is about them."""
VIDEO = [FOLDER / "video_tokenizer" / "scenes.yaml"]
"""Of a model of another kind: tests/video/test_module.py is about them."""
CONFIGS = sorted(
    str(path.relative_to(FOLDER).with_suffix("")) for path in {*FOLDER.glob("*/*.yaml")} - {*STUDIES, *VIDEO}
)
FOR = {
    "evaluation/large_llm": "showo2/scenes32",
    "openuni/lora": "openuni/b-512",
    "openuni/unfreeze_projector": "openuni/b-512",
    "openuni/unfreeze_vit": "openuni/l-512",
    "showo2/discrete": "showo2/scenes32",
}
"""Overlay -> a configuration that it is for; those that are for all of them are laid over the quickstart."""
ANYWHERE = [
    "--model.init_args.init_from=null",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.precision=32-true",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
]
SOME_TOKENIZER = f"--model.init_args.tokenizer={SCENES_TOKENIZER}"
A_STEP = [
    "--trainer.max_steps=1",
    "--trainer.accumulate_grad_batches=1",
    "--trainer.limit_val_batches=0",
    "--trainer.callbacks=[]",
    "--data.init_args.understanding_batch_size=4",
    "--data.init_args.generation_batch_size=4",
    "--data.init_args.num_workers=0",
]


def names_of(config: str) -> list[str]:
    """The --config options with which a configuration is used."""
    alone = any("class_path" in read(path).get("model", {}) for path in config_chain([config]))
    names = [config] if alone else [FOR.get(config, "harmon/scenes32"), config]
    return [f"--config={name}" for name in names]


def is_small(config: str) -> bool:
    return "scenes32" in str(names_of(config)) or config == "probe/decoder"


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def leaves(content: dict, prefix: str = "") -> dict[str, object]:
    """Dotted key -> value."""
    found: dict[str, object] = {}
    for name, value in content.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


@pytest.fixture
def your_data(tmp_path, monkeypatch) -> None:
    """A working folder that has what the configurations for own data point at."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    shutil.copytree(PHOTOS, folder / "images")
    (tmp_path / "photos").symlink_to(PHOTOS)
    rows = json.loads((PHOTOS / "annotations.json").read_text())
    for name in ("train.json", "val.json"):
        (folder / name).write_text(json.dumps(rows))
    for name in ("val-000000.tar", *(f"train-{i:06}.tar" for i in range(16))):
        with tarfile.open(folder / name, "w") as tar:
            for file, content in (
                ("a.jpg", (PHOTOS / "coins.jpg").read_bytes()),
                ("a.json", json.dumps(rows[0]).encode()),
            ):
                member = tarfile.TarInfo(file)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("config", [name for name in CONFIGS if not is_small(name)])
def test_every_official_size_is_built(config, your_data) -> None:
    """On meta: whatever names parts of the model (freeze, unfreeze, group_lr, lora) names real ones."""
    module = InfoTokCLI(["fit", *names_of(config), *ANYWHERE, SOME_TOKENIZER], run=False).model
    with torch.device("meta"):
        module.configure_model()
    trained = {name for name, parameter in module.base.named_parameters() if parameter.requires_grad}
    assert trained
    build_optimiser(module.optimiser_config, module.base, module.infotok, module.base.decays)
    if config.startswith("openuni/unfreeze"):
        assert any(name.startswith("vlm.model.multi_modal_projector.") for name in trained)
        assert not any(name.startswith("vlm.model.language_model.") for name in trained)
    if config == "openuni/lora":
        assert {name.split(".")[0] for name in trained if "lora" in name} == {"vlm"}


@pytest.mark.parametrize("size", SIZES)
def test_the_sizes_that_a_card_is_checked_with_are_whole(size) -> None:
    assert read_settings([f"--config={size}"]).model.init_args.size in size


@pytest.mark.parametrize("config", [name for name in CONFIGS if is_small(name)])
def test_the_small_ones_take_a_step(config, your_data) -> None:
    if "strategy" not in read(FOLDER / f"{config}.yaml").get("trainer", {}):
        take_a_step(config)
        return
    # In a process of its own: where a process group once was, one that is forked later waits for ever in its first sum.
    alone = multiprocessing.get_context("fork").Process(target=take_a_step, args=(config,))
    alone.start()
    alone.join()
    assert alone.exitcode == 0


def take_a_step(config: str) -> None:
    cli = InfoTokCLI(["fit", *names_of(config), *ANYWHERE, *A_STEP])
    assert cli.trainer.global_step == 1
    assert cli.trainer.callback_metrics["train/loss"].isfinite()


@pytest.mark.parametrize("overlay", ["lora", "unfreeze_projector", "unfreeze_vit"])
def test_overlays_of_official_sizes_take_a_step_on_the_small_model(overlay, your_data) -> None:
    small = ["--config=openuni/scenes32", "--model.init_args.freeze=[vlm.]", f"--config=openuni/{overlay}"]
    assert InfoTokCLI(["fit", *small, *ANYWHERE, *A_STEP]).trainer.global_step == 1


@pytest.mark.parametrize("config", CONFIGS)
def test_a_configuration_states_only_what_differs(config) -> None:
    """From what it says that it is laid over, and from the defaults."""
    *below, own = [DEFAULTS_CONFIG, *config_chain([config])]
    settled: dict[str, object] = {}
    for path in below:
        settled |= leaves(read(path))
    repeated = {key for key, value in leaves(read(own)).items() if key in settled and settled[key] == value}
    assert not repeated


def test_the_list_of_callbacks_stands_once() -> None:
    """What is measured of a study's cells, of a probe and in an evaluation is another list, and short."""
    listing = [config for config in CONFIGS if "callbacks" in read(find_config(config)).get("trainer", {})]
    evaluations = ["evaluation/paper_table5", "evaluation/paper_table5_judged", "evaluation/scenes32"]
    assert listing == [*evaluations, "probe/decoder", "trainer/cell"]


def test_the_index_names_every_configuration() -> None:
    named = re.findall(r"^\| `(\S+)` \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(
        [*CONFIGS, *(str(path.relative_to(FOLDER).with_suffix("")) for path in [*STUDIES, *VIDEO])]
    )


def refusal(capsys, *arguments: str) -> str:
    """What the command line says, in one line, and nothing else."""
    assert main(["fit", *arguments]) == 2
    said = capsys.readouterr().err.removeprefix("Seed set to 0\n")
    assert said.startswith("infotok_lit: ") and said.count("\n") == 1 and len(said) < 400
    return said.removeprefix("infotok_lit: ").rstrip()


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (
            "model.init_args.objective.terms=[compactness,sufficency]",
            "model.init_args.objective.terms: 'sufficency' is not one of compactness, sufficiency, alignment, "
            "self_alignment, captioning; did you "
            "mean sufficiency?",
        ),
        (
            "model.init_args.objective.bottleneck=outline",
            "model.init_args.objective.bottleneck: 'outline' is not one of projected, inline; did you mean inline?",
        ),
        (
            "model.init_args.objective.temprature=0.2",
            "there is no setting model.init_args.objective.temprature; did you mean "
            "model.init_args.objective.temperature?",
        ),
        (
            "model.init_args.lr=1e-3",
            "there is no setting model.init_args.lr; did you mean model.init_args.optimiser.lr?",
        ),
        ("model.init_args.sise=0.5b", "there is no setting model.init_args.sise; did you mean model.init_args.size?"),
        (
            "data.init_args.train.init_args.splitt=val",
            "there is no setting data.init_args.train.init_args.splitt; did you mean "
            "data.init_args.train.init_args.split?",
        ),
        ("trainer.max_stepps=3", "there is no setting trainer.max_stepps; did you mean trainer.max_steps?"),
        ("max_steps=3", "there is no setting max_steps; did you mean trainer.max_steps?"),
        ("model.init_args.optimiser.lr=fast", "model.init_args.optimiser.lr: 'fast' is not a number"),
        ("ckpt_pth=last", "there is no setting ckpt_pth; did you mean ckpt_path?"),
        (
            "data.init_args.train=Folder",
            "data.init_args.train: 'Folder' is not the path of a class, such as infotok_lit.scenes.Scenes",
        ),
        (
            "trainer.callbacks+=infotok_lit.callbacks.ActiveUnitz",
            "trainer.callbacks: infotok_lit.callbacks has no ActiveUnitz; did you mean ActiveUnits?",
        ),
    ],
)
def test_a_wrong_option_is_one_sentence(argument, said, capsys) -> None:
    assert refusal(capsys, f"--{argument}") == said


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("model.init_args.size=7b", "harmon has no size '7b'; choose one of scenes32, 0.5b, 1.5b"),
        (
            "model.init_args.objective.understanding.beta=-1",
            "model.init_args.objective.understanding: beta is -1.0; a weight must be 0 (off) or positive",
        ),
        ("model.init_args.objective.temperature=-1", "temperature is -1.0; set it above 0"),
        ("model.init_args.optimiser.lr=-1", "must not be negative"),
        ("data.init_args.val_batch_size=0", "must be at least 1"),
        ("trainer.accelerator=gpuu", "invalid accelerator name"),
        ("trainer.callbacks+=infotok_lit.callbacks.Drawings", "is now infotok_lit.callbacks.GeneratedImages"),
    ],
)
def test_a_value_that_a_class_refuses_is_its_sentence(argument, said, capsys) -> None:
    assert said in refusal(capsys, f"--{argument}")


def test_a_negative_number_may_follow_a_space(capsys) -> None:
    assert "beta is -0.0001" in refusal(capsys, "--model.init_args.objective.generation.beta", "-1e-4")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "model:\n  init_args:\n    objctive:\n      terms: []\n",
            "there is no setting model.init_args.objctive.terms (in {}); did you mean model.init_args.objective?",
        ),
        (
            "modle:\n  init_args:\n    size: scenes32\n",
            "there is no setting modle.init_args.size (in {}); did you mean model?",
        ),
        (
            "model:\n  init_args:\n    objective:\n      terms: [compression]\n",
            "model.init_args.objective.terms: 'compression' is not one of compactness, sufficiency, alignment, "
            "self_alignment, captioning; did you "
            "mean compactness? (in {})",
        ),
        ("data:\n  init_args:\n    val_batch_size: 0\n", "must be at least 1"),
        ("trainer: [1, 2\n", "{} is not YAML: "),
        ("config: []\n", "{}: a configuration cannot name others under `config`; give each with --config"),
        ("over: mine.yaml\n", "{} is laid over itself, by its key `over`"),
        ("over: nothing.yaml\n", "no configuration file at"),
    ],
)
def test_a_wrong_file_is_one_sentence(content, said, tmp_path, capsys) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    assert said.format(path) in refusal(capsys, "--config", str(QUICKSTART_CONFIG), "--config", str(path))


def test_a_file_that_is_no_text_is_one_sentence(tmp_path, capsys) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(bytes(range(256)))
    assert refusal(capsys, "--config", str(path)) == f"{path} is not a text file of settings in YAML"


def test_configurations_are_found_by_name_and_each_lies_over_its_own() -> None:
    chain = [
        str(path.resolve().relative_to(FOLDER)) for path in config_chain(["showo2/7b", "configs/showo2/stage1.yaml"])
    ]
    assert chain == ["showo2/1.5b.yaml", "showo2/7b.yaml", "showo2/stage1.yaml"]


def test_a_configuration_may_lie_over_several_each_of_which_comes_once(tmp_path) -> None:
    over = {"below": None, "left": "below.yaml", "right": ["below.yaml"], "top": ["left.yaml", "right.yaml"]}
    for name, bases in over.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"over": bases}))
    assert [path.stem for path in config_chain([tmp_path / "top.yaml"])] == ["below", "left", "right", "top"]
    (tmp_path / "below.yaml").write_text("over: [top.yaml]")
    with pytest.raises(SettingsError, match="top.yaml is laid over itself"):
        config_chain([tmp_path / "top.yaml"])
