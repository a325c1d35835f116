"""Processes that work together, forked from this one: a fresh one spends most of its time on imports."""

import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing import start_processes


def run_forked(function: Callable[..., Any], processes: int, *arguments: Any, limit: float = 600) -> None:
    """Call `function(rank, *arguments)` in so many processes, each in the environment that torchrun gives it.

    Where one fails, its error is raised here; none is left afterwards. A process group is only ever begun in such a
    process: where one once was, a process that is forked later waits for ever in its first sum.
    """
    end = time.monotonic() + limit
    running = start_processes(
        _be_one, (processes, function, arguments), nprocs=processes, join=False, start_method="fork"
    )
    try:
        while not running.join(1):
            assert time.monotonic() < end, f"{function.__name__} takes longer than {limit} s"
    finally:
        for process in running.processes:
            process.kill()
            process.join()


def join(rank: int, processes: int) -> None:
    """Be one of so many processes, as torchrun says it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests"}
    os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)


def _be_one(rank: int, processes: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    join(rank, processes)
    function(rank, *arguments)
