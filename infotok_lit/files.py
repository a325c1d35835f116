"""Files that appear whole or not at all. Standard library only."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all, whatever was at `path` before."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        staging.write_bytes(content)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
