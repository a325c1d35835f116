"""The DataModule inside Lightning: both branches, exact resume, validation, configuration."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from stand_ins import Numbers, Recorder, StandInProcessor, as_shard, data, fit, make_trainer

from infotok_lit.data.datamodule import UnifiedDataModule
from infotok_lit.data.image_text import ImageTextFolder
from infotok_lit.errors import SettingsError

PHOTOS = Path(__file__).parents[1] / "fixtures" / "photos"

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*No validation data.*", "ignore:.*LeafSpec.*"
)


@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (0, 2), (2, 1), (2, 2)])
def test_resuming_continues_with_the_same_samples(tmp_path, workers, accumulate):
    def run(max_steps, resume=None):
        module = data(num_workers=workers)
        settings = {"max_steps": max_steps, "accumulate_grad_batches": accumulate, "val_check_interval": 4}
        return fit(tmp_path, module, resume, **settings)

    whole = run(7).steps
    first = run(4).steps
    resumed = run(7, resume=str(tmp_path / "end.ckpt")).steps
    assert len(whole) == 7 * accumulate and len(first) == 4 * accumulate
    assert first + resumed == whole
    # 3 of 11 samples per batch: within the first pass no sample is seen twice, so the stream really advances.
    assert len({name for read, _, _ in whole[:3] for name in read}) == 9


def test_resuming_in_the_middle_of_an_accumulation(tmp_path):
    """A checkpoint taken between two optimiser steps, as on an exception, neither repeats nor leaves out samples."""

    class Saver(Callback):
        def on_train_batch_end(self, trainer, *arguments) -> None:
            if trainer.fit_loop.total_batch_idx == 4:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    recorder = Recorder()
    trainer = make_trainer(str(tmp_path), max_steps=4, accumulate_grad_batches=3, limit_val_batches=0)
    trainer.callbacks.append(Saver())
    trainer.fit(recorder, datamodule=data())
    resumed = fit(tmp_path, data(), str(tmp_path / "middle.ckpt"), max_steps=4, accumulate_grad_batches=3)
    assert len(recorder.steps) == 12
    assert resumed.steps == recorder.steps[5:]


class Labels(StandInProcessor):
    """Number i has i mod 5 labels."""

    def understanding(self, samples, skipped=()):
        batch = super().understanding(samples, skipped)
        counts = torch.tensor([int(sample.name) % 5 for sample in samples])
        return batch._replace(labels=torch.where(torch.arange(6) <= counts[:, None], 1, -100))


@pytest.mark.parametrize("workers", [0, 2])
def test_each_batch_knows_how_many_labels_its_step_has(tmp_path, workers):
    """Also where a run goes on in the middle of a step, whose first batches are lost."""

    class Counts(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            read = batch["understanding"]
            self.seen.append((sum(int(name) % 5 for name in read.names), read.step_labels))

        def on_train_batch_end(self, trainer, *arguments) -> None:
            if trainer.fit_loop.total_batch_idx == 4:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    def run(resume=None):
        counts, recorder = Counts(), Recorder()
        recorder.base.processor = Labels()
        trainer = make_trainer(str(tmp_path), max_steps=4, accumulate_grad_batches=3, limit_val_batches=0)
        trainer.callbacks.append(counts)
        trainer.fit(recorder, datamodule=data(num_workers=workers), ckpt_path=resume, weights_only=True)
        return counts.seen

    whole, resumed = run(), run(str(tmp_path / "middle.ckpt"))
    own = [labels for labels, _ in whole]
    means = [sum(own[first : first + 3]) / 3 for first in range(0, 12, 3)]
    assert len(set(own)) > 3
    assert [of_step for _, of_step in whole] == [mean for mean in means for _ in range(3)]
    assert resumed == [(own[5], own[5]), *whole[6:]]


def test_a_run_cut_into_epochs_sees_the_same_stream(tmp_path):
    whole = fit(tmp_path, data(), max_steps=6, limit_val_batches=0).steps
    epochs = fit(
        tmp_path, data(), max_steps=6, limit_train_batches=2, check_val_every_n_epoch=1, val_check_interval=1.0
    )
    assert epochs.steps == whole
    assert len(epochs.validated) == 3 * 2


def test_resuming_with_another_batch_size_goes_on_where_it_was_and_says_so(tmp_path):
    def positions(steps, which):
        return [name for step in steps for name in step[which]]

    whole = fit(tmp_path, data(), max_steps=8).steps
    first = fit(tmp_path, data(), max_steps=4).steps
    with pytest.warns(UserWarning, match=r"batch sizes changed from .*'understanding': 3.* to .*'understanding': 2"):
        resumed = fit(
            tmp_path, data(understanding_batch_size=2), str(tmp_path / "end.ckpt"), max_steps=10, limit_val_batches=0
        ).steps
    for which in (0, 1):
        assert positions(first + resumed, which)[:24] == positions(whole, which)[:24]


@pytest.mark.parametrize(
    ("changed", "message"), [({"seed": 1}, "seed changed from 0 .* to 1"), ({"length": 12}, "sizes changed from")]
)
def test_changes_on_resume_are_warned_about(tmp_path, changed, message):
    fit(tmp_path, data(), max_steps=2)
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path, data(**changed), str(tmp_path / "end.ckpt"), max_steps=3)


def test_an_unchanged_resume_is_not_warned_about(tmp_path):
    fit(tmp_path, data(), max_steps=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, data(), str(tmp_path / "end.ckpt"), max_steps=3)
    assert not [warning for warning in caught if "changed from" in str(warning.message)]


def test_a_second_fit_starts_anew(tmp_path):
    fit(tmp_path, data(), max_steps=3)
    module = data(understanding_batch_size=2)
    with pytest.warns(UserWarning, match=r"batch sizes changed"):
        fit(tmp_path, module, str(tmp_path / "end.ckpt"), max_steps=5)
    again = fit(tmp_path, module, max_steps=5).steps
    assert again == fit(tmp_path, data(understanding_batch_size=2), max_steps=5).steps


def test_loaders_leave_the_global_random_numbers_alone(tmp_path):
    """Otherwise a run that validates, or resumes, would draw other noise than one that does not."""
    noise = [
        fit(tmp_path, data(num_workers=workers), max_steps=6, **settings).noise
        for workers in (0, 2)
        for settings in ({}, {"limit_val_batches": 0}, {"num_sanity_val_steps": 1})
    ]
    assert len(noise[0]) == 6 and all(numbers == noise[0] for numbers in noise)


def test_branches_draw_apart_and_prompts_are_dropped(tmp_path):
    steps = fit(tmp_path, data(prompt_dropout=1.0), max_steps=3).steps
    assert all(texts[3:] == [""] * 4 for _, _, texts in steps)
    read, drawn = ([name for step in steps for name in step[which]][:9] for which in (0, 1))
    assert read != drawn


def test_own_source_for_drawing(tmp_path):
    steps = fit(tmp_path, data(generation_train=Numbers(1)), max_steps=2).steps
    assert {name for _, drawn, _ in steps for name in drawn} == {"0"}
    assert {name for read, _, _ in steps for name in read} > {"0"}


def test_validation_is_finite_fixed_and_not_dropped(tmp_path):
    module = data(val=Numbers(20), val_batch_size=4, val_samples=10, prompt_dropout=1.0)
    recorder = fit(tmp_path, module, max_steps=4)
    once = [(branch, [str(i) for i in range(first, min(first + 4, 10))]) for branch in (0, 1) for first in (0, 4, 8)]
    assert recorder.validated == once * 2
    assert len(recorder.val_captions) == 20 and all(recorder.val_captions)


@pytest.mark.parametrize(
    ("val", "generation_val", "warned"),
    [(None, None, "understanding and generation"), (Numbers(5), None, None), (None, Numbers(5), "understanding")],
)
def test_validating_on_training_data_is_warned_about(val, generation_val, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data(val=val, generation_val=generation_val).setup("fit")
    said = [str(warning.message) for warning in caught if "No validation data" in str(warning.message)]
    assert len(said) == (warned is not None)
    assert all(f"No validation data for {warned}: " in message for message in said)


@pytest.mark.parametrize("processes", [2])
def test_two_processes_share_training_and_validation(tmp_path, processes):
    class Writer(Recorder):
        def on_train_end(self) -> None:
            text = json.dumps({"steps": self.steps, "validated": self.validated})
            (tmp_path / f"{self.global_rank}.json").write_text(text)

    settings = {"devices": processes, "strategy": "ddp_fork", "max_steps": 3}
    trainer = make_trainer(str(tmp_path), check_val_every_n_epoch=None, val_check_interval=3, **settings)
    trainer.fit(Writer(), datamodule=data(val=Numbers(9), val_batch_size=2))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(processes)]
    single = fit(tmp_path, data(understanding_batch_size=6, generation_batch_size=8), max_steps=3).steps
    for step, (read, drawn, _) in enumerate(single):
        for which, names in enumerate((read, drawn)):
            assert [name for rank in ranks for name in rank["steps"][step][which]] == names
    for branch in (0, 1):
        seen = [name for rank in ranks for index, names in rank["validated"] if index == branch for name in names]
        assert sorted(seen) == [str(i) for i in range(8)]


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"trainer.max_steps"):
        fit(tmp_path, data(), max_steps=-1, max_epochs=1)
    with pytest.raises(ValueError, match=r"overfit_batches"):
        fit(tmp_path, data(), overfit_batches=1)
    for wrong in (
        {"understanding_batch_size": 0},
        {"val_samples": 0},
        {"prompt_dropout": 1.5},
        {"max_broken_share": -0.1},
        {"seed": -1},
    ):
        with pytest.raises(ValueError, match=r"|".join([*wrong, "batch sizes"])):
            data(**wrong)


def test_a_share_is_kept_for_validation(tmp_path):
    photos = ImageTextFolder(str(PHOTOS / "annotations.json"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="No validation data")
        recorder = fit(tmp_path, UnifiedDataModule(photos, val_share=0.2, val_batch_size=2), max_steps=2)
    trained = {name for read, drawn, _ in recorder.steps for name in read + drawn}
    validated = {name for _, names in recorder.validated for name in names}
    assert (len(trained), len(validated)) == (10, 3) and not trained & validated
    with pytest.raises(ValueError, match="Numbers cannot be split"):
        data(val_share=0.2)
    assert UnifiedDataModule(Numbers(), val=Numbers(), val_share=0.2), "there is validation data: nothing to split"


def test_data_that_was_never_connected_says_what_to_call(tmp_path):
    class Unconnected(Recorder):
        def setup(self, stage: str) -> None:
            pass

    with pytest.raises(SettingsError, match=r"call UnifiedDataModule.connect\(processor, hard_negatives\)"):
        make_trainer(str(tmp_path)).fit(Unconnected(), datamodule=data())


@pytest.mark.filterwarnings("ignore:Numbers knows no hard negatives")
def test_it_takes_nothing_from_the_module_that_it_was_not_handed(tmp_path):
    asked = []

    class Other(Recorder):
        def setup(self, stage: str) -> None:
            del self.base.processor
            self.trainer.datamodule.connect(lambda: asked.append(stage) or StandInProcessor(), {"generation": 2})

    recorder = Other()
    make_trainer(str(tmp_path), max_steps=2, limit_val_batches=0).fit(recorder, datamodule=data())
    assert len(recorder.steps) == 2 and set(asked) == {"fit"}


def test_a_branch_without_data_is_refused(tmp_path):
    rows = [{"image": "a.jpg", "question": "q", "answer": "a"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r'none of its 1 rows can train generation, which needs .*"caption"'):
        UnifiedDataModule(ImageTextFolder(str(tmp_path / "rows.json")))
    UnifiedDataModule(ImageTextFolder(str(tmp_path / "rows.json")), generation_train=Numbers())


def test_configured_by_class_path(tmp_path):
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(UnifiedDataModule, "data")
    config = {
        "train": {
            "class_path": "infotok_lit.data.ImageTextFolder",
            "init_args": {"annotations": str(PHOTOS / "annotations.json"), "min_side": 30},
        },
        "generation_train": {
            "class_path": "infotok_lit.data.ImageTextShards",
            "init_args": {"shards": [str(as_shard_of_photos(tmp_path))], "cache": str(tmp_path / "cache")},
        },
        "seed": 3,
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": config}))
    module = parser.instantiate(
        parser.parse_args(["--config", str(tmp_path / "data.yaml"), "--data.val_samples=5"])
    ).data
    assert fit(tmp_path, module, max_steps=1).steps[0][0][0].endswith(")")


def as_shard_of_photos(folder: Path) -> Path:
    shutil.copytree(PHOTOS, folder / "all")
    return as_shard(folder / "all")
