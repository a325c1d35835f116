"""Files of weights, read so that nothing in them can execute, and so that damage is noticed.

Torch is imported when a file is read, so that a typing error of a command is answered at once.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infotok_lit.errors import ExplainedError, MissingFileError

if TYPE_CHECKING:
    from torch import Tensor

DAMAGE_ERRORS = (
    *(RuntimeError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError),
    *(AttributeError, LookupError, TypeError, ValueError, OverflowError, struct.error),
)
"""What reading raises, beside the unpickler's own error, for bytes that are no whole checkpoint."""
DAMAGED = "it is damaged or truncated; use an earlier one, or fetch it again"
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)(:/|::)")


class CheckpointError(ExplainedError, ValueError):
    """A checkpoint cannot be used; the message names the file, what is wrong, and the mend."""


def local_checkpoint(source: str | Path) -> Path:
    """The path of a checkpoint on this machine; every road to a checkpoint leads through here.

    Raises:
        CheckpointError: for a URL of any kind: what it gives may change, and libraries that follow it execute it; and
            for an empty name, which as a path would be the working folder.
    """
    if not str(source):
        raise CheckpointError("the name of a model or a checkpoint is empty: give its path")
    scheme = URL.match(str(source))
    if scheme is None:
        return Path(source)
    local = scheme[1].lower() == "file"
    mend = "give its path, without the scheme" if local else "download it first, and give its path"
    raise CheckpointError(f"{source} is a URL, and checkpoints are read from files only: {mend}")


def read_pickle(path: Path, checked: bool = True) -> Any:
    """What a file written by torch.save holds, read with `weights_only=True`.

    Tensors are mapped from the file: they are read when they are used, and processes of a machine share what they read.
    Changing one does not change the file.

    Args:
        checked: compare its checksums, for which all of it is read once; not needed for a look into a large file.

    Raises:
        MissingFileError: if there is no such file.
        CheckpointError: if it is damaged, or holds anything that is not plain data.
    """
    import torch

    check_kind(path)
    with path.open("rb") as file:
        if re.match(rb"\x80[\x03-\x05]", file.read(2)):
            raise unreadable(path, "it is a plain pickle, which could execute code; save its tensors with torch.save")
    if checked:
        check_checksums(path)
    try:
        # Formats before the zip archive cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, OSError, *DAMAGE_ERRORS) as error:
        # Torch's own words advise to read the file in a way that executes it, so they are not repeated.
        refused = re.search(r"GLOBAL ([\w.]+)|(TorchScript|legacy \.tar)|add_safe_globals", str(error))
        if refused is None:
            raise unreadable(path, DAMAGED) from error
        raise CheckpointError(
            f"{path} is not read with weights_only=True, because it holds more than tensors and plain data "
            f"({refused[1] or refused[2] or 'objects'}), which could execute code: have its author save its state dict "
            "alone"
        ) from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file; errors as for `read_pickle`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_kind(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, *DAMAGE_ERRORS) as error:
        raise unreadable(path, f"{DAMAGED} ({_reason(error)})") from error


def read_metadata(path: Path) -> dict[str, str]:
    """What a .safetensors file says of itself; errors as for `read_pickle`."""
    from safetensors import SafetensorError, safe_open

    check_kind(path)
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, *DAMAGE_ERRORS) as error:
        raise unreadable(path, f"{DAMAGED} ({_reason(error)})") from error


def read_json(path: Path, complaint: str) -> dict[str, Any]:
    """The entries of a JSON file; CheckpointError, with a complaint such as "is no index", if it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} {complaint} ({_reason(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} {complaint}: it holds a {type(content).__name__}")
    return content


def check_checksums(path: Path) -> None:
    """Read a file of torch.save once and compare its checksums, which torch does not; old formats have none.

    Raises:
        CheckpointError: if it is not what was written.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
    except (OSError, *DAMAGE_ERRORS) as error:
        raise unreadable(path, DAMAGED) from error
    if changed is not None:
        raise unreadable(path, f"{DAMAGED} (the checksum of {changed} in it is wrong)")


def check_tensors(path: Path, tensors: Iterable[Tensor]) -> None:
    """Compare the checksums of some tensors that were read from a file of torch.save, and of what lays them out.

    Nothing else of the file is read, which may be several times as large.

    Raises:
        CheckpointError: if they are not what was written.
    """
    import torch

    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            for record in records:
                if "/data/" not in record.filename:
                    archive.read(record)
    except (OSError, *DAMAGE_ERRORS) as error:
        raise unreadable(path, DAMAGED) from error
    written = {(record.file_size, record.CRC) for record in records}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    for storage in storages.values():
        content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        if (content.nbytes, zlib.crc32(content)) not in written:
            raise unreadable(path, f"{DAMAGED} (the checksum of a tensor in it is wrong)")


def check_kind(path: Path) -> None:
    """Say what a file is that has the name of a checkpoint and is none.

    Raises:
        MissingFileError: if there is nothing.
        CheckpointError: if it is a folder, a web page, text, ...
    """
    if not path.exists():
        raise MissingFileError(f"no checkpoint at {path}")
    if not path.is_file():
        raise unreadable(path, "it is a folder" if path.is_dir() else "it is no file")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise unreadable(path, _reason(error)) from error
    text = start.decode("utf-8", errors="ignore")
    lower = text.lstrip().lower()
    if not start:
        raise unreadable(path, "it is empty, so its download or copy was truncated; fetch it again")
    if lower.startswith(("<!doctype", "<html", "<head", "<?xml")):
        raise unreadable(path, "it is a web page; download the file itself (on the hub: /resolve/, not /blob/)")
    if lower.startswith("version https://git-lfs"):
        raise unreadable(path, "it is a Git LFS pointer; fetch the file that it stands for with `git lfs pull`")
    # The last character may be cut.
    is_utf8 = len(text.encode()) > len(start) - 4
    if is_utf8 and all(character.isprintable() or character.isspace() for character in text):
        raise unreadable(path, "it is a text file")


def unreadable(path: Path, why: str) -> CheckpointError:
    """The error for a file of weights that is none."""
    return CheckpointError(f"{path} cannot be read: {why}")


def _reason(error: Exception) -> str:
    lines = str(getattr(error, "strerror", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__
