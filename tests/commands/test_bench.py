"""`bench`: all variants on equal terms, and numbers that belong together."""

import json

import pytest
import torch

from infotok_lit.commands.bench import main, summarise, table, term_sets
from infotok_lit.commands.fit_setup import DRAWN_STEPS, FitSetup
from infotok_lit.commands.step_timing import PHASES, StepTime, StepTimer, Variant

NAMES = ["plain", "C", "C&S", "C&S&A"]
SMALL = {
    "seed_everything": 0,
    "model": {"class_path": "tiny.TinyModule", "init_args": {"terms": ["compactness", "alignment"]}},
    "data": {
        "class_path": "infotok_lit.data.UnifiedDataModule",
        "init_args": {
            "train": {"class_path": "infotok_lit.scenes.Scenes", "init_args": {"num_samples": 100}},
            "understanding_batch_size": 3,
            "generation_batch_size": 2,
        },
    },
    "trainer": {"accelerator": "cpu", "max_steps": 5, "max_epochs": 1, "gradient_clip_val": 1.0},
    "ckpt_path": None,
    "weights_only": None,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    """A small fit configuration with everything that a run's own config.yaml holds."""
    path = tmp_path_factory.mktemp("bench") / "config.yaml"
    path.write_text(json.dumps(SMALL))
    return str(path)


def test_every_variant_is_timed_and_compared_with_plain_fine_tuning(config, tmp_path, capsys) -> None:
    out = tmp_path / "new" / "bench.json"
    accumulate = ("--trainer.accumulate_grad_batches", "2")
    assert main(["bench", "--config", config, *accumulate, "--steps", "2", "--warmup", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    variants = result["variants"]
    assert [variant["name"] for variant in variants] == [*NAMES, "C&A"]
    assert result["samples_per_step"] == 2 * (3 + 2)
    for variant in variants:
        assert variant["step_seconds"] > 0
        assert variant["samples_per_second"] == pytest.approx(10 / variant["step_seconds"])
        assert all(seconds > 0 for seconds in variant["phase_seconds"].values())
        assert list(variant["phase_seconds"]) == list(PHASES)
        assert variant["peak_memory_bytes"] is None
    assert variants[0]["ratio"] == 1.0
    assert variants[0]["head_parameters"] == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*NAMES, "C&A", "ratio to plain"])


def test_the_configurations_own_terms_are_added_once() -> None:
    assert term_sets(("alignment", "sufficiency", "compactness")) == term_sets(())
    assert term_sets(("alignment",))[-1] == ("alignment",)
    assert len(term_sets(("alignment",))) == len(NAMES) + 1


@pytest.fixture(scope="module")
def timer(config) -> tuple[StepTimer, FitSetup, list[Variant], list]:
    setup = FitSetup(["--config", config])
    setup.connect()
    steps = setup.draw_steps(2)
    timer = StepTimer(setup.model, setup.trainer)
    return timer, setup, timer.build_variants(term_sets(()), steps[0]), steps


def test_variants_see_the_same_weights_batches_and_random_numbers(timer, monkeypatch) -> None:
    stepper, setup, variants, steps = timer
    before = {name: value.clone() for name, value in setup.model.base.state_dict().items()}
    losses: dict[str, list[float]] = {}
    original = setup.model.run_branch

    def watched(branch, batch):
        result = original(branch, batch)
        losses.setdefault(branch, []).append(result.task_loss.item())
        return result

    monkeypatch.setattr(setup.model, "run_branch", watched)
    for seed, batches in enumerate(steps):
        for variant in variants:
            stepper.step(variant, batches, seed)
    for values in losses.values():
        rounds = [values[i : i + len(variants)] for i in range(0, len(values), len(variants))]
        assert len(rounds) == 2 and rounds[0] != rounds[1]
        assert all(len(set(values)) == 1 for values in rounds)
    assert all(torch.equal(value, before[name]) for name, value in setup.model.base.state_dict().items())


def test_a_step_does_the_optimisers_work(timer) -> None:
    """The shared state of the base model moves with every variant's step, and each variant's heads have their own."""
    stepper, setup, variants, steps = timer
    weight = setup.model.base.encoder.token_embed.weight
    for variant in variants:
        heads = list(variant.heads.parameters())
        counted = float(variant.optimiser.state[weight]["step"])
        stepper.step(variant, steps[0], seed=0)
        assert float(variants[0].optimiser.state[weight]["step"]) == counted + 1
        assert all(variant.optimiser.state[p]["step"] > 0 for p in heads)
        expected = sum(4 * (3 * p.numel() + 1) for p in heads)
        assert variant.own_bytes() == expected


def test_the_objective_is_told_apart_from_the_base_model(timer) -> None:
    stepper, setup, variants, steps = timer
    plain, full = (
        min(stepper.step(v, steps[0], 0).phases["objective_forward"] for _ in range(5)) for v in variants[::3]
    )
    assert full > 10 * plain


def test_ratios_are_taken_round_by_round() -> None:
    """The second round is twice the work; the variant costs 10 % in each, and a hiccup in one does not show."""

    def times(*totals: float) -> list[StepTime]:
        return [StepTime(dict.fromkeys(PHASES, total / 4), peak_bytes=1000) for total in totals]

    heads = torch.nn.Linear(2, 3)
    plain = Variant((), torch.nn.Identity(), torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
    other = Variant(("compactness",), heads, torch.optim.AdamW(heads.parameters()))
    rows = summarise([plain, other], [times(1.0, 2.0, 4.0), times(1.1, 2.2, 40.0)], samples_per_step=11)
    assert [row["ratio"] for row in rows] == pytest.approx([1.0, 1.1])
    assert rows[1]["samples_per_second"] == pytest.approx(11 / 2.2)
    assert rows[1]["head_parameters"] == 9
    # A variant's peak is without what only the others hold: nine numbers of four bytes.
    assert [row["peak_memory_bytes"] for row in rows] == [1000 - 36, 1000]
    shown = table(
        {"variants": rows, "samples_per_step": 11, "device": "cpu", "precision": "32", "steps": 3, "warmup": 0}
    )
    assert [len(list(column.cells)) for column in shown.columns] == [10, 10, 10]


def test_few_batches_are_drawn_and_used_again(timer) -> None:
    _, setup, _, steps = timer
    assert len(steps) == 2
    assert len(setup.draw_steps(100)) == DRAWN_STEPS
    names = [batch["understanding"].names for step in setup.draw_steps(3) for batch in step]
    assert len({name for batch in names for name in batch}) == 9


def test_steps_have_the_precision_of_the_configuration(config) -> None:
    setup = FitSetup(["--config", config, "--trainer.precision", "bf16-mixed"])
    setup.connect()
    stepper = StepTimer(setup.model, setup.trainer)
    batches = setup.to_device(setup.draw_steps(1)[0])
    variants = stepper.build_variants(term_sets(()), batches)
    seen = []
    setup.model.base.encoder.token_embed.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    assert all(stepper.step(variant, batches, seed=0).total > 0 for variant in variants)
    assert set(seen) == {torch.bfloat16}


def test_a_mistake_in_the_configuration_is_a_sentence(config, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--config", config, "--trainer.max_steps", "-1"])
    assert "trainer.max_steps" in capsys.readouterr().err
