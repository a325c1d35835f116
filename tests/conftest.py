"""Options and fixtures that every test can use."""

import os

# Tests that run side by side share the cores: one thread each, here and in the processes that they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="PATH.json",
        help="replay this golden file (its .safetensors lies beside it) instead of the ones in tests/fixtures/goldens",
    )
