"""Brings shards that are not local files (commands, URLs) into a cache folder, once, whole or not at all."""

import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import fsspec
from filelock import FileLock

from infotok_lit.errors import DataError

log = logging.getLogger(__name__)

PIPE = "pipe:"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def default_cache() -> Path:
    """The cache folder of this package, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infotok_lit" / "shards"


def expand_braces(pattern: str) -> list[str]:
    """`a-{08..10}.tar` -> `a-08.tar`, `a-09.tar`, `a-10.tar`; `{x,y}` -> `x`, `y`; other braces stay as they are."""
    for match in _BRACES.finditer(pattern):
        if choices := _choices(match[1]):
            head, tail = pattern[: match.start()], pattern[match.end() :]
            return [whole for choice in choices for whole in expand_braces(f"{head}{choice}{tail}")]
    return [pattern]


def _choices(body: str) -> list[str]:
    if limits := _RANGE.fullmatch(body):
        first, last = int(limits[1]), int(limits[2])
        step = 1 if last >= first else -1
        return [str(number).zfill(len(limits[1])) for number in range(first, last + step, step)]
    return body.split(",") if "," in body else []


def local_copy(address: str, cache: Path) -> Path:
    """The local file behind a path, `pipe:COMMAND` or URL. What is fetched stays in the cache under its address.

    A command runs in a shell: call this with what a user typed, never with what was read from data.

    Raises:
        DataError: There is no such file, or it could not be fetched; the message has the reason.
    """
    if not address.startswith(PIPE) and "://" not in address:
        path = Path(address)
        if not path.is_file():
            raise DataError(f"there is no shard {path}")
        return path
    target = cache / f"{hashlib.sha256(address.encode()).hexdigest()[:32]}.tar"
    fetch = _run_command if address.startswith(PIPE) else _download
    with locked(target):
        if not target.exists():
            log.info("fetching %s into %s", address, target)
            with replacing(target) as file:
                fetch(address, file)
    return target


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """One process at a time works on `target`; the lock of a killed process is free again."""
    with FileLock(f"{target}.lock"):
        yield


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A temporary file that becomes `target` if the block succeeds, and vanishes otherwise."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f"{target.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def _run_command(address: str, file: BinaryIO) -> None:
    command = address.removeprefix(PIPE)
    done = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-500:] or "nothing"
        raise DataError(f"the shard command {command!r} ended with exit code {done.returncode} and said: {said}")


def _download(address: str, file: BinaryIO) -> None:
    try:
        with fsspec.open(address, "rb") as remote:
            shutil.copyfileobj(remote, file, length=1 << 20)
    except Exception as error:  # every protocol of fsspec has its own errors, a missing package among them
        raise DataError(f"the shard {address} cannot be fetched: {error or type(error).__name__}") from error
