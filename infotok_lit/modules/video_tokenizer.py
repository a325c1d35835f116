"""The LightningModule of the adaptive video tokenizer, and the callback that exports what it trained."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from infotok_lit.budgets import MIN_RATE
from infotok_lit.checkpoints import CHECKPOINT_KEY, KeyMap, exported_family, find_checkpoint, read_run
from infotok_lit.errors import SettingsError
from infotok_lit.models.export import Weights
from infotok_lit.modules.average import AVERAGE, module_weights, record_of_average, weights_in_words
from infotok_lit.modules.base_model import refuse_lost_average
from infotok_lit.modules.finite import FiniteGuard
from infotok_lit.modules.optimiser import MaskedAdamW, OptimiserConfig, build_optimiser, clip_apart, warmup_cosine
from infotok_lit.modules.run_callbacks import callbacks_of_every_run, run_folder, tell_model_is_built
from infotok_lit.seeding import isolated_rng
from infotok_lit.video import FAMILY
from infotok_lit.video.datamodule import ClipBatch
from infotok_lit.video.losses import LossConfig, Vgg16Features, psnr, reconstruction_losses
from infotok_lit.video.official import config_from, export_tokenizer, load_official_file, load_tokenizer
from infotok_lit.video.rates import RateConfig
from infotok_lit.video.tokenizer import SIZES, VideoTokenizer, keep_clipwide
from infotok_lit.video.windows import to_frames, to_pixels

PREFIX = "tokenizer."


class VideoTokenizerModule(pl.LightningModule):
    """Trains a video tokenizer to reconstruct clips from the tokens that the router keeps.

    Args:
        size: `4x8x8` (the released one), `8x8x8`, or `scenes`, which trains on a CPU.
        init_from: Where the weights come from: an exported folder, an official file (of Cosmos's tokenizer too, whose
            transformers then start anew), or a run. None starts from random weights.
        settings: Entries of the tokenizer's configuration that differ from the size's.
        rates: What share of their tokens training clips keep.
        losses: What reconstruction costs.
        optimiser: AdamW and its schedule; `heads_lr` is not used.
        val_rates: The mean rates over the validation clips at which these are reconstructed, each from 1/16 to 1:
            `elboema` shares them out by the clips' errors, the other strategies give each clip the same.
    """

    tokenizer: VideoTokenizer

    def __init__(
        self,
        size: str = "scenes",
        init_from: str | None = None,
        settings: dict[str, Any] | None = None,
        rates: RateConfig = RateConfig(),  # noqa: B008 - frozen
        losses: LossConfig = LossConfig(),  # noqa: B008 - frozen
        optimiser: OptimiserConfig = OptimiserConfig(lr=1e-4, betas=(0.5, 0.999), weight_decay=0.01),  # noqa: B008
        val_rates: tuple[float, ...] = (1.0, 0.5, 0.25),
    ) -> None:
        super().__init__()
        if size not in SIZES:
            raise SettingsError(f"model.size: there is no video tokenizer {size!r}; choose one of {', '.join(SIZES)}")
        self.shape = config_from(asdict(SIZES[size]) | dict(settings or {}), "model.settings")
        self.init_from = init_from
        self.rates, self.losses = rates, losses
        self.optimiser_config = optimiser
        self.val_rates = tuple(val_rates)
        if not all(MIN_RATE <= rate <= 1 for rate in val_rates) or len(set(val_rates)) < len(self.val_rates):
            raise SettingsError(f"val_rates must be between 1/16 and 1, each once, got {list(val_rates)}")
        self.guard = FiniteGuard()

    def configure_model(self) -> None:
        """Build the tokenizer once; a resumed run then overwrites its weights."""
        if hasattr(self, "tokenizer"):
            return
        self.tokenizer = VideoTokenizer(self.shape, self.rates.running_mean())
        if self.init_from is not None:
            load_weights(self.tokenizer, Path(self.init_from))
        weights = self.losses.vgg_weights if self.losses.needs_features else None
        # In a list, so that the network is in no checkpoint.
        self._features = [] if weights is None else [Vgg16Features.from_file(Path(weights))]
        tell_model_is_built(self)

    def configure_callbacks(self) -> list[pl.Callback]:
        """What makes resuming exact, also for a Trainer that was built by hand."""
        return callbacks_of_every_run()

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        """Encode, route, drop and decode; the loss is a mean over the batch."""
        pixels = to_pixels(batch.clips)
        done = self.tokenizer.reconstruct(pixels, self._draw_rates, self.rates.mask)
        features = self._features[0].to(self.device) if self._features else None
        parts = reconstruction_losses(pixels, done.pixels, self.global_step, self.losses, features)
        total = self.guard.watch_losses(
            {f"clips/{name}": value for name, value in parts.items()}, {"clips": batch}, self.global_step
        )
        self.log("train/loss", total.detach(), prog_bar=True)
        self.log_dict({f"train/{name}": value.detach() for name, value in parts.items()})
        self.log("train/rate", done.rate.mean())
        self.log("train/complexity", self.tokenizer.complexity.mean[0])
        return total

    def _draw_rates(self, token_map: Tensor) -> Tensor:
        """Take the clips' errors into the running mean, the same on all processes, and draw their rates."""
        error = self.trainer.strategy.reduce(token_map.mean(), reduce_op="mean")
        self.tokenizer.complexity.update(error)
        return self.rates.draw(token_map, self.tokenizer.complexity)

    def configure_gradient_clipping(
        self,
        optimizer: MaskedAdamW,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and mask a step that is not finite; the run stops at the next step that logs."""
        parts = {"tokenizer": self.tokenizer.parameters()}
        norms = clip_apart(parts, gradient_clip_val, gradient_clip_algorithm)
        self.guard.finish_step(norms, optimizer, self)
        self.log("train/gradient_norm", norms["tokenizer"])

    def on_train_end(self) -> None:
        """What happened since the last step that logged."""
        self.guard.check(self, self.trainer)

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation's clips."""
        self._validated: list[tuple[Tensor, Tensor, Tensor]] = []

    def validation_step(self, batch: ClipBatch, batch_idx: int) -> None:
        """Encode the clips and measure how hard they are; what they are kept at depends on all of them."""
        pixels = to_pixels(batch.clips)
        codes = self.tokenizer.encode(pixels).codes
        self._validated.append((batch.clips.cpu(), codes.cpu(), self.tokenizer.token_map(pixels, codes).cpu()))

    def on_validation_epoch_end(self) -> None:
        """Log the PSNR of uint8 frames in dB, and the share of tokens that were kept, at each of the mean rates."""
        own = torch.cat([token_map.flatten(1).mean(1) for *_, token_map in self._validated]).to(self.device)
        errors = self.all_gather(own).flatten()
        mine = slice(self.global_rank * len(own), (self.global_rank + 1) * len(own))
        for mean_rate in self.val_rates:
            rates = self.rates.at_mean(errors, mean_rate)[mine].cpu().split([len(part[0]) for part in self._validated])
            quality, kept = [], []
            # Random masks are the same in each validation, and take none of training's random numbers.
            with isolated_rng(self.global_rank, self.device), self.trainer.precision_plugin.val_step_context():
                for (clips, codes, token_map), rate in zip(self._validated, rates, strict=True):
                    mask = keep_clipwide(token_map, rate, self.rates.mask)
                    frames = to_frames(self.tokenizer.decode((codes * mask[:, None]).to(self.device)))
                    quality.append(psnr(clips, frames.cpu()))
                    kept.append(mask.float().flatten(1).mean(1))
            self.log(f"val/psnr_{mean_rate:g}", torch.cat(quality).mean().to(self.device), sync_dist=True)
            self.log(f"val/kept_{mean_rate:g}", torch.cat(kept).mean().to(self.device), sync_dist=True)
        self.log("val/error", errors.mean())
        self._validated.clear()

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW; biases, norms and the embedding do not decay. The schedule ends at `trainer.max_steps`."""
        optimiser = build_optimiser(self.optimiser_config, self.tokenizer, nn.Module(), _decays)
        schedule = warmup_cosine(optimiser, self.optimiser_config, self.trainer.max_steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the tokenizer without this class; primitives only."""
        checkpoint[CHECKPOINT_KEY] = {
            "family": FAMILY,
            "config": self.tokenizer.config.to_dict(),
            "init_from": self.init_from,
            "step": self.global_step,
            "rates": asdict(self.rates) | {"bases": list(self.rates.bases)},
            AVERAGE: record_of_average(self),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to lose the run's moving average."""
        refuse_lost_average(self, checkpoint)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and name != "temporal_embedding"


def load_weights(tokenizer: VideoTokenizer, source: Path) -> None:
    """Initial weights from an exported folder, an official file, or a run; the shape must fit.

    Raises:
        MissingFileError: if there is nothing at `source`.
        CheckpointError: if the weights do not fit or cannot be read.
    """
    if exported_family(source) is not None:
        weights = load_tokenizer(source).state_dict()
    elif (checkpoint := find_checkpoint(source)) is not None:
        trained = rebuild_tokenizer(read_run(checkpoint), str(source))
        trained.complexity.settle()  # this run may average by another factor
        weights = trained.state_dict()
    else:
        load_official_file(tokenizer, source)
        return
    tokenizer.load_state_dict(KeyMap(renames=()).from_official(weights, tokenizer.state_dict(), str(source)))


def run_weights(checkpoint: dict[str, Any], weights: Weights = "averaged") -> dict[str, Tensor]:
    """The tokenizer's weights in a run's checkpoint: if the run kept a moving average, that or the `raw` ones."""
    state = module_weights(checkpoint, weights)
    return {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}


def rebuild_tokenizer(checkpoint: dict[str, Any], source: str, weights: Weights = "averaged") -> VideoTokenizer:
    """The tokenizer of a run's checkpoint, in evaluation mode; CheckpointError says what does not fit."""
    saved = checkpoint[CHECKPOINT_KEY]
    tokenizer = VideoTokenizer(config_from(saved["config"], source), RateConfig(**saved["rates"]).running_mean())
    state = run_weights(checkpoint, weights)
    tokenizer.load_state_dict(KeyMap(renames=()).from_official(state, tokenizer.state_dict(), source))
    return tokenizer.eval()


def export_run(checkpoint: dict[str, Any], source: Path, out: Path, weights: Weights, force: bool = False) -> None:
    """Write the tokenizer of a run's checkpoint, which `source` names, as an inference folder."""
    saved = checkpoint[CHECKPOINT_KEY]
    provenance = {"run": source, "step": saved["step"], "rates": saved["rates"]["strategy"]}
    provenance["weights"] = weights_in_words(checkpoint, weights)
    export_tokenizer(rebuild_tokenizer(checkpoint, str(source), weights), out, provenance, force)


class ExportTokenizer(pl.Callback):
    """At the end of `fit`, write the tokenizer as an inference folder.

    Args:
        folder: Where to write; default: `export` in the run folder, or of a run without a logger, in its
            `default_root_dir`.
        force: Replace an existing folder.
    """

    def __init__(self, folder: str | None = None, force: bool = False) -> None:
        self.folder, self.force = folder, force

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a target that exists before training, not after; a run's own can only hold an export of the same."""
        if stage != "fit" or (self.folder is None and trainer.loggers):
            return
        folder = self._target(Path(trainer.default_root_dir))
        if folder.exists() and not self.force:
            raise SettingsError(f"ExportTokenizer: {folder} exists; choose another folder or set force: true")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: VideoTokenizerModule) -> None:
        """Export on the first process; with a moving average of the weights, that is what the module holds by now."""
        own = run_folder(trainer)  # all processes settle it between them
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        run = Path(own or trainer.default_root_dir)
        out = self._target(run)
        provenance = {"run": run, "step": trainer.global_step, "rates": pl_module.rates.strategy}
        export_tokenizer(pl_module.tokenizer, out, provenance, self.force or (self.folder is None and own is not None))
        rank_zero_info(f"The tokenizer is in {out}.")

    def _target(self, run: Path) -> Path:
        return Path(self.folder) if self.folder is not None else run / "export"
