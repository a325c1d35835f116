"""Logged CKA against its definition on Gram matrices: with the other branch, with captions, over training."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fit_with import fit, validate_in_one_and_two_processes
from tiny import FAMILIES, TinyModule, scenes_data, tiny_model

from infotok_lit.batch import UnderstandingSample
from infotok_lit.callbacks import TextSimilarity, TokenSimilarity


def gram_cka(x: np.ndarray, y: np.ndarray, debiased: bool) -> float:
    """Kornblith's definition with H = I - 11'/n, or Song's unbiased HSIC with zeroed diagonals."""

    def hsic(k: np.ndarray, other: np.ndarray) -> float:
        n, ones = len(k), np.ones(len(k))
        if not debiased:
            centre = np.eye(n) - 1 / n
            return np.trace(k @ centre @ other @ centre)
        k, other = k - np.diag(np.diag(k)), other - np.diag(np.diag(other))
        cross = ones @ k @ ones * (ones @ other @ ones) / ((n - 1) * (n - 2))
        return np.trace(k @ other) + cross - 2 / (n - 2) * ones @ k @ other @ ones

    k, other = x @ x.T, y @ y.T
    return hsic(k, other) / np.sqrt(hsic(k, k) * hsic(other, other))


class Tokens(pl.Callback):
    """The mean tokens of drawing, and the images, of each validation."""

    def __init__(self) -> None:
        self.drawn: list[list[torch.Tensor]] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.drawn.append([])

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if dataloader_idx == 1:
            self.drawn[-1].append(outputs.output.tokens.mean(1))


def read_tokens(module: TinyModule, count: int) -> np.ndarray:
    """The understanding branch's mean tokens of the generation branch's validation images, straight from the source."""
    source = scenes_data()._val["generation"]
    samples = [source.sample("generation", index, None) for index in range(count)]
    batch = module.base.processor.understanding([UnderstandingSample(s.image, "?", "red", s.name) for s in samples])
    with torch.no_grad():
        return module.base.eval().understanding(batch).tokens.mean(1).double().numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_logged_is_the_definition_on_the_same_images(tmp_path, family):
    module, tokens = TinyModule(family=family), Tokens()
    trainer = fit(tmp_path, [TokenSimilarity(), tokens], module, steps=2)
    drawn = torch.cat(tokens.drawn[-1]).double().numpy()
    read = read_tokens(module, 8)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/cka")}
    assert logged["val/cka/biased"] == pytest.approx(gram_cka(read, drawn, False), abs=1e-4)
    assert logged["val/cka/debiased"] == pytest.approx(gram_cka(read, drawn, True), abs=1e-3)
    pairings = [gram_cka(read, drawn[np.random.default_rng(i).permutation(8)], False) for i in range(400)]
    assert logged["val/cka/shuffled"] == pytest.approx(np.mean(pairings), abs=0.04)
    assert {"val/cka/rank_understanding", "val/cka/top_channel_generation"} <= logged.keys()
    assert not [name for name in logged if "drift" in name]


def test_drift_compares_with_the_tokens_before_training_also_after_resuming(tmp_path):
    module, whole, tokens = TinyModule(lr=0.05), TokenSimilarity(drift=True), Tokens()
    trainer = fit(tmp_path / "whole", [whole, tokens], module)
    before, after = (torch.cat(tokens.drawn[place]).double().numpy() for place in (0, -1))
    name = "val/cka_drift/generation/biased"
    assert float(trainer.callback_metrics[name]) == pytest.approx(gram_cka(before, after, False), abs=1e-4)
    assert 0 < float(trainer.callback_metrics[name]) < 0.9999

    (checkpoint,) = (tmp_path / "whole").rglob("*step=2.ckpt")
    resumed = fit(tmp_path / "resumed", [TokenSimilarity(drift=True)], TinyModule(lr=0.05), checkpoint=checkpoint)
    for branch in ("understanding", "generation"):
        logged = f"val/cka_drift/{branch}/debiased"
        assert resumed.callback_metrics[logged] == trainer.callback_metrics[logged]


def test_drift_needs_the_validation_before_training(tmp_path):
    with pytest.warns(UserWarning, match="no drift is logged.*set trainer.num_sanity_val_steps to -1"):
        trainer = fit(tmp_path, [TokenSimilarity(drift=True)], num_sanity_val_steps=0)
    assert "val/cka/debiased" in trainer.callback_metrics
    assert not [name for name in trainer.callback_metrics if "drift" in name]


def test_two_processes_log_the_value_of_all_their_images(tmp_path):
    """With OpenUni, whose tokens of drawing have no randomness."""

    def make() -> tuple[TokenSimilarity, TinyModule]:
        return TokenSimilarity(), TinyModule(family="openuni")

    whole, *halves = validate_in_one_and_two_processes(tmp_path, make, "val/cka")
    assert whole
    for half in halves:
        torch.testing.assert_close(half, whole, rtol=1e-4, atol=1e-5)


# Captions


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


def test_images_and_captions_are_compared_by_the_definition(tmp_path, monkeypatch):
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
    assert logged["val/cka_text/biased"] == pytest.approx(gram_cka(x, y, False), rel=1e-3)
    # Its chance level, by brute force: the mean over many random pairings.
    rng = np.random.default_rng(0)
    chance = np.mean([gram_cka(x, y[rng.permutation(len(y))], False) for _ in range(500)])
    assert logged["val/cka_text/shuffled"] == pytest.approx(chance, rel=0.05)
    assert {"val/cka_text/debiased", "val/cka_text/rank_tokens", "val/cka_text/rank_text"} <= set(logged)
