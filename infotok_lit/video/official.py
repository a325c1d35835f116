"""Official checkpoints of the video tokenizer, in and out."""

import re
from pathlib import Path

from torch import Tensor

from infotok_lit.checkpoints import CheckpointError, KeyMap, State, read_weights
from infotok_lit.video.tokenizer import VideoTokenizer, VideoTokenizerConfig

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
    _check_levels(tokenizer.config, state.get("quantizer._levels"), source)
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


def _check_levels(config: VideoTokenizerConfig, levels: Tensor | None, source: str) -> None:
    if levels is not None and tuple(levels.tolist()) != config.levels:
        raise CheckpointError(
            f"{source} quantises to levels {levels.tolist()}, this configuration to {list(config.levels)}: set levels"
        )
