"""Configurations as primitives: every size survives JSON, settings change what they name, and nothing else is taken."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from infotok_lit.cli import main
from infotok_lit.errors import SettingsError
from infotok_lit.models.family import families
from infotok_lit.models.family import family as family_called
from infotok_lit.modules import HarmonModule, OpenUniModule, Showo2Module

SIZES = [(family, size) for family in families() for size in family_called(family).sizes]


OUT_OF_BOUNDS = [
    ({"latent_scale": 0}, "latent_scale is 0.0; set it above 0"),
    ({"autoencoder": {"block_size": 0}}, "autoencoder.block_size is 0; set it to 1 or more"),
    ({"llm": {"rope_theta": 0}}, "llm.rope_theta is 0.0; set it above 0"),
    ({"llm": {"num_hidden_layers": 0}}, "llm.num_hidden_layers is 0; set it to 1 or more"),
]
"""Settings of every family."""


@pytest.mark.parametrize(("family", "size"), SIZES)
def test_every_size_survives_a_config_json(family, size) -> None:
    config = family_called(family).config_of_size(size)
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_settings_change_what_they_name_alone() -> None:
    config = family_called("harmon").config_of_size("scenes32")
    changed = config.with_settings({"image_size": 64, "mar": {"default_grid": [8, 8]}})
    assert changed == replace(config, image_size=64, mar=replace(config.mar, default_grid=(8, 8)))


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"colour": 1}, "there is no entry 'colour'"),
        ({"llm": {"rope_base": 1.0}}, "llm has no entry 'rope_base'"),
        ({"llm": {"rope_tetha": 1.0}}, r"llm has no entry 'rope_tetha'; did you mean rope_theta\?"),
        ({"llm": 3}, "llm is 3, where entries with values are expected"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(family, settings, said) -> None:
    config = family_called(family).config_of_size("scenes32")
    with pytest.raises(SettingsError, match=rf"this does not describe a model of {config.title}: .*{said}"):
        config.with_settings(settings)


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("value", [None, 3, "x", [1]])
def test_a_value_in_the_place_of_a_group_is_refused(family, value) -> None:
    """Where older versions had an entry in the group, it was a traceback."""
    config = family_called(family).config_of_size("scenes32")
    for group in (name for name, held in config.to_dict().items() if isinstance(held, dict)):
        with pytest.raises(SettingsError, match=f"{group} is .*, where entries with values are expected"):
            config.with_settings({group: value})


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("harmon", {"image_size": "big"}, "image_size is 'big'; set it to a whole number"),
        ("harmon", {"latent_scale": True}, "latent_scale is True; set it to a number"),
        ("harmon", {"grad_scale": "no"}, "grad_scale is 'no'; set it to a number or null"),
        ("harmon", {"mar": {"sampling_steps": 50}}, "mar.sampling_steps is 50; set it to text"),
        (
            "harmon",
            {"mar": {"default_grid": [4]}},
            r"mar.default_grid is \(4,\); set it to a list of a whole number, a",
        ),
        ("harmon", {"sampling": {"guidance_schedule": "liner"}}, "'liner'; set it to 'constant' or 'linear'"),
        (
            "showo2",
            {"quantiser": {"kind": "fqs"}},
            "quantiser.kind is 'fqs'; set it to 'none' or 'fsq' or 'lfq' or 'vq'",
        ),
        ("showo2", {"quantiser": {"levels": [8, "x"]}}, r"quantiser.levels is \(8, 'x'\); set it to a list of a whole"),
        ("showo2", {"prompts": {"reading": "caht"}}, "prompts.reading is 'caht'; set it to 'chat' or"),
        (
            "showo2",
            {"autoencoder": {"posterior": "men"}},
            "autoencoder.posterior is 'men'; set it to 'sample' or 'mean'",
        ),
        ("openuni", {"connector": {"order": "last"}}, "connector.order is 'last'; set it to 'connector_first' or"),
    ],
)
def test_a_value_of_another_type_or_of_no_choice_is_refused(family, settings, said) -> None:
    """What is no choice was taken for one of them, without a word."""
    with pytest.raises(SettingsError, match=said):
        family_called(family).config_of_size("scenes32").with_settings(settings)


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("harmon", {"iterations": 0}, "iterations is 0; set it to 1 or more"),
        ("harmon", {"solver_steps": -1}, "solver_steps is -1; set it to 0 or more"),
        ("showo2", {"iterations": 1}, "iterations is 1; set it to 2 or more"),
        ("showo2", {"time_shift": 0.0}, "time_shift is 0.0; set it above 0"),
        ("openuni", {"iterations": 0}, "iterations is 0; set it to 1 or more"),
        ("openuni", {"time_shift": -1.0}, "time_shift is -1.0; set it above 0"),
    ],
)
def test_options_that_draw_nothing_are_refused(family, options, said) -> None:
    """They gave one grey, or the noise itself, without a word."""
    with pytest.raises(SettingsError, match=said):
        family_called(family).sampling(**options)


@pytest.mark.parametrize(
    ("module", "settings", "said"),
    [
        (HarmonModule, {"llm": {"num_attention_heads": 3}}, "llm.num_attention_heads is 3; set it to a divisor of llm"),
        (HarmonModule, {"llm": {"num_key_value_heads": 0}}, "num_key_value_heads is 0; set it to a divisor of llm.num"),
        (HarmonModule, {"mar": {"encoder_heads": 3}}, "mar.encoder_heads is 3; set it to a divisor of mar.encoder_w"),
        (HarmonModule, {"mar": {"decoder_width": 130}}, "mar.decoder_heads is 4; .* of mar.decoder_width, 130"),
        (Showo2Module, {"semantic": {"heads": 5}}, "semantic.heads is 5; set it to a divisor of semantic.width, 128"),
        (Showo2Module, {"diffusion_head": {"heads": 3}}, "diffusion_head.heads is 3; .* of diffusion_head.width, 128"),
        (Showo2Module, {"diffusion_head": {"kv_heads": 3}}, "kv_heads is 3; .* of diffusion_head.heads, 4"),
        (Showo2Module, {"diffusion_head": {"head_dim": 33}}, "diffusion_head.head_dim is 33; set it to an even number"),
        (Showo2Module, {"llm": {"num_attention_heads": 128}}, "num_attention_heads is 1; set it to an even number"),
        (OpenUniModule, {"vision": {"heads": 5}}, "vision.heads is 5; set it to a divisor of vision.width, 96"),
        (OpenUniModule, {"connector": {"heads": 3}}, "connector.heads is 3; set it to a divisor of connector.width"),
        (OpenUniModule, {"transformer": {"cross_heads": 3}}, "is 4 x 32, which must be cross_heads x .*, 3 x 32"),
    ],
)
def test_heads_that_do_not_fit_a_width_are_refused_before_anything_is_built(module, settings, said) -> None:
    with pytest.raises(SettingsError, match=said):
        module(size="scenes32", settings=settings)


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("harmon", {"repetition_penalty": 0}, "repetition_penalty is 0.0; set it above 0"),
        ("harmon", {"llm": {"rms_norm_eps": -1}}, "llm.rms_norm_eps is -1.0; set it to 0 or more"),
        ("harmon", {"llm": {"initializer_range": -1}}, "llm.initializer_range is -1.0; set it to 0 or more"),
        ("harmon", {"llm": {"intermediate_size": -1}}, "llm.intermediate_size is -1; set it to 0 or more"),
        ("harmon", {"grad_scale": float("nan")}, "grad_scale is nan; set it to a finite number"),
        ("showo2", {"semantic": {"mlp_width": -1}}, "semantic.mlp_width is -1; set it to 0 or more"),
        ("showo2", {"semantic": {"layer_norm_eps": -1}}, "semantic.layer_norm_eps is -1.0; set it to 0 or more"),
        ("showo2", {"diffusion_head": {"mlp_width": -1}}, "diffusion_head.mlp_width is -1; set it to 0 or more"),
        ("openuni", {"connector": {"mlp_width": -1}}, "connector.mlp_width is -1; set it to 0 or more"),
        ("harmon", {"mar": {"encoder_width": 0}}, "mar.encoder_width is 0; set it to 1 or more"),
        ("harmon", {"mar": {"num_buffers": 0}}, "mar.num_buffers is 0; set it to 1 or more"),
        ("harmon", {"mar": {"noise_draws": 0}}, "mar.noise_draws is 0; set it to 1 or more"),
        ("harmon", {"mar": {"patch_size": 0}}, "mar.patch_size is 0; set it to 1 or more"),
        ("harmon", {"mar": {"diffusion_depth": -1}}, "mar.diffusion_depth is -1; set it to 0 or more"),
        ("harmon", {"mar": {"mlp_ratio": 0}}, "mar.mlp_ratio is 0.0; set it above 0"),
        ("harmon", {"mar": {"mask_ratio_std": 0.0}}, "mar.mask_ratio_std is 0.0; set it above 0"),
        ("harmon", {"mar": {"mask_ratio_min": 1.5}}, "mar.mask_ratio_min is 1.5; set it to a share, 0 to 1"),
        ("harmon", {"mar": {"dropout": 1.0}}, "mar.dropout is 1.0; set it to 0 or more, and below 1"),
        ("harmon", {"mar": {"default_grid": [0, 4]}}, "a side of mar.default_grid is 0; set it to 1 or more"),
        ("showo2", {"quantiser": {"kind": "fsq", "levels": [2, 5]}}, r"quantiser.levels is \[2, 5\]; set it to 3 or"),
        ("showo2", {"quantiser": {"kind": "fsq", "levels": []}}, r"quantiser.levels is \[\]; set it to 3 or more each"),
        ("showo2", {"quantiser": {"kind": "fsq", "levels": [4097] * 2}}, "3 or more each, and 16777216 codes at most"),
        ("showo2", {"quantiser": {"kind": "lfq", "codebook_size": 1000}}, "codebook_size is 1000; set it to a power"),
        ("showo2", {"quantiser": {"kind": "vq", "codebook_size": 0}}, "codebook_size is 0; set it to 2 or more"),
        ("showo2", {"quantiser": {"kind": "vq", "codebook_width": 0}}, "codebook_width is 0; set it to 1 or more"),
        ("showo2", {"semantic": {"table_side": 0}}, "semantic.table_side is 0; set it to 1 or more"),
        ("showo2", {"semantic": {"width": 0}}, "semantic.width is 0; set it to 1 or more"),
        ("showo2", {"diffusion_head": {"width": 0}}, "diffusion_head.width is 0; set it to 1 or more"),
        ("showo2", {"prompts": {"max_caption": -1}}, "prompts.max_caption is -1; set it to 1 or more"),
        ("openuni", {"vision": {"patch_size": 0}}, "vision.patch_size is 0; set it to 1 or more"),
        ("openuni", {"vision": {"input_size": 0}}, "vision.input_size is 0; set it to 1 or more"),
        ("openuni", {"connector": {"width": 0}}, "connector.width is 0; set it to 1 or more"),
        ("openuni", {"num_queries": 0}, "num_queries is 0; set it to 1 or more"),
        ("openuni", {"max_caption": 0}, "max_caption is 0; set it to 1 or more"),
        *((family, settings, said) for family in families() for settings, said in OUT_OF_BOUNDS),
    ],
)
def test_a_number_out_of_bounds_is_refused(family, settings, said) -> None:
    """They ended in tracebacks, or trained on nothing and drew NaN."""
    with pytest.raises(SettingsError, match=said):
        family_called(family).config_of_size("scenes32").with_settings(settings)


@pytest.mark.parametrize("steps", ["fast", "ddim", "10,", "1.5", "ddim999", "2000", "1"])
def test_steps_that_are_none_are_refused_before_training(steps) -> None:
    with pytest.raises(SettingsError, match=r"sampling_steps is '|no integer stride gives|cannot keep 2000"):
        family_called("harmon").fresh("scenes32", settings={"mar": {"sampling_steps": steps}})


def test_whole_numbers_are_numbers() -> None:
    changed = family_called("harmon").config_of_size("scenes32").with_settings({"latent_scale": 1, "grad_scale": None})
    assert (changed.latent_scale, changed.grad_scale) == (1, None)


def test_a_whole_number_where_any_number_may_stand_is_taken_by_the_libraries() -> None:
    """transformers refuses a penalty, and an epsilon, that is 1 and not 1.0."""
    model = family_called("harmon").fresh("scenes32", settings={"repetition_penalty": 1, "llm": {"rms_norm_eps": 1}})
    assert model.describe(torch.zeros(1, 3, 32, 32), ["what?"], max_new_tokens=1)


def test_what_is_missing_is_named() -> None:
    config = family_called("showo2").config_of_size("scenes32")
    values = config.to_dict()
    del values["semantic"]
    with pytest.raises(SettingsError, match="'semantic'"):
        type(config).from_dict(values)


def test_on_the_command_line_it_is_one_message(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--model.init_args.settings", "{llm: 3}"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("infotok_lit: model: this does not describe a model of Harmon: llm is 3")


@pytest.mark.parametrize("family", families())
def test_what_older_versions_wrote_is_still_read(family) -> None:
    """They called the settings of generation `drawing`, and had entries that nothing reads any more."""
    config = family_called(family).config_of_size("scenes32")
    values = config.to_dict()
    values["drawing"] = values.pop("sampling") | {"guidance": 1.5}
    for dropped in config.dropped:
        group, _, entry = dropped.rpartition(".")
        values[group][entry] = 1
    del values["max_length"]
    assert type(config).from_dict(values) == replace(config, sampling=replace(config.sampling, guidance=1.5))


@pytest.mark.parametrize("family", families())
def test_the_old_name_of_a_setting_ends_in_one_message(family) -> None:
    config = family_called(family).config_of_size("scenes32")
    with pytest.raises(SettingsError, match=r"^model\.settings: `drawing` is now called `sampling`$"):
        config.with_settings({"drawing": {"guidance": 1.0}})


def test_a_family_is_described_without_importing_anything_heavy() -> None:
    code = (
        "import sys; from infotok_lit.models.family import families, family; "
        "print([(family(n).title, len(family(n).sizes), family(n).parts, family(n).sampling()) for n in families()]); "
        "heavy = {'torch', 'numpy', 'transformers', 'diffusers'} & sys.modules.keys(); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(title in done.stdout for title in ("Harmon", "Show-o2", "OpenUni"))


def test_a_family_that_there_is_not_is_refused() -> None:
    with pytest.raises(SettingsError, match="family 'other'; this version knows harmon, openuni, showo2"):
        family_called("other")


@pytest.mark.parametrize(
    ("family", "settings", "differing"),
    [
        ("harmon", {"mar": {"mask_ratio_min": 0.5, "mask_ratio_std": 0.1, "noise_draws": 8}}, []),
        ("harmon", {"mar": {"dropout": 0.2, "sampling_steps": "50"}}, []),
        ("harmon", {"mar": {"noise_draws": 8, "num_buffers": 8}}, ["mar"]),
        ("harmon", {"llm": {"max_position_embeddings": 512, "initializer_range": 0.02}}, []),
        ("harmon", {"llm": {"max_position_embeddings": 512, "rope_theta": 100.0}}, ["llm"]),
        ("showo2", {"llm": {"max_position_embeddings": 512}}, []),
        ("openuni", {"llm": {"max_position_embeddings": 512}, "transformer": {"sample_size": 8}}, []),
        ("openuni", {"transformer": {"sample_size": 8, "mlp_ratio": 2.0}}, ["transformer"]),
        ("showo2", {"autoencoder": {"posterior": "mean"}}, []),
        ("showo2", {"autoencoder": {"posterior": "mean", "kept": 1}}, ["autoencoder"]),
    ],
)
def test_weights_fit_whatever_no_weight_depends_on(family, settings, differing) -> None:
    """So a run or an export can be trained on with another masking, or another reading of the latents."""
    found = family_called(family).config_of_size("scenes32")
    assert family_called(family).differing_parts(found, found.with_settings(settings)) == differing


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_what_is_called_free_changes_no_weight_and_no_image() -> None:
    """The weights of one load into the other, which then draws the same, also beyond the positions that it names."""
    family = family_called("openuni")
    changed = {"llm": {"max_position_embeddings": 8}, "transformer": {"sample_size": 8}}
    one, other = family.fresh("scenes32"), family.fresh("scenes32", settings=changed)
    other.load_state_dict(one.state_dict())
    images = [model.eval().generate(["a red circle"], sampling=one.config.sampling) for model in (one, other)]
    assert torch.equal(*images)


@pytest.mark.parametrize(("size", "longest", "side"), [("1.5b", 1024, 27), ("1.5b-hq", 1280, 32), ("7b", 1024, 27)])
def test_captions_of_showo2_leave_room_for_the_image_in_the_official_sequence(size, longest, side) -> None:
    """The image's places and its time slot, its two markers, and the two of the sequence."""
    config = family_called("showo2").config_of_size(size)
    assert config.prompts.max_caption == longest - (side**2 + 1) - 4
