"""The order of samples, its sharing between processes, and the replacement of broken samples."""

from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import RunningStage
from stand_ins import Numbers, StandInProcessor, make_trainer
from torch.utils.data import DataLoader

from infotok_lit.batch import BrokenSampleError
from infotok_lit.data.stream import (
    BranchDataset,
    EndlessSampler,
    FixedSampler,
    Request,
    branch_length,
    collate,
)


def sampler(length: int = 7, size: int = 3, start: int = 0, world: int = 1, rank: int = 0, seed=(0, 0)):
    return EndlessSampler(length, size, seed, lambda: start, world, rank)


@pytest.mark.parametrize("length", [1, 7, 1000])
def test_each_pass_is_a_new_permutation(length):
    stream = list(islice(sampler(length), 3 * length))
    passes = [stream[i * length : (i + 1) * length] for i in range(3)]
    for epoch, requests in enumerate(passes):
        assert sorted(request.index for request in requests) == list(range(length))
        assert {request.epoch for request in requests} == {epoch}
    if length == 1000:
        first, second = ([request.index for request in requests] for requests in passes[:2])
        assert first != second and first != sorted(first)
        other = [request.index for request in islice(sampler(length, seed=(0, 1)), length)]
        assert other != first


@pytest.mark.parametrize(("world", "size"), [(2, 3), (4, 2), (3, 5)])
def test_ranks_partition_each_global_batch(world, size):
    whole = list(islice(sampler(size=1), 6 * world * size))
    shares = [list(islice(sampler(size=size, world=world, rank=rank), 6 * size)) for rank in range(world)]
    for step in range(6):
        batch = [request for share in shares for request in share[step * size : (step + 1) * size]]
        assert batch == whole[step * world * size : (step + 1) * world * size]


def test_starting_later_equals_skipping():
    whole = list(islice(sampler(), 60))
    for start in (0, 1, 7, 23):
        assert list(islice(sampler(start=start), 60 - start)) == whole[start:]


def test_the_stream_goes_on_with_another_number_of_processes():
    whole = list(islice(sampler(size=1), 36))
    first = [list(islice(sampler(size=3, world=2, rank=rank), 6)) for rank in range(2)]
    rest = [list(islice(sampler(size=2, world=3, rank=rank, start=12), 8)) for rank in range(3)]
    assert Counter(chain(*first, *rest)) == Counter(whole)


def test_a_million_samples_are_cheap():
    stream = list(islice(sampler(1_000_000, start=999_990), 100))
    assert [request.epoch for request in stream] == [0] * 10 + [1] * 90


def test_no_length():
    with pytest.raises(TypeError):
        len(DataLoader(Numbers(), sampler=sampler(), batch_size=3))


def test_lightning_replaces_neither_sampler(tmp_path):
    connector = make_trainer(str(tmp_path), devices=2, strategy="ddp")._data_connector
    for kept in (sampler(world=2), FixedSampler(6, 2)):
        loader = DataLoader(Numbers(), sampler=kept, batch_size=3)
        assert connector._prepare_dataloader(loader, shuffle=True, mode=RunningStage.TRAINING) is loader
    plain = DataLoader(Numbers(), batch_size=3)  # what would happen otherwise
    assert connector._prepare_dataloader(plain, shuffle=True, mode=RunningStage.TRAINING) is not plain


@pytest.mark.parametrize(("count", "world"), [(10, 1), (10, 3), (4, 4)])
def test_validation_is_shared_without_repeats(count, world):
    shares = [list(FixedSampler(count, world, rank)) for rank in range(world)]
    assert {len(share) for share in shares} == {count // world} == {len(FixedSampler(count, world))}
    drawn = sorted(chain(*shares))
    assert drawn == [Request(index, 0) for index in range(count - count % world)]


def test_too_few_validation_samples_are_refused():
    with pytest.raises(ValueError, match=r"3 validation samples cannot be shared by 4 processes"):
        FixedSampler(3, 4)


def test_draws_depend_on_seed_epoch_index_and_branch_only():
    def number(branch="generation", seed=0, index=3, epoch=2):
        return BranchDataset(Numbers(), branch, seed)[index, epoch].sample.crop_offset

    def question(seed=0, index=3, epoch=2):
        return BranchDataset(Numbers(), "understanding", seed)[index, epoch].sample.question

    assert number() == number()
    drawn = [number(), number(seed=1), number(index=4), number(epoch=3)]
    assert len(set(drawn)) == 4
    assert question() != BranchDataset(Numbers(), "generation", 0)[3, 2].sample.caption


def test_broken_samples_are_replaced_and_named():
    dataset = BranchDataset(Numbers(10, broken=[3, 4]), "generation", seed=0)
    draws = [dataset[3, epoch] for epoch in range(2000)]
    assert all(draw.skipped[0] == "number 3: it is broken" for draw in draws)
    assert dataset[5, 0].skipped == []
    replaced = Counter(draw.sample.name for draw in draws)
    assert set(replaced) == set("01256789")  # any good one, none preferred: 250 +- 4 sd of sqrt(2000 / 8 * 7 / 8)
    assert max(abs(count - 250) for count in replaced.values()) < 60
    # Draws until a good one are geometric with 8 good of 10: the first, and 0.25 more on average.
    assert abs(np.mean([len(draw.skipped) for draw in draws]) - 1.25) < 4 * np.sqrt(0.2 / 0.8**2 / 2000)


def test_errors_of_the_file_system_count_as_broken():
    class Unplugged(Numbers):
        def sample(self, branch, index, rng):
            if index == 0:
                raise OSError("the disk is gone")
            return super().sample(branch, index, rng)

    draw = BranchDataset(Unplugged(), "understanding", seed=0)[0, 0]
    assert draw.skipped[0] == "understanding sample 0: the disk is gone"


def test_a_hundred_broken_samples_in_a_row_stop():
    dataset = BranchDataset(Numbers(4, broken=range(4)), "understanding", seed=0)
    with pytest.raises(ValueError, match=r"100 understanding samples in a row .*number 1: it is broken") as caught:
        dataset[1, 0]
    assert not isinstance(caught.value, BrokenSampleError)
    assert str(caught.value).count("it is broken") == 3


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_prompt_dropout(share):
    dataset = BranchDataset(Numbers(), "generation", seed=0, prompt_dropout=share)
    dropped = [dataset[index, epoch].sample.drop_prompt for epoch in range(100) for index in range(10)]
    assert abs(np.mean(dropped) - share) <= 4 * np.sqrt(share * (1 - share) / 1000)
    assert dropped == [dataset[index, epoch].sample.drop_prompt for epoch in range(100) for index in range(10)]


def test_collate_keeps_messages():
    dataset = BranchDataset(Numbers(10, broken=[3]), "generation", seed=0)
    batch = collate(StandInProcessor().generation, [dataset[3, 0], dataset[5, 0]])
    assert batch.names[1] == "5" and batch.skipped[0] == "number 3: it is broken"
    assert batch.pixel_values.shape == (2, 3, 2, 2) and batch.pixel_values.dtype == torch.float32


def test_sources_may_count_by_branch():
    class Mixed(Numbers):
        def branch_length(self, branch):
            return {"understanding": 4, "generation": 0}[branch]

    assert branch_length(Mixed(), "understanding") == 4
    assert branch_length(Numbers(), "generation") == 10
    with pytest.raises(ValueError, match=r"Mixed has no samples for generation"):
        branch_length(Mixed(), "generation")


class Knowing(Numbers):
    """Knows five falsehoods about every image."""

    def hard_negatives(self, branch, index):
        return [(f"q{index}", str(i)) if branch == "understanding" else f"{index}: {i}" for i in range(5)]


def test_some_of_what_a_source_knows_to_be_false_is_drawn_anew_in_each_epoch():
    for branch in ("understanding", "generation"):
        dataset = BranchDataset(Knowing(), branch, seed=0, hard_negatives=3)
        drawn = [dataset[4, epoch].sample.negatives for epoch in range(500)]
        known = set(Knowing().hard_negatives(branch, 4))
        assert all(len(set(texts)) == len(texts) == 3 and set(texts) <= known for texts in drawn)
        assert drawn == [dataset[4, epoch].sample.negatives for epoch in range(500)]
        counts = Counter(chain(*drawn))
        assert max(abs(count - 300) for count in counts.values()) < 4 * np.sqrt(500 * 0.6 * 0.4)
        assert len(BranchDataset(Knowing(), branch, 0, hard_negatives=9)[4, 0].sample.negatives) == 5


def test_falsehoods_are_neither_asked_for_nor_missed_unless_wanted(monkeypatch):
    wanted = BranchDataset(Knowing(), "generation", seed=0, prompt_dropout=0.5, hard_negatives=2)
    plain = BranchDataset(Knowing(), "generation", seed=0, prompt_dropout=0.5)
    for index in range(10):
        ours, theirs = wanted[index, 1].sample, plain[index, 1].sample
        assert (ours.caption, ours.crop_offset, ours.drop_prompt) == (
            theirs.caption,
            theirs.crop_offset,
            theirs.drop_prompt,
        )
        assert theirs.negatives == ()
    assert BranchDataset(Numbers(), "generation", 0, hard_negatives=2)[3, 0].sample.negatives == ()
    monkeypatch.setattr(Knowing, "hard_negatives", None)
    assert plain[3, 0].sample.name == "3"


def test_the_texts_of_a_replaced_sample_are_its_own():
    dataset = BranchDataset(Knowing(10, broken=[3]), "generation", seed=0, hard_negatives=1)
    sample = dataset[3, 0].sample
    assert sample.negatives[0].split(":")[0] == sample.name != "3"


def test_a_sample_that_the_model_cannot_take_is_replaced_and_named() -> None:
    dataset = BranchDataset(Numbers(10), "understanding", seed=0)
    refused = dataset[3, 0].sample.name

    def check(sample) -> None:
        if sample.name == refused:
            raise BrokenSampleError(f"{sample.name} is too long")

    dataset.check = check
    sample, skipped = dataset[3, 0]
    assert sample.name != refused and skipped[0] == f"{refused} is too long"
