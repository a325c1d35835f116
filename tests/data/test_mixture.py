"""Several sources as one."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from infotok_lit.batch import GenerationSample, Source
from infotok_lit.data import Mixture
from infotok_lit.errors import SettingsError


class Named(Source):
    """Samples that say where they are from."""

    def __init__(self, name: str, length: int) -> None:
        self.name, self.length = name, length

    def __len__(self) -> int:
        return self.length

    def sample(self, branch, index, rng):
        assert 0 <= index < self.length
        return GenerationSample(Image.new("RGB", (2, 2)), f"{self.name}{index}", self.name)

    def hard_negatives(self, branch, index):
        return (f"not {self.name}{index}",)


def captions(mixture: Mixture, count: int) -> list[str]:
    return [mixture.sample("generation", index, np.random.default_rng(0)).caption for index in range(count)]


def test_each_source_has_its_part_and_is_seen_whole_before_it_begins_again():
    mixture = Mixture([Named("a", 7), Named("b", 2)], parts=[3, 1])
    assert len(mixture) == mixture.branch_length("generation") == 12  # three rounds, until a is through
    seen = captions(mixture, 12)
    assert seen[:8] == ["a0", "a1", "a2", "b0", "a3", "a4", "a5", "b1"]
    assert seen[8:] == ["a6", "a0", "a1", "b0"]
    long = captions(Mixture([Named("a", 100), Named("b", 100)], parts=[2, 3]), 100)
    assert Counter(caption[0] for caption in long) == {"a": 40, "b": 60}
    assert len(set(long)) == 100


def test_nearly_true_texts_are_those_of_the_samples_own_source():
    mixture = Mixture([Named("a", 2), Named("b", 2)])
    assert [mixture.hard_negatives("generation", index) for index in range(3)] == [
        ("not a0",), ("not b0",), ("not a1",)
    ]  # fmt: skip


@pytest.mark.parametrize("parts", [[], [1], [1, 0], [1, -1], [1, 1, 1]])
def test_parts_that_fit_no_sources_are_refused(parts):
    with pytest.raises(SettingsError, match="one positive number in `parts`"):
        Mixture([Named("a", 2), Named("b", 2)], parts=parts)
