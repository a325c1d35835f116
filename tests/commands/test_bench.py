"""`bench`: what `fit` does, timed per term; and numbers that belong together."""

import itertools
import json
import time
from collections.abc import Collection
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from tiny import TinyModule, scenes_data
from torch.utils._python_dispatch import _get_current_dispatch_mode

from infotok_lit import cli
from infotok_lit.callbacks import throughput
from infotok_lit.callbacks.throughput import PHASES, StepTime, StepTiming
from infotok_lit.commands import bench_inference as inference_command
from infotok_lit.commands.bench import chosen_sets, main, name_of, summarise, table, typical
from infotok_lit.commands.bench_inference import bench_inference, compare_caches, drawing, never_ending
from infotok_lit.commands.fit import InfoTokCLI
from infotok_lit.errors import SettingsError
from infotok_lit.objective.config import ObjectiveConfig

NAMES = ["plain", "C", "C&S", "C&S&A"]


class Timed(TinyModule):
    """The tiny model, whose objective is set as in a configuration."""

    def __init__(self, objective: ObjectiveConfig = ObjectiveConfig(terms=("compactness", "alignment"))) -> None:  # noqa: B008
        super().__init__(terms=objective.terms)


SMALL = {
    "seed_everything": 0,
    "model": {"class_path": f"{__name__}.Timed"},
    "data": {
        "class_path": "infotok_lit.data.UnifiedDataModule",
        "init_args": {
            "train": {"class_path": "infotok_lit.scenes.Scenes", "init_args": {"num_samples": 100}},
            "understanding_batch_size": 3,
            "generation_batch_size": 2,
        },
    },
    "trainer": {"accelerator": "cpu", "max_steps": 5, "gradient_clip_val": 1.0, "accumulate_grad_batches": 2},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("bench") / "config.yaml"
    path.write_text(json.dumps(SMALL))
    return str(path)


def timed_fit(pauses: Collection[str] = (), steps: int = 3, accumulate: int = 1, **options) -> StepTiming:
    """A fit with the callback, some phases of which take 50 ms longer."""

    class Pauses(TinyModule):
        def training_step(self, *arguments):
            sleep_if("forward" in pauses)
            return super().training_step(*arguments)

        def transfer_batch_to_device(self, *arguments):
            sleep_if("data" in pauses)
            return super().transfer_batch_to_device(*arguments)

        def on_before_optimizer_step(self, *arguments):
            sleep_if("optimiser" in pauses)
            return super().on_before_optimizer_step(*arguments)

        def backward(self, *arguments):
            sleep_if("backward" in pauses)
            return super().backward(*arguments)

    callback = StepTiming(warmup=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1 + steps,
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(Pauses(), scenes_data())
    return callback


def sleep_if(wanted: bool) -> None:
    if wanted:
        time.sleep(0.05)


def test_time_is_counted_in_the_phase_that_takes_it() -> None:
    """A pause in each phase of the real Trainer is found there and not in another: on the wall, not on the CPU."""
    torch.set_num_threads(1)
    paused = timed_fit(pauses=PHASES)
    assert len(paused.steps) == 3 and paused.samples_per_step == 8 and paused.peak_bytes is None
    for step in paused.steps:
        assert list(step.wall) == list(step.cpu) == list(PHASES)
        assert all(step.wall[phase] - step.cpu[phase] > 0.045 and step.cpu[phase] > 0 for phase in PHASES)


def test_a_step_is_all_batches_whose_gradients_it_accumulates() -> None:
    paused = timed_fit(pauses=["forward"], steps=2, accumulate=3)
    assert len(paused.steps) == 2 and paused.samples_per_step == 3 * 8
    assert all(step.wall["forward"] >= 0.15 for step in paused.steps)


def test_a_first_step_that_fails_ends_the_counting_of_operations(monkeypatch) -> None:
    def fails(*arguments):
        raise ValueError("no batch like this")

    monkeypatch.setattr(TinyModule, "training_step", fails)
    with pytest.raises(ValueError, match="no batch like this"):
        timed_fit()
    assert _get_current_dispatch_mode() is None


def test_no_moment_is_lost_or_counted_twice(monkeypatch) -> None:
    """With a clock that goes on by one whenever it is looked at, each phase of each batch takes one."""
    monkeypatch.setattr(throughput, "perf_counter", itertools.count().__next__)
    assert [step.wall for step in timed_fit(steps=2).steps] == 2 * [dict.fromkeys(PHASES, 1)]
    assert [step.wall for step in timed_fit(steps=2, accumulate=3).steps] == 2 * [dict.fromkeys(PHASES, 3)]


def test_every_variant_is_a_fit_and_is_compared_with_plain_fine_tuning(config, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "new" / "bench.json"
    few = ["--steps", "2", "--warmup", "1", "--rounds", "1"]
    assert main(["bench", "--config", config, *few, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    variants = {variant["name"]: variant for variant in result["variants"]}
    assert list(variants) == [*NAMES, "C&A"], "the configuration's own terms are added"
    assert result["samples_per_step"] == 2 * (3 + 2) and (result["steps"], result["rounds"]) == (2, 1)
    for variant in variants.values():
        assert variant["samples_per_second"] == pytest.approx(10 / variant["step_seconds"])
        assert all(variant["phase_seconds"][phase] > 0 < variant["phase_cpu_seconds"][phase] for phase in PHASES)
    assert variants["plain"]["ratio"] == variants["plain"]["cpu_ratio"] == 1.0
    heads = [variants[name]["head_parameters"] for name in NAMES]
    assert heads[0] == 0 and heads == sorted(set(heads))
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*NAMES, "C&A", "ratio to plain", "CPU ms", "optimiser, ms", "MFU"])
    assert variants["C&S&A"]["flops"] > variants["C"]["flops"] > variants["plain"]["flops"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["new"], "and nothing else is left where it is called"


def test_a_configuration_of_the_papers_terms_has_no_fifth_variant() -> None:
    sets = chosen_sets(["alignment", "sufficiency", "compactness"], variants=None)
    assert [name_of(terms) for terms in sets] == NAMES


@pytest.mark.parametrize("terms", [("captioning",), ("compactness", "self_alignment"), ("captioning", "sufficiency")])
def test_rivals_are_not_taken_for_terms_of_the_paper(terms) -> None:
    """Rounds are kept by name, and those of two variants of one name were one list."""
    names = [name_of(one) for one in chosen_sets(terms, None)]
    assert names[:-1] == NAMES
    assert names[-1] not in NAMES


@pytest.mark.parametrize("overlay", ["token_budget", "a_shuffled"])
def test_a_setting_that_cannot_be_without_terms_is_refused_with_the_mend(overlay, capsys) -> None:
    given = ["--config", "harmon/scenes32", "--config", f"objective/{overlay}"]
    assert cli.main(["bench", *given]) == 2
    said, mend = capsys.readouterr().err.strip().splitlines()[-1].split(": add ")
    assert said.startswith("infotok_lit: bench also times training without terms, where ")
    # What was refused is not with it.
    plain = ["--trainer.logger=false", "--model.init_args.objective.terms=[]"]
    assert InfoTokCLI(["fit", *given, *mend.split(), *plain], run=False).model.objective_config.terms == ()


def test_ratios_are_taken_round_by_round() -> None:
    """The second round is twice as slow; the variant costs 10 % in each, and one slow step does not show."""

    def measured(*totals: float) -> dict:
        steps = [StepTime(dict.fromkeys(PHASES, t / 4), dict.fromkeys(PHASES, t / 2)) for t in totals]
        kept = {"samples_per_step": 11, "peak_bytes": 1000, "head_parameters": 9, "flops": 3e12}
        return {"steps": steps, "log_share": 0.1} | kept

    plain = [measured(1.0, 1.0, 1.0), measured(2.0, 2.0, 2.0)]
    other = [measured(1.1, 1.1, 40.0), measured(2.2, 2.2, 2.2)]
    found = summarise(other, plain, most_flops=10e12)
    assert (found["ratio"], found["cpu_ratio"]) == pytest.approx((1.1, 1.1))
    assert found["ratio_range"] == pytest.approx([1.1, 1.1]) and found["peak_memory_bytes"] == 1000
    assert found["step_seconds"] == pytest.approx(2.2) and found["step_cpu_seconds"] == pytest.approx(4.4)
    assert found["phase_seconds"]["data"] == pytest.approx(0.55)
    assert found["samples_per_second"] == pytest.approx(11 / 2.2)
    assert found["mfu"] == pytest.approx(3 / 2.2 / 10)
    circumstances = {"samples_per_step": 11, "device": "cpu", "precision": "32", "steps": 3, "rounds": 2}
    shown = table(circumstances | {"variants": [{"name": "C"} | found]})
    cells = dict(shown.lines)
    assert cells["step, ms"] == "2200.0" and cells["data, ms"] == "550.0 (25 %)"


def test_steps_that_log_count_as_often_as_they_come() -> None:
    """Nine steps of 1 s for one of 3 s are 1.2 s a step, however many of each were timed."""
    steps = [StepTime({"forward": 3.0 if logs else 1.0}, {}, logs) for logs in (False, True, False, True, False)]
    assert typical(steps, 0.1, "wall", "forward") == pytest.approx(1.2)
    assert typical(steps[:1], 0.1, "wall", "forward") == 1.0
    assert typical(steps[1:2], 0.1, "wall", "forward") == 3.0


def test_answering_and_drawing_are_timed_with_and_without_caches(tmp_path, capsys) -> None:
    out = tmp_path / "inference.json"
    few = ["--new_tokens", "4", "--prompt_tokens", "4", "--rounds", "1"]
    assert main(["bench", "inference", "--config", "configs/harmon/scenes32.yaml", *few, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert list(result) == ["answering, tokens/s", "drawing, images/s"]
    assert all(own["ratio"] == pytest.approx(own["cached"] / own["uncached"]) for own in result.values())
    assert "with cache" in capsys.readouterr().out


def test_a_slower_job_has_its_ratio(monkeypatch) -> None:
    """A clock of our own: the job takes 1 s with its cache and 6 without, but 60 in the second of three rounds."""
    clock, jobs = [0.0], itertools.count()

    def job(use_cache: bool) -> None:
        place = next(jobs)
        clock[0] += 1.0 if use_cache else 60.0 if place == 4 else 6.0

    monkeypatch.setattr(inference_command, "perf_counter", lambda: clock[0])
    found = compare_caches(job, amount=5, rounds=3, name="job")
    assert found == {"cached": 5.0, "uncached": pytest.approx(5 / 6), "ratio": 6.0}


def test_a_drawing_is_timed_until_its_images_are_here() -> None:
    """A card computes behind the program's back, and would be timed in the next job."""
    model, fetched = TinyModule().build_base().eval(), []
    model.generate = lambda prompts, use_cache: SimpleNamespace(cpu=lambda: fetched.append((len(prompts), use_cache)))
    drawing(model, batch_size=2, prompt_tokens=4)(True)
    assert fetched == [(2, True)]


def test_an_answer_does_not_end_while_it_is_timed() -> None:
    model = TinyModule().build_base().eval()
    end = model.processor.end_id
    with never_ending(model):
        assert model.processor.end_id not in range(448)
    assert model.processor.end_id == end


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "--steps", "0"], "steps"),
        (["bench", "--rounds", "x"], "rounds"),
        (["bench", "--trainer.max_stepss", "3"], "max_stepss"),
        (["bench", "inference", "--batch_size", "-1"], "batch_size"),
        (
            ["bench", "inferense"],
            "there is no bench 'inferense' (there are",
        ),
    ],
)
def test_a_mistake_is_a_sentence(config, arguments, said, capsys) -> None:
    assert cli.main([*arguments, "--config", config]) == 2
    assert said in capsys.readouterr().err


def test_helps_are_different(capsys) -> None:
    for arguments, own in ((["bench"], "--warmup"), (["bench", "inference"], "--new_tokens")):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--help"])
        assert stopped.value.code == 0 and own in capsys.readouterr().out


def test_the_functions_refuse_what_fit_refuses(config) -> None:
    with pytest.raises(SettingsError, match="accelerator"):
        bench_inference(["--config", config, "--trainer.accelerator=abacus"])


def test_evaluate_times_the_same_answers_both_ways(folders, tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    options = ["--images", "2", "--questions", "3", "--drawn", "2", "--batch_size", "4", "--out", str(out)]
    assert main(["bench", "evaluate", "--model", str(folders["harmon"]), *options]) == 0
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert result["answers_that_agree"] == 1 and result["images_per_second"] > 0
    ratio = result["answers_per_second"] / result["answers_per_second_encoding_anew"]
    assert abs(result["gain"] / ratio - 1) < 1e-9
