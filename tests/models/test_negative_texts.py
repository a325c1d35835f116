"""Texts that are false of an image, from the sample to the batch, for every family."""

from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, tiny_model

from infotok_lit.scenes import Scenes

BRANCHES = ("understanding", "generation")


def batch_of(family: str, branch: str, counts: list[int]):
    model, source = tiny_model(family), Scenes(num_samples=10)
    samples = []
    for index, count in enumerate(counts):
        negatives = tuple(source.hard_negatives(branch, index)[:count])
        samples.append(replace(source.sample(branch, index), negatives=negatives))
    return model.processor, samples, getattr(model.processor, branch)(samples)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("branch", BRANCHES)
def test_they_are_written_like_the_true_text(family, branch) -> None:
    processor, samples, batch = batch_of(family, branch, [2, 0, 3])
    ids, mask = batch.text.negatives
    assert ids.shape == mask.shape and ids.shape[:2] == (3, 3)
    assert mask.any(-1).tolist() == [[True, True, False], [False] * 3, [True] * 3]
    for row, sample in enumerate(samples):
        for place, text in enumerate(sample.negatives):
            # The same sample with the false text as its own.
            if branch == "generation":
                as_true = replace(sample, caption=text, negatives=())
            else:
                as_true = replace(sample, question=text[0], answer=text[1], negatives=())
            expected = getattr(processor, branch)([as_true]).text
            assert torch.equal(ids[row, place][mask[row, place]], expected.ids[0][expected.mask[0]])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("branch", BRANCHES)
def test_without_any_there_is_no_tensor_and_the_rest_is_the_same(family, branch) -> None:
    _, _, plain = batch_of(family, branch, [0, 0, 0])
    _, _, with_some = batch_of(family, branch, [1, 0, 2])
    assert plain.text.negatives is None
    for name in ("ids", "mask", "target_mask", "key"):
        assert torch.equal(getattr(plain.text, name), getattr(with_some.text, name))
    assert torch.equal(plain.input_ids, with_some.input_ids)
