"""A lock that lives as long as the work: held by the process that runs a job and inherited by the `fit` it starts.

The operating system frees it when the last of them ends, however it ends, so a free lock on a job that is marked as
running means that nobody runs it any more. A `fit` that outlives a killed parent keeps it.
"""

import fcntl
import os
from pathlib import Path

LOCK_FILE = "lock"


def try_lock(folder: Path) -> int | None:
    """Take a folder's lock; its file descriptor, or None if somebody has it.

    Raises:
        OSError: if the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        raise OSError(f"{folder} is on a file system without file locks ({error}); choose another folder") from error
    return descriptor


def unlock(descriptor: int) -> None:
    """Give the lock back; a `fit` that inherited it and still runs keeps it."""
    os.close(descriptor)


def is_visible(folder: Path) -> bool:
    """Whether the lock of a running job is on a disk that we see."""
    return (folder / LOCK_FILE).exists()
