"""A folder for small studies, in which nobody waits long."""

import pytest
from study.studies import Bench

from infotok_lit.study import run, store


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(run, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(store, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(store, "GRACE_SECONDS", 2)
