"""`estimate`: what it says of a configuration, without its weights and data."""

import json
import subprocess
import sys
from collections import Counter

import pytest
import torch

from infotok_lit import cli
from infotok_lit.commands.estimate import Sizes, bytes_on_card, sizes_of
from infotok_lit.commands.stand_in_fit import Plan, StandIns, build_data, plan_of, read_settings
from infotok_lit.modules import HarmonModule
from infotok_lit.modules.dry_run import DryRun
from infotok_lit.scenes import Scenes

GIB = 2**30
ONE_LAYER = (
    "--model.init_args.settings",
    '{"llm": {"num_hidden_layers": 1}, "mar": {"encoder_depth": 1, "decoder_depth": 1, "diffusion_depth": 1}}',
)


def test_a_configuration_is_estimated_without_its_weights_cards_and_data(tmp_path, monkeypatch, capsys) -> None:
    """The arithmetic of fp32 AdamW: as many bytes of gradients as of trained weights, and twice as many of states."""
    monkeypatch.chdir(tmp_path)
    small = ["--data.init_args.understanding_batch_size", "2", "--data.init_args.generation_batch_size", "4"]
    far = ["--model.init_args.init_from", "hf://nobody/nothing", "--trainer.accelerator", "gpu"]
    known = ["--tflops", "1", "--mfu", "0.5", "--text_tokens", "8", "--cards", "4"]
    arguments = ["--config", "harmon/scenes32", "--config", "data/folder", *ONE_LAYER, *small, *far, *known]
    assert cli.main(["estimate", *arguments, "--out", "found.json"]) == 0
    result = json.loads((tmp_path / "found.json").read_text())
    (plan,) = result["plans"]
    trained = 4 * sum(plan["trained"].values())
    assert trained <= plan["held"]["parameters"]
    assert 2 * trained < plan["held"]["optimiser states"] < 2.001 * trained
    single, ddp, fsdp = plan["bytes"].values()
    assert single == sum(plan["held"].values()) == max(plan["phases"].values())
    assert ddp == single + trained and fsdp < single
    assert result["step_seconds"] == pytest.approx(plan["flops"] / 0.5e12)
    assert plan["process_bytes"] > single / 0.92 + 200 * 2**20, "torch alone takes so much"
    assert plan["checkpoint_bytes"] >= trained + plan["held"]["optimiser states"]
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("token_diffusion", "heads", "FSDP, 4 cards", "24 GB"))


def test_the_peak_of_a_cpu_is_as_estimated(tmp_path) -> None:
    """In a process of its own, whose allocator keeps nothing that is free."""
    out = tmp_path / "estimate.json"
    arguments = ["--config", "harmon/scenes32", "--alternatives", "false", "--measure", "--out", str(out)]
    subprocess.run([sys.executable, "-m", "infotok_lit", "estimate", *arguments], check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert found["plans"][0]["bytes"]["1 card"] == pytest.approx(found["measured_bytes"], rel=0.15)


def test_what_cannot_be_known_and_what_fit_refuses_to_shard_are_left_out(tmp_path, monkeypatch, capsys) -> None:
    """As on macOS, whose C library has neither mallopt nor malloc_trim; and no FSDP with a backward pass per branch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("a call into glibc"))
    small = ["--config", "objective/finetune", *ONE_LAYER, "--model.init_args.backward_per_branch", "true"]
    arguments = ["estimate", "--config", "harmon/scenes32", *small, "--alternatives", "false", "--out", "found.json"]
    assert cli.main(arguments) == 0
    (plan,) = json.loads((tmp_path / "found.json").read_text())["plans"]
    assert plan["process_bytes"] is None and plan["bytes"]["1 card"] > 0
    assert list(plan["bytes"]) == ["1 card", "DDP, 8 cards"]
    said = capsys.readouterr().out
    assert "the process takes" not in said and "FSDP" not in said
    assert cli.main([*arguments, "--measure"]) != 0
    assert "needs Linux with glibc" in capsys.readouterr().err


@pytest.mark.parametrize("freeze", [(), ("llm.",)], ids=["trained", "frozen"])
def test_a_checkpoint_has_tied_weights_once_or_not_at_all(freeze, tmp_path) -> None:
    """Against a file: the language model's output head is its table of embeddings."""
    module = HarmonModule(init_from="embedded", freeze=freeze)
    module.configure_model()
    state = module.state_dict()
    module.frozen_weights.leave_out(state)
    torch.save(state, tmp_path / "some.ckpt")
    found = [tensor.untyped_storage() for tensor in torch.load(tmp_path / "some.ckpt").values()]
    assert sizes_of(module).saved == sum({one.data_ptr(): one.nbytes() for one in found}.values())


def test_a_moving_average_takes_as_much_as_what_is_trained(tmp_path, monkeypatch) -> None:
    """On each card, or its share of it; and in a checkpoint."""
    monkeypatch.chdir(tmp_path)
    small = ["--config", "objective/finetune", *ONE_LAYER, "--model.init_args.freeze", '["llm."]']
    arguments = ["estimate", "--config", "harmon/scenes32", *small, "--alternatives", "false", "--out", "found.json"]
    found = []
    for overlay in ([], ["--config", "trainer/weight_average"]):
        assert cli.main([*arguments, *overlay]) == 0
        found += json.loads((tmp_path / "found.json").read_text())["plans"]
    trained = 4 * sum(found[0]["trained"].values())
    more = [found[1]["bytes"][name] - size for name, size in found[0]["bytes"].items()]
    assert found[1]["held"]["buffers"] - found[0]["held"]["buffers"] == trained
    # To what happens to be forgotten a moment earlier or later.
    assert more == pytest.approx([trained, trained, trained / 8], abs=trained / 40)
    assert found[1]["checkpoint_bytes"] - found[0]["checkpoint_bytes"] == trained


def test_texts_are_those_of_images_that_a_program_draws() -> None:
    fit = ["--config", "harmon/scenes32", "--data.init_args.train.init_args.seed", "7"]
    settings = read_settings(fit)
    plan = plan_of(settings)
    drawn = build_data(settings, plan, text_tokens=None).training_sources["understanding"]
    assert isinstance(drawn, Scenes)
    assert isinstance(build_data(settings, plan, text_tokens=5).training_sources["understanding"], StandIns)
    folder = read_settings([*fit[:2], "--config", "data/folder"])
    stand_ins = build_data(folder, plan, text_tokens=None).training_sources["understanding"]
    assert isinstance(stand_ins, StandIns) and stand_ins.tokens == 128


def test_sharding_divides_what_it_shares_and_gathers_the_rest() -> None:
    """10 GiB of weights, all trained, in 4 blocks of 2 and 2 outside; 5 GiB of activations; 1 held whole."""
    held = Counter({"parameters": 11, "gradients": 10, "optimiser states": 20, "llm": 5})
    step = DryRun({"forward": Counter({name: size * GIB for name, size in held.items()})})
    weights = {"weights": 10 * GIB, "read": 10 * GIB, "trained": 10 * GIB}
    sizes = Sizes(whole=GIB, **weights, block=2 * GIB, outside=2 * GIB, saved=11 * GIB)
    assert bytes_on_card(step, sizes, 1, sharded=False, buckets=True) == 46 * GIB
    assert bytes_on_card(step, sizes, 8, sharded=False, buckets=True) == 56 * GIB
    assert bytes_on_card(step, sizes, 8, sharded=False, buckets=False) == 46 * GIB
    none_yet = DryRun({"forward": Counter({name: size for name, size in step.held.items() if name != "gradients"})})
    assert bytes_on_card(none_yet, sizes, 8, sharded=False, buckets=False) == 46 * GIB, "buckets are there before"
    gathered = 2 * (2 + 2 * 2)
    assert bytes_on_card(step, sizes, 8, sharded=True, buckets=True) == (5 + 1 + 40 / 8 + gathered) * GIB


def test_a_smaller_plan_has_the_same_samples_in_a_step() -> None:
    configured = Plan(understanding=4, generation=16, accumulate=8, recompute=False)
    smallest = configured.smallest
    assert (smallest.understanding, smallest.generation, smallest.accumulate) == (2, 8, 16)
    assert "--trainer.accumulate_grad_batches 16" in smallest.options_after(configured)
    assert configured.options_after(configured) == ""
    alone = Plan(understanding=1, generation=3, accumulate=1, recompute=False)
    assert alone.smallest == alone


def test_stand_ins_have_as_many_tokens_as_was_asked() -> None:
    from transformers import AutoTokenizer

    from infotok_lit.assets import SCENES_TOKENIZER

    tokenizer = AutoTokenizer.from_pretrained(SCENES_TOKENIZER)
    for index in range(11):
        caption = StandIns(20).sample("generation", index, None).caption
        assert len(tokenizer.encode(caption, add_special_tokens=False)) == 20
    texts = {StandIns(20).sample("understanding", index, None).answer for index in range(11)}
    assert len(texts) == 11, "alignment has negatives"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cards", "0"], "cards"),
        (["--tflops", "989", "--mfu", "40"], "mfu is 40.0; give a share"),
        (["--trainer.max_stepss", "3"], "max_stepss"),
        (["--config", "video_tokenizer/scenes"], "unified models"),
    ],
)
def test_a_mistake_is_a_sentence(arguments, said, capsys) -> None:
    assert cli.main(["estimate", *arguments]) == 2
    assert said in capsys.readouterr().err
