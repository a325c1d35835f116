"""A folder for small studies, in which nobody waits long."""

import pytest
from study.studies import Bench

from infotok_lit.study import report, run, store


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(run, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(store, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(store, "GRACE_SECONDS", 2)


@pytest.fixture
def drawn() -> None:
    """For tests that look at figures: they are drawn, which takes long."""


@pytest.fixture(autouse=True)
def undrawn(monkeypatch, request) -> None:
    """For all others: a report makes its figures, but does not draw them."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(report, "_write_figure", lambda path, figure: None)
