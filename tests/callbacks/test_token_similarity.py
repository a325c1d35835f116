"""Logged CKA against its definition on Gram matrices, drift, and two processes against one."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fit_with import fit, validate_in_one_and_two_processes
from tiny import FAMILIES, TinyModule, scenes_data

from infotok_lit.batch import UnderstandingSample
from infotok_lit.callbacks import TokenSimilarity


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
