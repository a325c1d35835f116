"""Files and folders that appear whole or not at all. Standard library only."""

import json
import os
import secrets
import shutil
import signal
import socket
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from infotok_lit.errors import TERMINATED, SettingsError

PART = ".part"


def check_target(path: Path | None, force: bool = True, source: Path | None = None) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold.

    Args:
        path: Of the file; None where nothing is to be written.
        force: Whether a file that is there may be replaced.
        source: What the result is made from, which it never replaces.

    Raises:
        SettingsError: if something is there that is not to be replaced, or no folder can be made for it.
    """
    if path is None:
        return
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise SettingsError(f"{path} is what is read, and would be lost; choose another name to write to")
    if path.is_dir():
        raise SettingsError(f"{path} exists; choose another name")
    if path.exists() and not path.is_file():
        raise SettingsError(f"{path} is a device or a pipe, and a file would take its place; choose another name")
    if path.exists() and not force:
        raise SettingsError(f"{path} exists; choose another name, or replace it with --force")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise SettingsError(f"{path} cannot be written: {above} is a file, not a folder")
    if not os.access(above, os.W_OK):
        raise SettingsError(f"{path} cannot be written: there is no permission to write into {above}")


def staging_path(path: Path) -> Path:
    """Where this process writes what is to stand at `path`: .NAME.HOST.PROCESS.part beside it."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{PART}")


@contextmanager
def undone_by_sigterm() -> Iterator[None]:
    """Have SIGTERM end the process by SystemExit in the body, so that what was begun there is removed.

    Only where nobody else has a handler, as training has. Children that the body forks die of it as usual.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    process = os.getpid()

    def end(number: int, _frame: object) -> None:
        if os.getpid() == process:
            raise SystemExit(TERMINATED)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` if the body ends well; else it is gone, and `path` is as it was.

    Raises:
        OSError: naming `path`, if it cannot be written.
    """
    staging = staging_path(path)
    try:
        with staging.open("wb") as file:
            yield file
        staging.replace(path)
    except OSError as error:
        # A full disk names no file.
        if error.errno is not None and error.filename in (None, str(staging)):
            error.filename = str(path)
        raise
    finally:
        staging.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all, whatever was at `path` before."""
    with replacing(path) as file:
        file.write(content)


def write_json(path: Path | None, content: Any) -> None:
    """Write a JSON file, whole or not at all, into a folder that is made where there is none; for None, nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # Half a surrogate pair is no UTF-8; escaped, it is JSON.
    write_whole(path, text.encode(errors="backslashreplace"))


def _hidden_name(path: Path, label: str = "") -> Path:
    return path.parent / f".{path.name}-{label}{secrets.token_hex(8)}"


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A hidden folder beside a path, for its owner alone, which is gone in the end if it has not moved."""
    # It has its name before it is made: SIGTERM may come at once.
    folder = _hidden_name(path)
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """As `replacing`, for what opens a path itself and goes by its suffix: a path to write to."""
    with undone_by_sigterm(), _folder_beside(path) as staging:
        target = staging / path.name
        yield target
        target.replace(path)


@contextmanager
def whole_folder(path: Path, replaced: Collection[str] | None = None) -> Iterator[Path]:
    """A folder to write into, which is `path` if the body ends well; else it is gone, and `path` is as it was.

    It is written beside `path` and renamed at the end, so a full disk or a kill costs nothing that was there before.
    All may read it.

    Args:
        replaced: the names of the files in the folder that stands at `path` and is to go. They alone are deleted: what
            else is found there in the end stays, in a hidden folder beside. None where nothing stands there.
    """
    with undone_by_sigterm(), _folder_beside(path) as staging:
        yield staging
        # Temporary folders, and the files that some libraries write, are for their owner alone.
        staging.chmod(0o755)
        for file in staging.iterdir():
            file.chmod(0o644)
        if replaced is None:
            staging.rename(path)
        else:
            _swap(staging, path, replaced)


def _swap(new: Path, path: Path, replaced: Collection[str]) -> None:
    old = _hidden_name(path, "old-")
    try:
        path.rename(old)
        new.rename(path)
    except BaseException:  # SIGTERM among them: what stood there comes back
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    for name in replaced:
        (old / name).unlink(missing_ok=True)
    if not any(old.iterdir()):
        old.rmdir()


def free_path(path: Path) -> Path:
    """`path`, or where something stands there, the first of `path-2`, `path-3`, ... where nothing does."""
    candidates = (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in count(1))
    return next(candidate for candidate in candidates if not os.path.lexists(candidate))
