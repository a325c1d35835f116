"""The inference folder: what training leaves behind, and what every inference command reads.

config.json            {"format": 1, "family": ..., "config": {...}}
<stem>.safetensors     weights under official names, one file per official file (`harmon`, `kl16`)
tokenizer.json ...     the tokenizer
README.md              the model card
"""

import json
from pathlib import Path
from typing import Any

from infotok_lit.errors import MissingFileError

CONFIG_FILE = "config.json"
FORMAT = 1


def write_config(folder: Path, family: str, config: dict[str, Any]) -> None:
    """Write config.json into a folder."""
    content = {"format": FORMAT, "family": family, "config": config}
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")


def exported_family(folder: Path) -> str | None:
    """The family of an exported folder; None for anything else, such as a folder that transformers wrote."""
    try:
        content = json.loads((folder / CONFIG_FILE).read_text())
        return content["family"] if "format" in content else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_folder(folder: Path) -> tuple[str, dict[str, Any]]:
    """The family and the configuration in a folder's config.json.

    Raises:
        MissingFileError: if the folder has none.
        CheckpointError: if it is not one of ours.
    """
    from infotok_lit.models.checkpoint import CheckpointError

    path = folder / CONFIG_FILE
    if not path.exists():
        raise MissingFileError(f"{folder} is not an exported model: it has no {CONFIG_FILE}")
    try:
        content = json.loads(path.read_text())
        version, family, config = content["format"], content["family"], content["config"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not describe an exported model ({error})") from error
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}; this version of infotok_lit reads format {FORMAT}")
    return family, config


def read_config(folder: Path, family: str, title: str) -> dict[str, Any]:
    """The configuration in a folder; CheckpointError if it holds another family than this, `title` in messages."""
    found, config = read_folder(folder)
    if found != family:
        from infotok_lit.models.checkpoint import CheckpointError

        raise CheckpointError(f"{folder} holds a {found} model, not {title}")
    return config


def first_existing(folder: Path, *names: str) -> Path:
    """The first of the files that is there; the first name where none is, for the error that follows."""
    paths = [folder / name for name in names]
    return next((path for path in paths if path.exists()), paths[0])
