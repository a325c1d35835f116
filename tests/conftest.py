"""Options and fixtures that every test can use."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="PATH.json",
        help="replay this golden file (its .safetensors lies beside it) instead of the ones in tests/fixtures/goldens",
    )
