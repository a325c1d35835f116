"""A tokenizer as an inference folder: config.json, weights under official names, and a model card."""

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from infotok_lit import __version__
from infotok_lit.checkpoints import CONFIG_FILE, CheckpointError, State, exported_family, read_config, write_config
from infotok_lit.errors import SettingsError
from infotok_lit.files import whole_folder
from infotok_lit.video import FAMILY
from infotok_lit.video.official import load_official_file, official_state
from infotok_lit.video.tokenizer import VideoTokenizer, VideoTokenizerConfig

CARD_FILE = "README.md"
WEIGHTS_FILE = "videotok.safetensors"


def config_from(content: Mapping[str, Any], source: str) -> VideoTokenizerConfig:
    """A configuration from plain data; CheckpointError names entries that no configuration has, or bad values."""
    unknown = sorted(content.keys() - {field.name for field in fields(VideoTokenizerConfig)})
    if unknown:
        raise CheckpointError(f"{source} has settings that this version does not know: {', '.join(unknown)}")
    try:
        return VideoTokenizerConfig(**content)
    except (TypeError, SettingsError) as error:
        raise CheckpointError(f"{source} does not describe a video tokenizer: {error}") from error


def load_tokenizer(folder: Path) -> VideoTokenizer:
    """The tokenizer of an exported folder, in evaluation mode.

    Raises:
        MissingFileError: if the folder or a file of it is not there.
        CheckpointError: if it holds another model, or its files are damaged.
    """
    content = read_config(folder, FAMILY, "a video tokenizer")
    tokenizer = VideoTokenizer(config_from(content, f"{folder}/config.json"))
    load_official_file(tokenizer, folder / WEIGHTS_FILE)
    return tokenizer.eval()


def export_tokenizer(tokenizer: VideoTokenizer, out: Path, provenance: Mapping[str, Any], force: bool = False) -> None:
    """Write an inference folder in one step: it is complete, or it is not there.

    Args:
        out: the folder to make.
        provenance: lines of the model card.
        force: replace an existing folder that this function wrote.

    Raises:
        SettingsError: if `out` exists and is not to be replaced, or is no exported tokenizer.
    """
    replaced = _replaceable(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out, replaced) as folder:
        weights: State = {
            name: tensor.detach().cpu().contiguous() for name, tensor in official_state(tokenizer).items()
        }
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt", "family": FAMILY})
        write_config(folder, FAMILY, tokenizer.config.to_dict())
        (folder / CARD_FILE).write_text(_model_card(tokenizer, provenance))


def _replaceable(out: Path, force: bool) -> list[str] | None:
    """The files of the earlier export at `out`; None where nothing stands. SettingsError for anything else."""
    if not os.path.lexists(out):
        return None
    if not force:
        raise SettingsError(f"{out} exists; choose another folder, or replace it with force")
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() and not out.is_symlink() else [out.name]
    if exported_family(out) != FAMILY or not {*names} <= {WEIGHTS_FILE, CONFIG_FILE, CARD_FILE}:
        raise SettingsError(f"{out} is no exported video tokenizer, or holds more, so it is not replaced")
    return names


def _model_card(tokenizer: VideoTokenizer, provenance: Mapping[str, Any]) -> str:
    shape = tokenizer.config
    size = f"{shape.temporal_compression}x{shape.spatial_compression}x{shape.spatial_compression}"
    parameters = sum(parameter.numel() for parameter in tokenizer.parameters())
    return "\n".join(
        [
            f"# Adaptive video tokenizer {size}, trained with infotok_lit {__version__}",
            "",
            f"{parameters:,} parameters, {shape.num_codes:,} codes. Weights carry the official names.",
            "",
            *(f"- {name}: {value}" for name, value in provenance.items()),
            "",
            "```",
            "python -m infotok_lit compress --model FOLDER --video x.mp4 --rate 0.5 --out x.itk",
            "python -m infotok_lit decompress --model FOLDER --stream x.itk --out y.mp4",
            "```",
            "",
        ]
    )
