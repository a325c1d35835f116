"""The smallest video tokenizer, and clips for it."""

import numpy as np
import torch

from infotok_lit.video.tokenizer import VideoTokenizer, VideoTokenizerConfig

TINY = VideoTokenizerConfig(
    channels=4,
    channel_multipliers=(1, 2, 2),
    residual_blocks=1,
    latent_channels=12,
    levels=(8, 5, 5),
    width=16,
    mlp_width=24,
    num_heads=2,
    encoder_layers=1,
    decoder_layers=1,
    max_latent_frames=5,
)
"""Some 20 thousand parameters, 200 codes, clips of up to 17 frames."""


def tiny_tokenizer(config: VideoTokenizerConfig = TINY, seed: int = 0) -> VideoTokenizer:
    """Random weights, large enough for the tokens to differ."""
    torch.manual_seed(seed)
    tokenizer = VideoTokenizer(config).eval()
    with torch.no_grad():
        tokenizer.quant_conv.weight.mul_(20)
    return tokenizer


def noise(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 (T, H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
