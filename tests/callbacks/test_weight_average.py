"""The moving average of the weights: its formula, what sees it, resuming, and several processes."""

from pathlib import Path

import average_in_two_processes
import lightning.pytorch as pl
import pytest
import torch
from fit_with import fit
from forked import run_forked
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from tiny import TinyModule

from infotok_lit.callbacks import ExportInference, WeightAverage
from infotok_lit.checkpoints import CheckpointError, read_run
from infotok_lit.errors import SettingsError
from infotok_lit.models.family import load_folder
from infotok_lit.modules.average import AVERAGE
from infotok_lit.modules.base_model import base_weights, rebuild_base
from infotok_lit.modules.lora import LoraConfig

DECAY, WARMUP = 0.6, 4
State = dict[str, torch.Tensor]


class Watch(pl.Callback):
    """The trained weights before and after every step, and those that validation sees."""

    def __init__(self) -> None:
        self.steps: list[State] = []
        self.last = 0
        self.validated: list[State] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        if not self.steps:
            self.last = trainer.global_step
            self.steps.append(trained(pl_module))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step > self.last:
            self.last = trainer.global_step
            self.steps.append(trained(pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated.append(trained(pl_module))


def trained(module: torch.nn.Module) -> State:
    return {name: weight.detach().clone() for name, weight in module.named_parameters() if weight.requires_grad}


def closed_form(steps: list[State]) -> State:
    """sum_n (1 - d_n) prod_{m > n} d_m w_n, the initial weights with what is left: the recursion written out."""
    decays = [min(DECAY, (1 + n) / (WARMUP + n)) for n in range(len(steps) - 1)]
    shares = [1.0 if n == 0 else 1 - decays[n - 1] for n in range(len(steps))]
    kept = [torch.tensor(decays[n:], dtype=torch.float64).prod().item() for n in range(len(steps))]
    return {
        name: sum(share * left * step[name].double() for share, left, step in zip(shares, kept, steps, strict=True))
        for name in steps[0]
    }


def assert_near(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=0, atol=1e-6)


def checkpoint_of(trainer: pl.Trainer, step: int) -> Path:
    return Path(trainer.log_dir, "checkpoints", f"epoch=0-step={step}.ckpt")


def train(folder: Path, steps: int = 4, checkpoint: Path | None = None, **options: object) -> tuple:
    average, watch = WeightAverage(DECAY, WARMUP, **options), Watch()
    trainer = fit(folder, [average, watch], TinyModule(lr=0.01), steps, checkpoint)
    return trainer, average, watch


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[pl.Trainer, WeightAverage, Watch]:
    return train(tmp_path_factory.mktemp("run"))


def test_it_is_the_closed_form_of_all_trained_weights_and_of_no_other(run) -> None:
    trainer, average, watch = run
    state = read_run(checkpoint_of(trainer, 4))["state_dict"]
    averages = {name.removeprefix(f"{AVERAGE}."): value for name, value in state.items() if name.startswith(AVERAGE)}
    assert average.updates == 4
    assert any(name.startswith("infotok.") for name in averages)
    assert_near(averages, closed_form(watch.steps))
    assert_near({name: state[name] for name in averages}, watch.steps[-1])


def test_validation_sees_the_average_and_training_never_does(run, tmp_path) -> None:
    _, _, watch = run
    plain = Watch()
    fit(tmp_path, [plain], TinyModule(lr=0.01))
    for found, wanted in zip(watch.steps, plain.steps, strict=True):
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
    before, middle, end = watch.validated
    assert_near(before, watch.steps[0])
    assert_near(middle, closed_form(watch.steps[:3]))
    assert_near(end, closed_form(watch.steps))
    assert any((end[name] - value).abs().max() > 1e-3 for name, value in watch.steps[-1].items())


def test_the_run_leaves_the_average_unless_validation_is_about_the_weights(run, tmp_path) -> None:
    trainer, _, watch = run
    assert_near(trained(trainer.lightning_module), closed_form(watch.steps))
    trainer, _, watch = train(tmp_path, steps=2, validate=False)
    assert_near(trained(trainer.lightning_module), watch.steps[-1])
    assert_near(watch.validated[-1], watch.steps[-1])


@pytest.mark.parametrize("weights", ["averaged", "raw"])
def test_an_export_of_either_does_not_change_what_the_run_leaves(tmp_path, weights) -> None:
    for validate in (True, False):
        watch = Watch()
        export = ExportInference(folder=str(tmp_path / f"export_{validate}"), weights=weights)
        callbacks = [WeightAverage(DECAY, WARMUP, validate=validate), export, watch]
        trainer = fit(tmp_path / str(validate), callbacks, TinyModule(lr=0.01), 2)
        wanted = {True: closed_form(watch.steps), False: watch.steps[-1]}
        assert_near(trained(trainer.lightning_module), wanted[validate])
        exported, own = load_folder(export.written), wanted[weights == "averaged"]
        assert_near(trained(exported), {name: own[f"base.{name}"] for name in trained(exported)})


def test_resuming_is_exact(run, tmp_path) -> None:
    whole, _, _ = run
    again, average, _ = train(tmp_path / "again", checkpoint=checkpoint_of(whole, 2))
    assert average.updates == 4
    found, wanted = (read_run(checkpoint_of(trainer, 4))["state_dict"] for trainer in (again, whole))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_batches_that_only_accumulate_update_nothing(tmp_path) -> None:
    average, watch = WeightAverage(DECAY, WARMUP), Watch()
    fit(tmp_path, [average, watch], TinyModule(lr=0.01), steps=2, accumulate_grad_batches=3, val_check_interval=6)
    assert average.updates == 2
    assert_near(watch.validated[-1], closed_form(watch.steps))


def test_a_second_module_has_an_average_of_its_own(tmp_path) -> None:
    """The callback of an earlier fit, which left its average shown."""
    average = WeightAverage(DECAY, WARMUP)
    fit(tmp_path / "first", [average], TinyModule(lr=0.01, family="showo2"), 2)
    watch = Watch()
    trainer = fit(tmp_path / "second", [average, watch], TinyModule(lr=0.01), 2)
    assert average.updates == 2
    assert_near(trained(trainer.lightning_module), closed_form(watch.steps))


def test_updates_may_be_rare(tmp_path) -> None:
    _, average, watch = train(tmp_path, every_n_steps=2)
    assert average.updates == 2
    assert_near(watch.validated[-1], closed_form(watch.steps[::2]))


def test_adapters_are_averaged_and_then_merged(tmp_path) -> None:
    watch = Watch()
    module = TinyModule(lr=0.01, freeze=("llm.",), lora=LoraConfig(("llm.model.layers.0.mlp.*",), rank=2))
    trainer = fit(tmp_path, [WeightAverage(DECAY, WARMUP), watch], module)
    checkpoint = read_run(checkpoint_of(trainer, 4))
    layer, average = "llm.model.layers.0.mlp.up_proj", closed_form(watch.steps)
    down, up = (average[f"base.{layer}.lora_{matrix}.default.weight"] for matrix in "AB")
    wanted = checkpoint["state_dict"][f"base.{layer}.base_layer.weight"] + 32 / 2 * up @ down
    torch.testing.assert_close(rebuild_base(checkpoint).get_parameter(f"{layer}.weight").double(), wanted.double())
    assert len([name for name in checkpoint["state_dict"] if name.startswith(AVERAGE)]) == len(average)


def test_what_is_saved_while_the_average_is_shown_has_weights_under_their_names(tmp_path) -> None:
    watch = Watch()
    average = WeightAverage(DECAY, WARMUP)
    trainer = fit(tmp_path, [average, watch], TinyModule(lr=0.01), 2)
    assert average.shown
    trainer.save_checkpoint(tmp_path / "now.ckpt")
    checkpoint = read_run(tmp_path / "now.ckpt")
    for weights, wanted in {"raw": watch.steps[-1], "averaged": closed_form(watch.steps)}.items():
        found = base_weights(checkpoint, weights)
        assert_near(found, {name: wanted.get(f"base.{name}", value) for name, value in found.items()})
        # The tied head has no average of its own.
        assert torch.equal(found["llm.lm_head.weight"], found["llm.model.embed_tokens.weight"])


def test_what_is_loaded_while_the_average_is_shown_goes_where_it_belongs(tmp_path) -> None:
    """A trainer that has fitted validates an earlier checkpoint, and then trains on from it."""
    trainer, average, watch = train(tmp_path)
    module, data, earlier = trainer.lightning_module, trainer.datamodule, checkpoint_of(trainer, 2)
    wanted = {name: value.clone() for name, value in module.state_dict().items()}
    assert average.shown
    trainer.validate(module, data, ckpt_path=earlier, verbose=False)
    assert_near(watch.validated[-1], closed_form(watch.steps[:3]))
    trainer.fit(module, data, ckpt_path=earlier)
    found = module.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_run_without_an_average_goes_on_with_one_that_begins_there(tmp_path) -> None:
    first = fit(tmp_path / "plain", [], TinyModule(lr=0.01), 2)
    with pytest.warns(UserWarning, match="begins as the weights there"):
        _, average, watch = train(tmp_path / "averaged", checkpoint=checkpoint_of(first, 2))
    assert average.updates == 2
    assert_near(watch.validated[-1], closed_form(watch.steps))


def test_a_run_with_an_average_does_not_go_on_without(run, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="--config trainer/weight_average"):
        fit(tmp_path, [], TinyModule(lr=0.01), checkpoint=checkpoint_of(run[0], 2))


@pytest.mark.parametrize("wrong", [{"decay": 1.0}, {"decay": -0.1}, {"warmup": 0}, {"every_n_steps": 0}])
def test_settings_that_average_nothing_are_refused(wrong) -> None:
    with pytest.raises(SettingsError, match="WeightAverage"):
        WeightAverage(**wrong)


@pytest.mark.parametrize("batches", [0, 1])
def test_a_module_that_keeps_no_average_is_refused_by_name(tmp_path, batches) -> None:
    """Before the first step, whether a validation comes first or not."""
    with pytest.raises(SettingsError, match="BoringModel keeps no average"):
        fit(tmp_path, [WeightAverage()], BoringModel(), data=BoringDataModule(), num_sanity_val_steps=batches)


@pytest.fixture(scope="module")
def distributed(tmp_path_factory) -> Path:
    """What one process left, and two, replicated and sharded."""
    folder = tmp_path_factory.mktemp("distributed")
    average_in_two_processes.run(folder, "alone", "auto")
    run_forked(average_in_two_processes.one_of_two, 2, folder)
    return folder


@pytest.mark.parametrize("strategy", ["replicated", "sharded", "resumed"])
def test_two_processes_have_the_average_of_one(distributed, strategy) -> None:
    found, wanted = (torch.load(distributed / f"{name}.pt", weights_only=True) for name in (strategy, "alone"))
    assert_near(found["average"], wanted["average"])
    assert_near(found["validated"], wanted["validated"])
    assert found["updates"] == wanted["updates"] == 4


def test_a_sharded_average_is_a_share_on_each_process(distributed) -> None:
    sizes = {name: torch.load(distributed / f"{name}.pt", weights_only=True)["local"] for name in ("alone", "sharded")}
    assert sizes["sharded"] <= 0.55 * sizes["alone"]
