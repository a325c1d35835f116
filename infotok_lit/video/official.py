"""A video tokenizer under official names: the checkpoints that there are, and the inference folders that runs leave.

A folder holds config.json, the weights, and a model card.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from infotok_lit import __version__
from infotok_lit.checkpoints import (
    CONFIG_FILE,
    CheckpointError,
    KeyMap,
    State,
    exported_family,
    read_config,
    read_weights,
    write_config,
)
from infotok_lit.errors import SettingsError
from infotok_lit.files import whole_folder
from infotok_lit.video import FAMILY
from infotok_lit.video.tokenizer import VideoTokenizer, VideoTokenizerConfig

CARD_FILE = "README.md"
WEIGHTS_FILE = "videotok.safetensors"
CONSTANTS = r"(encoder\.patcher3d|decoder\.unpatcher3d|quantizer)\..*"
"""Official names of tensors that follow from the configuration: read past, and not written."""
ADDED = r"(vit_|post_vit_|temporal_embed|ema_loss|save_loss)"
"""Official names of what the paper adds to Cosmos's tokenizer."""
UPDATES = "complexity.updates"
"""Our name of the only number that official checkpoints do not have."""
PREFIXES = ("network.", "ema.")
"""Of the released file: the weights, and a moving average of them that is kept aside."""


def key_map(config: VideoTokenizerConfig) -> KeyMap:
    """Our parameter names -> official ones."""
    last = len(config.channel_multipliers) - 1
    up_levels = [(rf"^decoder\.up_blocks\.{i}\.", rf"decoder.up.{last - i}.") for i in range(last + 1)]
    return KeyMap(
        renames=(
            *up_levels,
            (r"^encoder\.down_blocks\.", r"encoder.down."),
            (r"\.mid_block\.resnets\.0\.", r".mid.block_1."),
            (r"\.mid_block\.resnets\.1\.", r".mid.block_2."),
            (r"\.mid_block\.attentions\.0\.", r".mid.attn_1.0."),
            (r"\.mid_block\.temp_attentions\.0\.", r".mid.attn_1.1."),
            (r"\.resnets\.", r".block."),
            (r"\.attentions\.(\d+)\.", r".attn.\1.0."),
            (r"\.temp_attentions\.(\d+)\.", r".attn.\1.1."),
            (r"\.downsamplers\.0\.(conv\d)\.", r".downsample.\1.conv3d."),
            (r"\.upsamplers\.0\.(conv\d)\.", r".upsample.\1.conv3d."),
            (r"\.conv_shortcut\.", r".nin_shortcut.conv3d."),
            (r"\.conv_s\.", r".0.conv3d."),
            (r"\.conv_t\.", r".1.conv3d."),
            (r"\.to_([qkv])\.", r".\1.conv3d."),
            (r"\.to_out\.0\.", r".proj_out.conv3d."),
            (r"^((post_)?quant_conv)\.", r"\1.conv3d."),
            (r"^compressor\.", "vit_encoder."),
            (r"^decompressor\.", "vit_decoder."),
            (r"\.in_projection\.", ".mha.in_proj_"),
            (r"\.out_projection\.", ".mha.out_proj."),
            (r"\.mlp_norm\.", ".ffn_norm."),
            (r"\.mlp\.gate\.", ".mlp.w1."),
            (r"\.mlp\.down\.", ".mlp.w2."),
            (r"\.mlp\.up\.", ".mlp.w3."),
            (r"^temporal_embedding$", "temporal_embed"),
            (r"^tokens_in\.", "vit_conv."),
            (r"^tokens_out\.", "post_vit_conv."),
            (r"^complexity\.value$", "ema_loss"),
            (r"^complexity\.history$", "save_loss"),
        )
    )


def official_state(tokenizer: VideoTokenizer) -> State:
    """The weights under official names, without what follows from the configuration.

    The running mean of errors is written without the bias of its start, which the official names have no room for.
    """
    state = tokenizer.state_dict() | {"complexity.value": tokenizer.complexity.mean}
    del state[UPDATES]
    return key_map(tokenizer.config).to_official(state)


def load_official_state(tokenizer: VideoTokenizer, state: State, source: str) -> None:
    """Load weights under official names; what Cosmos's own tokenizer has not stays as it is, if nothing of it is there.

    Args:
        state: may hold the constants that follow from the configuration, and the released file's prefixes.
        source: names the file in errors.

    Raises:
        CheckpointError: naming what is missing, unexpected or mis-shaped, or codes of other levels.
    """
    network, average = PREFIXES
    if any(name.startswith(network) for name in state):
        state = {name.removeprefix(network): tensor for name, tensor in state.items() if not name.startswith(average)}
    levels, own_levels = state.get("quantizer._levels"), tokenizer.config.levels
    if levels is not None and tuple(levels.tolist()) != own_levels:
        raise CheckpointError(
            f"{source} quantises to levels {levels.tolist()}, this configuration to {list(own_levels)}: set levels"
        )
    weights = {name: tensor for name, tensor in state.items() if not re.fullmatch(CONSTANTS, name)}
    if not any(re.match(ADDED, name) for name in weights):
        weights |= {name: own for name, own in official_state(tokenizer).items() if re.match(ADDED, name)}
    own = tokenizer.state_dict()
    counter = {UPDATES: own.pop(UPDATES)}
    tokenizer.load_state_dict(key_map(tokenizer.config).from_official(weights, own, source) | counter)
    tokenizer.complexity.take_over()


def load_official_file(tokenizer: VideoTokenizer, path: Path) -> None:
    """Load an official file, or one in the same names; errors as in `load_official_state` and `read_weights`."""
    load_official_state(tokenizer, read_weights(path), str(path))


# Folders


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
