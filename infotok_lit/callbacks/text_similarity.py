"""Table 1, right: linear CKA between visual tokens and what the language model makes of the captions."""

import lightning.pytorch as pl
from torch import Tensor

from infotok_lit.batch import GenerationBatch
from infotok_lit.callbacks.token_similarity import ImageSimilarity, understood_tokens
from infotok_lit.modules.losses import BranchResult


class TextSimilarity(ImageSimilarity):
    """At each validation, logs linear CKA between understanding tokens and final text states of the same pairs.

    The pairs are those of the generation branch. An image is the mean of its understanding tokens; a caption is the
    mean of the language model's last hidden states over its own tokens, fed without the image and without a template:
    after an image they would carry visual content, and be alike for that. The paper leaves this open. Logged under
    `val/cka_text/...`.
    """

    prefix = "val/cka_text"
    sides = ("tokens", "text")

    def views(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: BranchResult, batch: GenerationBatch
    ) -> tuple[Tensor, Tensor]:
        """The mean tokens of the images, and the mean states of their captions."""
        images = understood_tokens(trainer, pl_module, batch).float().mean(1)
        with trainer.precision_plugin.val_step_context():
            states = pl_module.base.last_hidden_states(batch.text.ids, batch.text.mask)
        weights = batch.text.mask.float()[..., None]
        return images, (states.float() * weights).sum(1) / weights.sum(1)
