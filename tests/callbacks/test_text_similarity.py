"""CKA between images and captions: texts do not know their padding, and the value is the definition's."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from tiny import FAMILIES, TinyModule, scenes_data, tiny_model

from infotok_lit.callbacks import TextSimilarity


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_does_not_know_its_padding(family):
    model = tiny_model(family)
    ids = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    together = model.last_hidden_states(ids, mask)
    alone = model.last_hidden_states(ids[1:, :2], mask[1:, :2])
    assert torch.allclose(together[1, :2], alone[0], atol=1e-5)
    # Causal: the first states do not know what follows.
    assert torch.allclose(together[0, :3], model.last_hidden_states(ids[:1, :3], mask[:1, :3])[0], atol=1e-5)
    assert not torch.allclose(together[0, 0], together[1, 0])


def centred_cka(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return np.square(y.T @ x).sum() / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def test_the_value_is_that_of_the_definition(tmp_path, monkeypatch):
    rows = []
    real = TextSimilarity.on_validation_batch_end

    def watch(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        real(self, trainer, module, outputs, batch, batch_idx, dataloader_idx)
        if dataloader_idx == 1:
            rows.append((module.base, batch))

    monkeypatch.setattr(TextSimilarity, "on_validation_batch_end", watch)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[TextSimilarity()],
    )  # fmt: skip
    values = trainer.validate(TinyModule(), scenes_data(batch_size=4, val_samples=12), verbose=False)
    logged = {name: value for part in values for name, value in part.items()}
    images, captions = [], []
    with torch.no_grad():
        for base, batch in rows:
            for pixels, ids, mask in zip(batch.pixel_values, batch.text.ids, batch.text.mask, strict=True):
                images.append(base.understood_tokens(pixels[None])[0].mean(0).numpy())
                own = ids[mask.bool()][None]
                captions.append(base.last_hidden_states(own, torch.ones_like(own))[0].mean(0).numpy())
    x, y = (np.stack(part).astype(np.float64) for part in (images, captions))
    assert len(x) == 12
    assert logged["val/cka_text/biased"] == pytest.approx(centred_cka(x, y), rel=1e-3)
    # Its chance level, by brute force: the mean over many random pairings.
    rng = np.random.default_rng(0)
    chance = np.mean([centred_cka(x, y[rng.permutation(len(y))]) for _ in range(2000)])
    assert logged["val/cka_text/shuffled"] == pytest.approx(chance, rel=0.05)
    assert {"val/cka_text/debiased", "val/cka_text/rank_tokens", "val/cka_text/rank_text"} <= set(logged)
