"""Table 1, left: what images can be rebuilt from the shared tokens of a frozen encoder, by a light decoder.

The paper trains the decoder on ImageNet and reports the Frechet distance of reconstructions of its validation set; it
leaves decoder, size and training open, so each is a setting here and stands in the result.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import move_data_to_device, rank_zero_info
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance

from infotok_lit.batch import BRANCHES, Batch, Branch, TokenLayout, UnderstandingBatch, UnderstandingSample
from infotok_lit.checkpoints import read_pickle
from infotok_lit.errors import SettingsError
from infotok_lit.models.unified import UnifiedModel
from infotok_lit.modules.base_model import InitialModel
from infotok_lit.modules.optimiser import OptimiserConfig, warmup_cosine
from infotok_lit.modules.run_callbacks import callbacks_of_models
from infotok_lit.modules.run_checkpoint import BASE_PREFIX
from infotok_lit.seeding import isolated_rng

UNDERSTANDING = BRANCHES.index("understanding")


class TokenDecoder(nn.Module):
    """Tokens (B, N, D) in the order of their canvas -> images (B, 3, height, width) in [-1, 1] (not clamped).

    A pre-norm transformer over all tokens; each token that has a place in the grid then draws its own patch.

    Args:
        token_width: D.
        layout: the canvas.
        image_size: (height, width); the grid must divide it.
        width: of the transformer; depth and heads likewise.
    """

    def __init__(
        self, token_width: int, layout: TokenLayout, image_size: tuple[int, int], width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.layout = layout
        self.patch = tuple(side // cells for side, cells in zip(image_size, layout.grid, strict=True))
        self.enter = nn.Sequential(nn.LayerNorm(token_width), nn.Linear(token_width, width))
        self.place = nn.Embedding(layout.num_tokens, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.leave = nn.Linear(width, 3 * self.patch[0] * self.patch[1])

    def forward(self, tokens: Tensor) -> Tensor:
        """The tokens without a place come first and draw nothing themselves."""
        states = self.body(self.enter(tokens) + self.place.weight)[:, self.layout.num_extra :]
        patches = self.leave(states).unflatten(1, self.layout.grid).unflatten(-1, (3, *self.patch))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class Reconstructions:
    """Measures of images beside what was made of them: the Frechet distance, PSNR (dB), SSIM, the error of pixels.

    Both sides are rounded to 8 bits, as image files would be, but for the error.

    Args:
        frechet: makes the distance.
        alone: whether this process measures while the others wait.
    """

    def __init__(
        self, frechet: Callable[..., FrechetInceptionDistance], device: torch.device, alone: bool = False
    ) -> None:
        shared = {"sync_on_compute": not alone}
        measures: dict[str, Metric] = {
            "frechet_distance": frechet(**shared),
            "psnr": PeakSignalNoiseRatio(data_range=255.0, **shared),
            "ssim": StructuralSimilarityIndexMeasure(data_range=255.0, **shared),
            "loss": MeanMetric(**shared),
            "images": SumMetric(**shared),
        }
        self.device = device
        self.measures = {name: measure.to(device) for name, measure in measures.items()}

    def update(self, images: Tensor, rebuilt: Tensor) -> None:
        """Add images and their reconstructions, both (B, 3, height, width) in [-1, 1]."""
        self.measures["loss"].update(F.mse_loss(rebuilt, images), weight=len(rebuilt))
        self.measures["images"].update(len(rebuilt))
        real, rebuilt = _levels(images), _levels(rebuilt)
        with torch.autocast(self.device.type, enabled=False):
            self.measures["frechet_distance"].update(real, real=True)
            self.measures["frechet_distance"].update(rebuilt, real=False)
            self.measures["psnr"].update(rebuilt.float(), real.float())
            self.measures["ssim"].update(rebuilt.float(), real.float())

    def compute(self) -> dict[str, Tensor]:
        """`val/probe/frechet_distance`, `psnr`, `ssim`, `loss` and the number of `images`, over all processes."""
        values = {name: measure.compute() for name, measure in self.measures.items()}
        return {f"val/probe/{name}": value.float().to(self.device) for name, value in values.items()}


class DecoderProbe(pl.LightningModule):
    """Trains a light decoder on the understanding tokens of a frozen model, and measures its reconstructions.

    Logged in validation: `val/probe/frechet_distance`, `psnr` (dB), `ssim`, `loss`, `images`. Both sides of the
    distance are rounded to 8 bits, as image files would be.

    Args:
        family: the model's family; size, init_from, parts, tokenizer and settings as for fine-tuning.
        width: of the decoder; depth and heads likewise.
        optimiser: AdamW and its schedule; `lr` is the decoder's.
        feature_network: maps images (B, 3, H, W) uint8 to features (B, d), with d as its `num_features`; None for the
            Inception of torch-fidelity (an optional package), with the weights of `inception`.
        inception: weights file of that Inception; None looks where torch-fidelity keeps its own.
        antialias: how that Inception's input is resized; False for numbers like those that are published.

    Raises:
        SettingsError: for a decoder that cannot be, or an Inception that is not there.
    """

    base: UnifiedModel
    decoder: TokenDecoder

    def __init__(
        self,
        family: str,
        size: str = "scenes32",
        init_from: str | None = "embedded",
        parts: dict[str, str] | None = None,
        tokenizer: str | None = None,
        settings: dict[str, Any] | None = None,
        width: int = 256,
        depth: int = 4,
        heads: int = 8,
        optimiser: OptimiserConfig = OptimiserConfig(lr=3e-4),  # noqa: B008 - frozen
        feature_network: nn.Module | None = None,
        inception: str | None = None,
        antialias: bool = False,
    ) -> None:
        super().__init__()
        self.initial_model = InitialModel(family, size, init_from, dict(parts or {}), tokenizer, dict(settings or {}))
        self.decoder_options = decoder_options(width, depth, heads)
        self.optimiser_config = optimiser
        self._frechet = partial(frechet_distance, feature_network, inception, antialias)
        self._frechet()
        # Outside the module tree: the network of a metric has no place in checkpoints, and is never trained.
        self._measures: Reconstructions | None = None
        # The frozen model is not in the checkpoint.
        self.strict_loading = False

    def configure_model(self) -> None:
        """Build the frozen model and the decoder once; the decoder's shape is that of the tokens of a blank image."""
        if hasattr(self, "base"):
            return
        self.base = self.initial_model.build().requires_grad_(False).eval()
        self.decoder = decoder_for(self.base, **self.decoder_options)
        trained = sum(parameter.numel() for parameter in self.decoder.parameters())
        rank_zero_info(f"A decoder of {trained:,} parameters reads the tokens of a frozen {self.base.title}.")

    def configure_callbacks(self) -> list[pl.Callback]:
        """What makes resuming exact, and gives the data its processor."""
        return callbacks_of_models()

    def hard_negatives(self, branch: Branch) -> int:
        """The probe reads no texts."""
        return 0

    def train(self, mode: bool = True) -> "DecoderProbe":
        """The frozen model stays in evaluation mode."""
        super().train(mode)
        if hasattr(self, "base"):
            self.base.eval()
        return self

    def reconstruct(self, batch: UnderstandingBatch) -> Tensor:
        """(B, 3, height, width): what the decoder makes of the tokens of the batch's images."""
        with torch.no_grad():
            tokens = self.base.understood_tokens(batch.pixel_values)
        return self.decoder(tokens.float())

    def training_step(self, batch: Mapping[Branch, Batch], batch_idx: int) -> Tensor:
        """Mean squared error of pixels in [-1, 1]."""
        images = batch["understanding"].pixel_values
        loss = F.mse_loss(self.reconstruct(batch["understanding"]), images)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start anew."""
        self._measures = Reconstructions(self._frechet, self.device)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Compare images with their reconstructions, both in 8 bits; generation batches are not looked at."""
        if dataloader_idx != UNDERSTANDING:
            return
        with isolated_rng(batch_idx, self.device):
            self._measures.update(batch.pixel_values, self.reconstruct(batch))

    def on_validation_epoch_end(self) -> None:
        """Log everything, over all processes."""
        self.log_dict(self._measures.compute())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the decoder only: the frozen model is where it was read from."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith(BASE_PREFIX)}

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over the decoder; the schedule ends at `trainer.max_steps`."""
        optimiser, schedule = optimiser_for(self.decoder, self.optimiser_config, self.trainer.max_steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def decoder_options(width: int, depth: int, heads: int) -> dict[str, int]:
    """What `TokenDecoder` is given; SettingsError for what cannot be built."""
    if min(width, depth, heads) < 1 or width % heads:
        raise SettingsError(
            f"the probe's width {width}, depth {depth} and heads {heads} must be 1 or more, and heads divide width"
        )
    return {"width": width, "depth": depth, "heads": heads}


def decoder_for(base: UnifiedModel, width: int, depth: int, heads: int) -> TokenDecoder:
    """A fresh decoder, on the CPU, of the understanding tokens of a model; its shape is that of a blank image's."""
    side = base.config.image_size
    blank = UnderstandingSample(Image.new("RGB", (side, side)), question="", answer="", name="blank")
    batch = move_data_to_device(base.processor.understanding([blank]), next(base.parameters()).device)
    with torch.no_grad(), isolated_rng(0, batch.pixel_values.device):
        output = base.understanding(batch)
    return TokenDecoder(output.tokens.shape[2], output.layout, (side, side), width, depth, heads)


def optimiser_for(
    decoder: TokenDecoder, config: OptimiserConfig, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW over a decoder, and its schedule, which ends after so many steps."""
    optimiser = torch.optim.AdamW(decoder.parameters(), config.lr, betas=config.betas, weight_decay=config.weight_decay)
    return optimiser, warmup_cosine(optimiser, config, steps)


def _levels(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8, clamped and rounded."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def frechet_distance(
    network: nn.Module | None, inception: str | None, antialias: bool, sync_on_compute: bool = True
) -> FrechetInceptionDistance:
    """The distance over a network's features; SettingsError if the Inception cannot be had."""
    if network is not None:
        return FrechetInceptionDistance(feature=network, sync_on_compute=sync_on_compute)
    if inception is not None:
        # torch-fidelity unpickles whatever it is given; this refuses a file that holds more than tensors.
        read_pickle(Path(inception))
    try:
        return FrechetInceptionDistance(
            2048, feature_extractor_weights_path=inception, antialias=antialias, sync_on_compute=sync_on_compute
        )
    except ModuleNotFoundError as error:
        raise SettingsError(
            "model.feature_network: null means the Inception of torch-fidelity, which is not installed: "
            "`pip install torch-fidelity`, or choose a network such as infotok_lit.scenes.features.SceneFeatures"
        ) from error
