"""Chooses the golden files that a family's parity tests replay."""

import json
from pathlib import Path

import pytest
from golden import FIXTURES, Golden, load_golden


@pytest.fixture(scope="session")
def harmon_golden(request: pytest.FixtureRequest) -> Golden:
    return _golden_of("harmon", request.config.getoption("--golden"))


@pytest.fixture(scope="session")
def showo2_golden(request: pytest.FixtureRequest) -> Golden:
    return _golden_of("showo2", request.config.getoption("--golden"))


@pytest.fixture(scope="session")
def openuni_golden(request: pytest.FixtureRequest) -> Golden:
    return _golden_of("openuni", request.config.getoption("--golden"))


@pytest.fixture(scope="session")
def videotok_golden(request: pytest.FixtureRequest) -> Golden:
    return _golden_of("videotok", request.config.getoption("--golden"))


def _golden_of(family: str, given: str | None) -> Golden:
    path = FIXTURES / f"{family}.json" if given is None else Path(given)
    recorded = json.loads(path.read_text()).get("family", "videotok")
    if recorded != family:
        pytest.skip(f"{path.name} is a golden of {recorded}")
    return load_golden(path)
