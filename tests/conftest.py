"""Options and fixtures that every test can use."""

import gc
import os
import socket
from random import SystemRandom

# One thread, here and in the processes that tests start: tests that run side by side share the cores, and a process
# that has computed convolutions with more of them may hang when it is forked.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Sums then have one order.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="PATH.json",
        help="replay this golden file (its .safetensors lies beside it) instead of the ones in tests/fixtures/goldens",
    )


def pytest_collection_finish() -> None:
    """Leave what was imported out of Python's garbage collections: each would visit a million objects in vain."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Where the processes of a test meet: a free port of its own, or runs of two tests side by side would join up.

    What a Trainer of several processes leaves in the environment goes: a later one would take it for a launcher's.
    """
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        os.environ.pop(name, None)
    while True:
        # Below the ports that the system hands out, which anybody may get.
        port = SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
        os.environ["MASTER_PORT"] = str(port)
        return
