"""Brings shards that are not local files (commands, URLs) into a cache folder, whole or not at all, and makes room."""

import hashlib
import logging
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from filelock import FileLock

from infotok_lit.errors import DataError
from infotok_lit.files import PART, replacing

log = logging.getLogger(__name__)

PIPE = "pipe:"
ATTEMPTS = 3
"""A download that fails is tried again, after half a second and then twice as long: servers hiccup."""
_FINAL, _REFUSALS = (ImportError, ValueError, FileNotFoundError, PermissionError), (401, 403, 404, 410)
"""What is not tried again: errors, and the status of an answer."""
_FETCHED = "[0-9a-f]" * 32 + ".tar"
"""How the files are called that are ours to delete."""
_IN_USE_SECONDS = 10
_BRACES = re.compile(r"\{([^{}]*)\}")
_PACKAGE = re.compile(r"[Ii]nstall (\w+)")
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


def is_remote(address: str) -> bool:
    """Whether an address is a command or a URL."""
    return address.startswith(PIPE) or "://" in address


def is_here(address: str, cache: Path) -> bool:
    """Whether the file behind a path, `pipe:COMMAND` or URL need not be fetched."""
    return not is_remote(address) or _cached(address, cache).is_file()


def _cached(address: str, cache: Path) -> Path:
    return cache / f"{hashlib.sha256(address.encode()).hexdigest()[:32]}.tar"


def local_copy(address: str, cache: Path, limit: int | None = None) -> Path:
    """The local file behind a path, `pipe:COMMAND` or URL. What is fetched stays in the cache under its address.

    It stays until room is needed: if all that was fetched has more than `limit` bytes, what was not asked for longest
    goes. A command runs in a shell: call this with what a user typed, never with what was read from data.

    Raises:
        DataError: There is no such file, or it could not be fetched; the message has the reason.
    """
    if not is_remote(address):
        path = Path(address)
        if not path.is_file():
            raise DataError(f"there is no shard {path}")
        return path
    target = _cached(address, cache)
    if _touched(target):
        return target
    fetch = _run_command if address.startswith(PIPE) else _download
    with locked(target):
        if not _touched(target):
            log.info("fetching %s into %s", address, target)
            for left in cache.glob(f".{target.name}.*{PART}"):  # of a process that was killed
                left.unlink(missing_ok=True)
            with replacing(target) as file:
                fetch(address, file)
            if limit is not None:
                _make_room(cache, limit, kept=target)
    return target


def _touched(target: Path) -> bool:
    """Whether a file is there; if so, it counts as asked for now."""
    try:
        os.utime(target, ns=(time.time_ns(), target.stat().st_mtime_ns))
    except FileNotFoundError:
        return False
    return True


def _make_room(cache: Path, limit: int, kept: Path) -> None:
    with locked(cache / "room"):
        found = {}
        for path in cache.glob(_FETCHED):
            with suppress(FileNotFoundError):
                found[path] = path.stat()
        total = sum(status.st_size for status in found.values())
        for path in sorted(found, key=lambda path: found[path].st_atime_ns):
            if total <= limit:
                return
            if path != kept:
                if time.time() - found[path].st_atime < _IN_USE_SECONDS:
                    log.warning("%s: %.1f GB are too few for the shards in use: raise cache_gb", cache, limit / 1e9)
                path.unlink(missing_ok=True)
                total -= found[path].st_size


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """One process at a time works on `target`; the lock of a killed process is free again."""
    with FileLock(f"{target}.lock"):
        yield


def _run_command(address: str, file: BinaryIO) -> None:
    command = address.removeprefix(PIPE)
    done = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-500:] or "nothing"
        raise DataError(f"the shard command {command!r} ended with exit code {done.returncode} and said: {said}")


def _download(address: str, file: BinaryIO) -> None:
    for attempt in range(ATTEMPTS):
        try:
            # In one piece, from its beginning: not every server gives parts of a file, or those that it is asked for.
            system, path = fsspec.url_to_fs(address, **_patient(address))
            system.get_file(path, file.name)
            return
        except Exception as error:  # every protocol of fsspec has its own errors, a missing package among them
            root = root_of(error)
            final = isinstance(root, _FINAL) or getattr(root, "status", None) in _REFUSALS
            if final or attempt == ATTEMPTS - 1:
                raise DataError(f"the shard {address} cannot be fetched: {reason_of(error)}") from error
            time.sleep(0.5 * 2**attempt)


def _patient(address: str) -> dict[str, Any]:
    """Options of fsspec: a download over HTTP, which ends after five minutes otherwise, goes on while bytes come."""
    if not address.startswith(("http://", "https://")):
        return {}
    import aiohttp

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}}


def root_of(error: BaseException) -> BaseException:
    """What first went wrong: fsspec calls every failure of a server a missing file."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def reason_of(error: BaseException) -> str:
    """Why fsspec cannot open something, and the package that it lacks, if that is it."""
    root = root_of(error)
    missing = _PACKAGE.search(str(root)) if isinstance(root, ImportError) else None
    return (str(root) or type(root).__name__) + ("" if missing is None else f": pip install {missing[1]}")
