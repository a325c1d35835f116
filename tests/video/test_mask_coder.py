"""The mask coder: lossless, near the entropy of independent bits, and below it where neighbours agree."""

import numpy as np
import pytest

from infotok_lit.video.mask_coder import MaskDecoder, MaskEncoder


def entropy(share: float) -> float:
    return -share * np.log2(share) - (1 - share) * np.log2(1 - share)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9, 1.0])
def test_masks_come_back_one_after_another(share: float) -> None:
    rng = np.random.default_rng(1)
    masks = [rng.random((tiles, 3, 5, 4)) < share for tiles in (1, 2, 1, 3)]
    encoder, decoder = MaskEncoder(), MaskDecoder()
    codes = [encoder.encode(mask) for mask in masks]
    for mask, code in zip(masks, codes, strict=True):
        assert np.array_equal(decoder.decode(code, mask.shape), mask)


@pytest.mark.parametrize("share", [0.5, 0.25, 1 / 16])
def test_independent_bits_cost_their_entropy(share: float) -> None:
    mask = np.random.default_rng(2).random((1, 9, 32, 32)) < share
    bits = 8 * len(MaskEncoder().encode(mask)) / mask.size
    assert entropy(share) - 0.02 < bits < entropy(share) + 0.03


def test_tokens_that_lie_together_cost_less() -> None:
    mask = np.zeros((1, 9, 32, 32), dtype=bool)
    mask[:, :, 8:24, 4:20] = True
    bits = 8 * len(MaskEncoder().encode(mask)) / mask.size
    assert bits < 0.1 * entropy(mask.mean())


def test_long_runs_that_carry_are_coded_right() -> None:
    """Masks of nearly one value push the coder's low end through its carries."""
    rng = np.random.default_rng(3)
    for seed in range(30):
        mask = np.ones((1, 4, 16, 16), dtype=bool)
        mask.reshape(-1)[rng.integers(0, mask.size, seed)] = False
        assert np.array_equal(MaskDecoder().decode(MaskEncoder().encode(mask), mask.shape), mask)


def test_any_bytes_decode_to_some_mask() -> None:
    for code in (b"", b"\xff" * 40, bytes(range(256))):
        assert MaskDecoder().decode(code, (1, 2, 3, 3)).shape == (1, 2, 3, 3)
