"""A tokenizer as an inference folder: config.json, weights under official names, and a model card."""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from infotok_lit import __version__
from infotok_lit.checkpoints import CheckpointError, State, read_config, write_config
from infotok_lit.errors import SettingsError
from infotok_lit.video.official import load_official_file, official_state
from infotok_lit.video.tokenizer import VideoTokenizer, VideoTokenizerConfig

FAMILY = "videotok"
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
    if out.exists():
        if not force:
            raise SettingsError(f"{out} exists; choose another folder, or replace it with force")
        read_config(out, FAMILY, "a video tokenizer, so it is not replaced")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        weights: State = {
            name: tensor.detach().cpu().contiguous() for name, tensor in official_state(tokenizer).items()
        }
        save_file(weights, staging / WEIGHTS_FILE, metadata={"format": "pt", "family": FAMILY})
        write_config(staging, FAMILY, tokenizer.config.to_dict())
        (staging / "README.md").write_text(_model_card(tokenizer, provenance))
        staging.chmod(0o755)
        for path in staging.iterdir():
            path.chmod(0o644)
        if out.exists():
            shutil.rmtree(out)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
