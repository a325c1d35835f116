"""The schedules of lambda."""

from infotok_lit.objective.config import ObjectiveConfig
from infotok_lit.objective.multipliers import build_multiplier


def test_constant_is_one_from_the_first_step():
    multiplier = build_multiplier(ObjectiveConfig())
    assert [multiplier(step) for step in (0, 1, 10_000)] == [1.0, 1.0, 1.0]


def test_warmup_rises_linearly_from_zero_and_stays():
    multiplier = build_multiplier(ObjectiveConfig(multiplier="warmup", warmup_steps=4))
    assert [multiplier(step) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
