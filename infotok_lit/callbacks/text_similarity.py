"""Table 1, right: linear CKA between visual tokens and what the language model makes of the captions."""

import lightning.pytorch as pl
import torch

from infotok_lit.batch import BRANCHES, GenerationBatch
from infotok_lit.callbacks.token_similarity import log_similarity, understood_tokens
from infotok_lit.metrics.cka import LinearCKA
from infotok_lit.modules.losses import BranchResult
from infotok_lit.objective.distributed import gather_rows

GENERATION = BRANCHES.index("generation")


class TextSimilarity(pl.Callback):
    """At each validation, logs linear CKA between understanding tokens and final text states of the same pairs.

    The pairs are those of the generation branch. An image is the mean of its understanding tokens; a caption is the
    mean of the language model's last hidden states over its own tokens, fed without the image and without a template:
    after an image they would carry visual content, and be alike for that. The paper leaves this open.

    Logged under `val/cka_text/...`: `debiased`, the one to read; `biased`, Kornblith's; `shuffled`, what the biased one
    is for pairs at random, its chance level; effective dimensions and the share of the largest channel of either side.
    """

    def __init__(self) -> None:
        self._alike: LinearCKA | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start anew."""
        self._alike = None

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: BranchResult,
        batch: GenerationBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a generation batch's images and captions."""
        if dataloader_idx != GENERATION:
            return
        images = understood_tokens(trainer, pl_module, batch).float().mean(1)
        ids, mask = batch.text.ids, batch.text.mask
        with trainer.precision_plugin.val_step_context():
            states = pl_module.base.last_hidden_states(ids, mask)
        weights = mask.float()[..., None]
        captions = (states.float() * weights).sum(1) / weights.sum(1)
        images, captions = gather_rows(images, captions)
        if self._alike is None:
            self._alike = LinearCKA(images.shape[1], captions.shape[1], sync_on_compute=False).to(images.device)
        self._alike.update(images, captions)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log."""
        if self._alike is not None:
            log_similarity(pl_module, "val/cka_text", self._alike, ("tokens", "text"))
