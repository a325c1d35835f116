"""A training step waits for no device: it reads no tensor back, and copies no constant there.

There is no GPU here, so what would wait is counted: operations whose result a host must know before it can go on.
"""

import traceback
from collections import Counter
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny import FAMILIES, TinyModule, scenes_data
from torch.utils._python_dispatch import TorchDispatchMode

from infotok_lit.errors import SettingsError
from infotok_lit.models.common import language_model
from infotok_lit.models.common.language_model import required
from infotok_lit.objective.balance import BalanceConfig, Shares

aten = torch.ops.aten
WAITING = (
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.masked_scatter_backward),
    *(aten.equal, aten.bincount, aten.lift_fresh),
)
"""The last one is a constant that becomes a tensor, and on a GPU is copied there."""
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
ON_THE_HOST = "truncated_normal_ratio"
"""Draws the mask ratio on the host, whatever the device, since shapes follow from it."""


class WaitCounter(TorchDispatchMode):
    """Counts, by operation and by the line of ours that led to it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = operation.overloadpacket
        masks = packet in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if packet in WAITING or masks:
            ours = [frame for frame in traceback.extract_stack() if "/infotok_lit/" in frame.filename]
            if not ours or ours[-1].name != ON_THE_HOST:
                place = f"{ours[-1].filename}:{ours[-1].lineno}" if ours else "elsewhere"
                self.found[str(operation), place] += 1
        return operation(*args, **(kwargs or {}))


class CountedStep(pl.Callback):
    """Counts in the second step: from the batch to the changed weights."""

    def __init__(self) -> None:
        self.counter = WaitCounter()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            self.counter.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            self.counter.__exit__(None, None, None)


def waits(family: str) -> Counter[tuple[str, str]]:
    counted = CountedStep()
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        limit_val_batches=0,
        callbacks=[counted],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = TinyModule(family=family)
    # As by default: the terms' weights are measured, and reported.
    shares = Shares(compactness=0.1, sufficiency=0.1, alignment=0.1)
    balance = BalanceConfig(understanding=shares, generation=shares)
    module.objective_config = replace(module.objective_config, balance=balance)
    trainer.fit(module, scenes_data())
    return counted.counter.found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_waits_for_no_device(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "read_at_once", lambda tensor: False)
    assert not waits(family)


def test_what_waits_is_counted() -> None:
    """On the host, what a batch must fulfil is read; so the counter counts."""
    assert sum(waits("harmon").values()) == 1


def test_the_counter_knows_what_waits() -> None:
    x, mask = torch.arange(3.0), torch.tensor([True, False, True])
    rows = torch.ones(2, requires_grad=True)
    for read in (
        lambda: x[mask],
        lambda: mask.nonzero(),
        lambda: float(x[0]),
        lambda: torch.tensor([1.0]),
        lambda: torch.as_tensor(1.0),
        lambda: x.masked_scatter(mask, rows).sum().backward(),
    ):
        with WaitCounter() as counter:
            read()
        assert sum(counter.found.values()) == 1


def test_what_does_not_hold_is_an_error_or_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    values, holds, fails = torch.ones(2), torch.tensor(True), torch.tensor(False)
    assert torch.equal(required(values, holds, lambda: "no"), values)
    with pytest.raises(SettingsError, match="no"):
        required(values, fails, lambda: "no")
    monkeypatch.setattr(language_model, "read_at_once", lambda tensor: False)
    assert torch.equal(required(values, holds, lambda: "no"), values)
    assert required(values, fails, lambda: "no").isnan().all()
