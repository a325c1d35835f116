"""The diffusion half of Show-o2: flow matching between noise (time 0) and clean latents (time 1), and its head.

The head is a transformer over the whole sequence, modulated by time where there is an image. Shapes: B sequences,
T positions, n images, W width, C latent channels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP

from infotok_lit.models.common.language_model import RMSNorm, run_layers, with_fused_norms
from infotok_lit.models.common.sampling import TIME_FEATURES, sinusoid
from infotok_lit.models.showo2.family import PATCH_SIZE, DiffusionHeadConfig
from infotok_lit.models.showo2.sequence import OMNI_ATTENTION, Mask

RUN = PATCH_SIZE**2
"""Latent pixels that one token predicts."""
BLOCK_EPS = 1e-5
NORM_EPS = 1e-6
NEUTRAL = (0.0, 0.0, 1.0, 0.0, 0.0, 1.0)
"""Shift, scale and gate of attention, then of the MLP, where there is no image."""
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class RandomNumbers:
    """The randomness of n images in one loss, drawn in one place so that runs can be replayed."""

    noise: Tensor
    """(n, C, h, w) standard normal: where the path begins."""
    normal: Tensor
    """(n,) standard normal: decides the time."""


def random_numbers(shape: torch.Size, device: torch.device) -> RandomNumbers:
    """For latents of a shape (n, C, h, w)."""
    return RandomNumbers(torch.randn(shape, device=device), torch.randn(shape[0], device=device))


def training_time(normal: Tensor, minimum: float = 0.0, num_image_tokens: int | None = None) -> Tensor:
    """Logit-normal times from standard normal numbers, in [minimum, 1).

    Args:
        num_image_tokens: shift the times towards noise as for this many tokens, the time's own included. The shift
            comes last, so times can end below `minimum`.
    """
    time = torch.sigmoid(normal) * (1 - minimum) + minimum
    if num_image_tokens is None:
        return time
    factor = math.exp(0.5 + (num_image_tokens - 256) * (1.15 - 0.5) / (4096 - 256))
    return 1 - factor / (factor + 1 / (1 - time) - 1)


def on_path(clean: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents at a time (n,), and the velocity there; both as `clean` (n, C, h, w)."""
    at = time.view(-1, 1, 1, 1)
    return at * clean + (1 - at) * noise, clean - noise


def sampling_times(points: int, shift: float) -> Tensor:
    """(points,) from 0 to 1; above 1, `shift` puts more of them near 0."""
    time = torch.linspace(0, 1, points)
    return time / (time + shift - shift * time)


def to_runs(latents: Tensor) -> Tensor:
    """What each token predicts: (n, C, h, w) -> (n, h w / 4, 4 C).

    Not the 2x2 patch that the token has seen, but four latent pixels that follow each other in raster order, channels
    fastest: the released weights were trained so.
    """
    pixels = latents.flatten(2).transpose(1, 2)
    return pixels.reshape(len(latents), -1, RUN * latents.shape[1])


def from_runs(runs: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Inverse of to_runs: (n, h w / 4, 4 C) -> (n, C, h, w)."""
    return runs.reshape(len(runs), height * width, channels).transpose(1, 2).unflatten(2, (height, width))


# The head


class TimeEmbedding(nn.Module):
    """Times in [0, 1] -> (n, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, time: Tensor) -> Tensor:
        """(n,) -> (n, width)."""
        return self.mlp(sinusoid(time).to(self.mlp[0].weight.dtype))


class DiffusionHead(nn.Module):
    """Hidden states of the language model -> a velocity for every position."""

    def __init__(self, config: DiffusionHeadConfig, channels: int) -> None:
        super().__init__()
        self.rotary = LlamaRotaryEmbedding(
            LlamaConfig(
                hidden_size=config.width,
                num_attention_heads=config.heads,
                head_dim=config.head_dim,
                max_position_embeddings=131072,
                rope_parameters=ROPE,
            )
        )
        self.blocks = nn.ModuleList([DiffusionBlock(config, index) for index in range(config.depth)])
        self.output_norm = RMSNorm(config.width, eps=NORM_EPS)
        self.output_modulation = _zero_linear(config.width, 2 * config.width)
        self.output = _zero_linear(config.width, PATCH_SIZE**2 * channels)
        self.activation_checkpointing = False

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        image: Tensor,
        mask: Mask | None,
        positions: Tensor,
        cache: Cache | None = None,
    ) -> Tensor:
        """(B, T, W) -> (B, T, 4 C).

        Args:
            time: (n, W) embedded times of the images.
            image: (B, T) int64: which image a position belongs to, -1 for text.
            positions: (B, T) or (1, T) int64.
            cache: keys and values of earlier positions; those of `x` are appended.
        """
        rotary = self.rotary(x, positions)
        condition = nn.functional.silu(time)
        recompute = self.activation_checkpointing and cache is None
        x = run_layers(self.blocks, x, condition, image, mask, rotary, cache, recompute=recompute)
        shift, scale = at_images(self.output_modulation(condition), image, (0.0, 0.0))
        return self.output(_modulate(self.output_norm(x), shift, scale))


class DiffusionBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by time at image positions."""

    def __init__(self, config: DiffusionHeadConfig, index: int) -> None:
        super().__init__()
        layer = Qwen3Config(
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=NORM_EPS,
            attn_implementation=OMNI_ATTENTION,
        )
        self.attention_norm = RMSNorm(config.width, eps=BLOCK_EPS)
        self.attention = with_fused_norms(Qwen3Attention(layer, index))
        self.mlp_norm = RMSNorm(config.width, eps=BLOCK_EPS)
        self.mlp = Qwen3MLP(layer)
        self.modulation = _zero_linear(config.width, len(NEUTRAL) * config.width)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        image: Tensor,
        mask: Mask | None,
        rotary: tuple[Tensor, Tensor],
        cache: Cache | None,
    ) -> Tensor:
        """(B, T, W) -> (B, T, W)."""
        modulation = at_images(self.modulation(condition), image, NEUTRAL)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        attended, _ = self.attention(_modulate(self.attention_norm(x), shift, scale), rotary, mask, cache)
        x = _gated(x, gate, attended)
        return _gated(x, mlp_gate, self.mlp(_modulate(self.mlp_norm(x), mlp_shift, mlp_scale)))


def at_images(modulation: Tensor, image: Tensor, neutral: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Modulations of images (n, k W) -> k of (B, T, W), float32: the image's own, or a neutral number at text."""
    parts = modulation.float().chunk(len(neutral), dim=-1)
    rows = image + 1
    return tuple(
        torch.cat([part.new_full((1, part.shape[1]), number), part])[rows]
        for part, number in zip(parts, neutral, strict=True)
    )


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (x.float() * (1 + scale) + shift).to(x.dtype)


def _gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    return x + (gate * update.float()).to(x.dtype)


def _zero_linear(width_in: int, width_out: int) -> nn.Linear:
    """Starts as nothing: blocks begin by passing images on unchanged."""
    linear = nn.Linear(width_in, width_out)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
