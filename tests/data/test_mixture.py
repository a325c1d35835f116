"""Several sources as one."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infotok_lit.batch import GenerationSample, Source
from infotok_lit.data import ImageTextFolder, Mixture
from infotok_lit.errors import SettingsError
from infotok_lit.scenes import Scenes


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


class Streamed(Named):
    """Gives its samples in a fixed order, and remembers what it was to get ready for."""

    asked: tuple[int, ...] = ()

    def order(self, branch, rng, block):
        return np.roll(np.arange(self.length), -3)

    def lookahead(self, branch, block):
        return 4

    def prefetch(self, branch, index):
        self.asked += (index,)


def test_a_stream_among_the_sources_keeps_its_order():
    stream, folder = Streamed("s", 6), Named("f", 10)
    mixture = Mixture([stream, folder], parts=[2, 1])
    order = mixture.order("generation", np.random.default_rng(0), block=2)
    assert sorted(order) == list(range(30)) and mixture.lookahead("generation", 2) == 6
    drawn = [mixture.sample("generation", int(index), np.random.default_rng(0)).caption for index in order]
    once = ["s3", "s4", "s5", "s0", "s1", "s2"]
    assert [caption for caption in drawn if caption[0] == "s"] == (4 * once)[:18] + ["s0", "s1"]
    assert {caption for caption in drawn if caption[0] == "f"} == {f"f{index}" for index in range(10)}
    rounds = [[caption[0] for caption in drawn[first : first + 3]] for first in range(0, 30, 3)]
    assert all(sorted(one) == ["f", "s", "s"] for one in rounds) and len({tuple(one) for one in rounds}) > 1
    mixture.prefetch("generation", 3)
    assert stream.asked == (2,)


def test_without_a_stream_any_order_is_equally_likely():
    mixture = Mixture([Named("a", 7), Named("b", 2)], parts=[3, 1])
    order = mixture.order("generation", np.random.default_rng(5), block=2)
    assert (
        order.tolist() == np.random.default_rng(5).permutation(12).tolist() and mixture.lookahead("generation", 2) == 0
    )


def test_nearly_true_texts_are_those_of_the_samples_own_source():
    mixture = Mixture([Named("a", 2), Named("b", 2)])
    assert [mixture.hard_negatives("generation", index) for index in range(3)] == [
        ("not a0",), ("not b0",), ("not a1",)
    ]  # fmt: skip


@pytest.mark.parametrize("parts", [[], [1], [1, 0], [1, -1], [1, 1, 1]])
def test_parts_that_fit_no_sources_are_refused(parts):
    with pytest.raises(SettingsError, match="one positive number in `parts`"):
        Mixture([Named("a", 2), Named("b", 2)], parts=parts)


def test_own_images_beside_scenes_are_split_and_scenes_keep_back_those_of_val():
    photos = Path(__file__).parents[1] / "fixtures" / "photos" / "annotations.json"
    train, val = Mixture([ImageTextFolder(str(photos)), Scenes(num_samples=40)], [3, 1]).split(0.2)

    def names(mixture: Mixture, count: int) -> set[str]:
        return {
            mixture.sample("generation", i, np.random.default_rng(0)).name.partition("/train")[0] for i in range(count)
        }

    shown, kept = names(train, 80), names(val, 24)
    assert (len(shown), len(kept)) == (11, 3 + 6) and not shown & kept
    assert {name for name in kept if name.startswith("scenes32")} == {f"scenes32/val/generation/{i}" for i in range(6)}
    with pytest.raises(SettingsError, match="Scenes cannot be split"):
        Scenes(split="held_out").split(0.2)
