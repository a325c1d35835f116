"""Moving Scenes: clips whose truth is known."""

import numpy as np
import pytest

from infotok_lit.errors import SettingsError
from infotok_lit.video.moving_scenes import SPECS, MovingScenes

RNG = np.random.default_rng(0)


def test_a_clip_is_a_function_of_its_index() -> None:
    scenes = MovingScenes(side=48)
    truth, frames = scenes.draw(5, 9)
    again, same = MovingScenes(side=48).draw(5, 9)
    assert np.array_equal(frames, same) and np.array_equal(truth.centres, again.centres)
    assert not np.array_equal(frames, MovingScenes("val", side=48).draw(5, 9)[1])
    assert frames.shape == (9, 48, 48, 3) and frames.dtype == np.uint8
    assert np.array_equal(scenes.clip(5, 9, RNG).frames, frames)


def test_objects_are_where_the_truth_says() -> None:
    checked = 0
    for index in range(12):
        truth, frames = MovingScenes(side=64).draw(index, 9)
        for t in range(9):
            seen = np.flatnonzero(truth.visible[t])
            for i in seen:
                y, x = truth.centres[t, i]
                others = [np.linalg.norm(truth.centres[t, j] - truth.centres[t, i]) for j in seen if j != i]
                if min(others, default=99) < 2 * truth.radii.max():
                    continue
                assert tuple(frames[t, int(y), int(x)]) == truth.colours[i]
                checked += 1
    assert checked > 100


def test_collisions_keep_momentum_and_energy() -> None:
    """Away from the walls, what two objects do to each other changes neither."""
    found = 0
    for index in range(60):
        truth, _ = MovingScenes(difficulty="hard", side=64).draw(index, 17)
        for frame, i, j in truth.collisions:
            pair = [i, j]
            inside = (truth.centres[:, pair] > truth.radii[pair, None]) & (
                truth.centres[:, pair] < 64 - truth.radii[pair, None]
            )
            others = [event for event in truth.collisions if abs(event[0] - frame) <= 1 and event != (frame, i, j)]
            if not 1 <= frame < 16 or others or not inside[frame - 1 : frame + 2].all():
                continue
            before = truth.centres[frame, pair] - truth.centres[frame - 1, pair]
            after = truth.centres[frame + 1, pair] - truth.centres[frame, pair]
            assert np.allclose(before.sum(0), after.sum(0), atol=1e-9)
            assert np.square(before).sum() == pytest.approx(np.square(after).sum())
            assert not np.allclose(before, after)
            found += 1
    assert found > 5


def test_hard_clips_hold_more_than_easy_ones() -> None:
    easy, hard = (
        [MovingScenes(difficulty=kind, side=64).draw(index, 9)[0] for index in range(20)] for kind in ("easy", "hard")
    )
    assert max(len(truth.shapes) for truth in easy) == SPECS["easy"].objects[1] < 4
    assert min(len(truth.shapes) for truth in hard) >= SPECS["hard"].objects[0]
    assert max(truth.motion for truth in easy) < np.median([truth.motion for truth in hard])
    assert all(truth.drift == (0, 0) for truth in easy) and any(truth.drift != (0, 0) for truth in hard)


def test_objects_stay_inside_and_some_appear_late() -> None:
    late = 0
    for index in range(20):
        truth, _ = MovingScenes(side=64).draw(index, 17)
        assert (truth.centres >= truth.radii[:, None] - 1e-9).all()
        assert (truth.centres <= 64 - truth.radii[:, None] + 1e-9).all()
        late += int((~truth.visible[0]).sum())
        assert truth.visible[-1].all()
    assert late > 0
    with pytest.raises(SettingsError):
        MovingScenes(side=8)
