"""A part of a benchmark during training: what is compared, what is warned about, and that training goes on alike."""

import json
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from evaluation.judge_server import Server, fails, says
from fit_with import events, fit
from tiny import TinyModule, scenes_data

from infotok_lit.callbacks import TradeOff, WeightAverage
from infotok_lit.callbacks.history import RunResult
from infotok_lit.errors import ExplainedError, SettingsError
from infotok_lit.evaluation.catalogue import Options, make_benchmarks
from infotok_lit.evaluation.models import OwnModel
from infotok_lit.evaluation.results import change
from infotok_lit.modules.average import AVERAGE
from infotok_lit.study.record import read_curves


def trade_off(**options) -> TradeOff:
    return TradeOff(**{"every_n_steps": 2, "limit": 6} | options)


def falling(monkeypatch, from_step: int) -> None:
    """All answers are right until a step, and wrong from it on."""
    scenes = make_benchmarks(["scenes32"], Options())[0].scenes
    samples = [scenes.sample("understanding", number) for number in range(300)]
    truths = {(sample.image.tobytes(), sample.question): sample.answer for sample in samples}

    def answer(self, images, questions, max_new_tokens):
        wrong = int(self.name.split()[-1]) >= from_step
        asked = zip(images, questions, strict=True)
        return ["nonsense" if wrong else truths[image.tobytes(), question] for image, question in asked]

    monkeypatch.setattr(OwnModel, "answer", answer)


def test_a_task_that_falls_is_warned_about_in_words(tmp_path, monkeypatch):
    falling(monkeypatch, from_step=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(tmp_path, [trade_off(), RunResult()], steps=4)
    told = [str(warning.message) for warning in caught if "has become worse" in str(warning.message)]
    assert len(told) == 1 and told[0].startswith("step 4: ") and "scenes32 understanding" in told[0]
    assert "to 0.000" in told[0] and "optimiser.lr" in told[0]
    scalars = events(trainer)
    logged = {tag: [(event.step, event.value) for event in scalars.Scalars(tag)] for tag in scalars.Tags()["scalars"]}
    steps, values = zip(*logged["benchmark/scenes32/understanding"], strict=True)
    assert steps == (0, 2, 4) and values == (1, 1, 0)
    assert logged["benchmark/scenes32/understanding_change"][-1] == (4, -1)
    # Where a study reads them.
    curves = read_curves(Path(trainer.log_dir))
    assert curves["benchmark/scenes32/understanding"] == {0: 1, 2: 1, 4: 0}
    assert curves["benchmark/scenes32/understanding_change"] == {0: 0, 2: 0, 4: -1}
    folders = sorted(path.name for path in (Path(trainer.log_dir) / "benchmarks").iterdir())
    assert folders == ["step_0000000", "step_0000002", "step_0000004"]


def test_training_is_not_disturbed_and_a_resumed_run_compares_with_step_0(tmp_path, monkeypatch):
    falling(monkeypatch, from_step=3)
    plain, watched = TinyModule(), TinyModule()
    fit(tmp_path / "plain", [], plain, steps=4)
    trainer = fit(tmp_path / "watched", [trade_off()], watched, steps=4)
    for name, value in plain.base.state_dict().items():
        assert torch.equal(value, watched.base.state_dict()[name]), name
    checkpoint = next(Path(trainer.log_dir).rglob("*step=2.ckpt"))
    callback = trade_off()
    with pytest.warns(UserWarning, match="step 4: a task has become worse since step 0"):
        fit(tmp_path / "resumed", [callback], TinyModule(), steps=4, checkpoint=checkpoint)
    assert callback.before["scenes32"] == json.loads(json.dumps(callback.before["scenes32"]))


class Averages(pl.Callback):
    """Notes the average where TradeOff measures."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        averages = pl_module.get_submodule(AVERAGE).named_buffers()
        self.seen.append({name: average.clone() for name, average in averages})

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.on_train_start(trainer, pl_module)


class Weights(TradeOff):
    """Notes the weights that it is to measure."""

    def __init__(self):
        super().__init__(every_n_steps=1)
        self.seen = []

    def _rows(self, trainer, pl_module, *_):
        self.seen.append({name: weight.detach().clone() for name, weight in pl_module.named_parameters()})
        return []


@pytest.mark.parametrize("last", [False, True], ids=["before", "after"])
def test_the_average_is_measured_and_training_goes_on_with_the_weights(tmp_path, monkeypatch, last):
    """Wherever it stands in the list of callbacks."""
    monkeypatch.setattr("infotok_lit.callbacks.trade_off.change", lambda *_: {})
    notes, states = (Averages(), Weights()), []
    for note in notes:
        callbacks = [WeightAverage(0.6, 4), note]
        trainer = fit(tmp_path, callbacks if last else callbacks[::-1], TinyModule(lr=0.01), steps=3)
        states.append(trainer.lightning_module.state_dict())
    for averages, weights in zip(*(note.seen for note in notes), strict=True):
        assert all(torch.equal(weights[name], average) for name, average in averages.items())
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


def test_answers_of_an_earlier_run_in_the_same_folder_are_not_taken_for_this_ones(tmp_path):
    """A logger whose version is set, or whose folder is not the run's alone."""

    class Other(TinyModule):
        def build_base(self):
            base = super().build_base()
            for parameter in base.parameters():
                parameter.data += 0.3 * torch.randn_like(parameter)
            return base

    found = {}
    for folder, module in (("shared", TinyModule()), ("shared", Other()), ("own", Other())):
        callback = trade_off()
        logger = pl.loggers.TensorBoardLogger(tmp_path, folder, "")
        fit(tmp_path, [callback], module, steps=2, logger=logger)
        found[folder] = [row["answer"] for row in callback.before["scenes32"] if "answer" in row]
    assert found["shared"] == found["own"]


def test_the_last_step_is_compared_whatever_ends_the_run(tmp_path):
    class Enough(pl.Callback):
        def on_train_batch_end(self, trainer, *arguments):
            trainer.should_stop = trainer.global_step == 3

    trainer = fit(tmp_path, [trade_off(), Enough()], steps=10)
    assert trainer.global_step == 3
    steps = [event.step for event in events(trainer).Scalars("benchmark/scenes32/understanding")]
    assert steps == [0, 2, 3]


def test_validate_measures_once(tmp_path):
    trainer = pl.Trainer(
        accelerator="cpu", logger=pl.loggers.CSVLogger(tmp_path), enable_progress_bar=False, callbacks=[trade_off()]
    )
    trainer.validate(TinyModule(), scenes_data(val_samples=4), verbose=False)
    trainer.logger.save()
    header = (Path(trainer.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert "benchmark/scenes32/understanding" in header.split(",")


def test_the_error_of_a_change_leaves_out_what_both_runs_share():
    """Of twelve answers one has changed, and only that counts."""
    benchmark = make_benchmarks(["scenes32"], Options())[0]
    before = [{"group": str(n), "score": float(n % 2), "part": "understanding/size"} for n in range(12)]
    now = [row | {"score": 1.0} if row["group"] == "0" else row for row in before]
    moved = change(benchmark, before, now)["understanding"]
    assert moved.value == pytest.approx(1 / 12)
    # s / sqrt(n) of one 1 and eleven 0.
    assert moved.error == pytest.approx((1 / 12 * 11 / 12 * 12 / 11) ** 0.5 / 12**0.5)
    assert change(benchmark, before, before)["understanding"] == (0, 0)


def test_a_judge_that_breaks_down_costs_scores_and_not_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("infotok_lit.callbacks.trade_off.JUDGE_TRIES", 1)
    server = Server()
    server.behaviours = [says('{"correct": 1}')] * 3 + [says('{"correct": 0}'), fails(500)]
    options = {"benchmarks": ("geneval++",), "limit": 3, "judge": server.endpoint.url, "judge_model": "judge-1"}
    with pytest.warns(UserWarning, match="2 of 3 rows have no verdict"):
        trainer = fit(tmp_path, [trade_off(**options)], steps=2)
    server.server.shutdown()
    assert trainer.global_step == 2 and len(server.calls) == 6
    found = [(event.step, event.value) for event in events(trainer).Scalars("benchmark/geneval++/overall")]
    assert found == [(0, 1), (2, 0)]


def test_mistakes_are_said_at_once():
    with pytest.raises(SettingsError, match="limit 2 or more"):
        TradeOff(limit=1)
    with pytest.raises(SettingsError, match="which model judges"):
        TradeOff(judge="http://localhost/v1")
    with pytest.raises(SettingsError, match="did you mean geneval"):
        TradeOff(benchmarks=("genevall",))
    with pytest.raises(ExplainedError, match="mme: the files do not ship"):
        TradeOff(benchmarks=("mme",)).setup(pl.Trainer(accelerator="cpu", logger=False), TinyModule(), "fit")
