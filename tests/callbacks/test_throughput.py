"""How fast a run is: against clocks of our own, shapes, and torch's own counter."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fit_with import events, fit
from tiny import TinyModule, scenes_data
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from infotok_lit.callbacks import Throughput, TradeOff, throughput, trade_off
from infotok_lit.callbacks.progress import Progress
from infotok_lit.callbacks.throughput import IMAGES, MEMORY, MFU, RATE, TOKENS
from infotok_lit.modules.flops import FlopCount, flops_of, most_flops
from infotok_lit.scenes import Scenes


class Sizes(TinyModule):
    """Notes the text positions of the batches that it is trained on."""

    def training_step(self, batch, batch_idx):
        self.texts = [*getattr(self, "texts", []), sum(part.input_ids.numel() for part in batch.values())]
        return super().training_step(batch, batch_idx)


def test_speed_is_logged_over_the_time_in_training_alone(tmp_path, monkeypatch) -> None:
    """By a clock that goes on by one second whenever it is looked at: validation stops it twice in each stretch."""
    ticks = iter(range(1000))
    monkeypatch.setattr(throughput, "perf_counter", lambda: next(ticks))
    module = Sizes()
    trainer = fit(tmp_path, [Throughput(peak_tflops=1e-6)], module, accumulate_grad_batches=2, val_check_interval=100)
    found = events(trainer)
    logged = {name: [event.value for event in found.Scalars(name)] for name in (IMAGES, TOKENS, RATE, MFU)}
    # Two steps of two batches of 4 + 4 images, in a stretch of one second.
    assert logged[IMAGES] == [32.0, 32.0]
    places = 4 * 4 * 4
    assert logged[TOKENS] == [sum(module.texts[i : i + 4]) + 4 * places for i in (0, 4)]
    # 10^-6 TFLOP/s is 10^6 operations a second.
    assert logged[MFU] == pytest.approx([1e6 * rate for rate in logged[RATE]], rel=1e-5)
    assert logged[RATE][0] == logged[RATE][1] > 0
    assert MEMORY not in found.Tags()["scalars"], "a CPU has no memory of its own"


def test_a_second_fit_counts_its_own_batches(tmp_path, monkeypatch) -> None:
    """Twice the images in the same second, and so about twice the operations; texts differ in length."""
    ticks = iter(range(1000))
    monkeypatch.setattr(throughput, "perf_counter", lambda: next(ticks))
    callback, rates = Throughput(), []
    for images in (4, 8):
        data = scenes_data(batch_size=images, val_samples=8)
        found = events(fit(tmp_path, [callback], data=data, val_check_interval=100))
        rates.append(found.Scalars(RATE)[0].value)
    assert 1.7 < rates[1] / rates[0] < 2.3


@pytest.mark.parametrize("last", [False, True], ids=["before", "after"])
def test_validation_and_what_is_drawn_after_it_are_not_counted(tmp_path, monkeypatch, last) -> None:
    """Wherever what draws stands in the list of callbacks: it takes 1,000 seconds, and a training batch one."""
    clock = [0.0]
    monkeypatch.setattr(throughput, "perf_counter", lambda: clock[0])

    class Slow(pl.Callback):
        def on_before_backward(self, *_):
            clock[0] += 1.0

        def on_validation_batch_end(self, *_):
            clock[0] += 10.0

        def on_validation_end(self, *_):
            clock[0] += 1000.0

    callbacks = [Throughput(), Slow()]
    trainer = fit(tmp_path, callbacks if last else callbacks[::-1], val_check_interval=1)
    assert [event.value for event in events(trainer).Scalars(IMAGES)] == [8.0, 8.0]


@pytest.mark.parametrize("last", [False, True], ids=["before", "after"])
def test_a_benchmark_between_steps_is_not_counted(tmp_path, monkeypatch, last) -> None:
    """Wherever it stands in the list of callbacks: it takes 1,000 seconds, and a training batch one."""
    clock = [0.0]
    monkeypatch.setattr(throughput, "perf_counter", lambda: clock[0])

    class Slow(TradeOff):
        def _rows(self, *_):
            clock[0] += 1000.0
            return []

        def on_train_batch_start(self, *_):
            clock[0] += 1.0

    monkeypatch.setattr(trade_off, "change", lambda *_: {})
    callbacks = [Throughput(), Slow(every_n_steps=1)]
    trainer = fit(tmp_path, callbacks if last else callbacks[::-1], val_check_interval=100)
    assert [event.value for event in events(trainer).Scalars(IMAGES)] == [8.0, 8.0]


def test_the_bar_shows_it(tmp_path) -> None:
    bar = Progress()
    trainer = fit(tmp_path, [Throughput(peak_tflops=1.0), bar], enable_progress_bar=True)
    shown = bar.get_metrics(trainer, trainer.lightning_module)
    assert {"images/s", "tokens/s", "MFU"} <= shown.keys() and shown["images/s"] > 0


def test_operations_are_those_of_the_closed_form() -> None:
    """Two products of (6, 5) with (5, 7): one forward and, as the input needs no gradient, one backward."""
    layer = nn.Linear(5, 7, bias=False)
    with FlopCount() as count:
        layer(torch.randn(6, 5)).sum().backward()
    assert count.total == 2 * (2 * 6 * 5 * 7)


def test_operations_are_those_that_torch_counts() -> None:
    """But for attention on a CPU, which torch leaves out: so with the attention that is made of products."""
    module, torchs, ours = TinyModule(), FlopCounterMode(display=False), FlopCount()
    module.configure_model()
    samples = [Scenes().sample("understanding", index, np.random.default_rng(0)) for index in range(4)]
    batch = module.base.processor.understanding(samples)
    for counter in (torchs, ours):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
            module.base.understanding(batch).loss_sum.backward()
    assert ours.total == torchs.get_total_flops() > 0


def test_attention_counts_on_a_cpu() -> None:
    """Four products of (n, d) with (d, n) forward in multiplications and additions; two and a half times that back."""
    query = torch.randn(2, 3, 16, 8, requires_grad=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION), FlopCount() as count:
        nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    forward = 2 * (2 * 2 * 3 * 16 * 16 * 8)
    assert count.total == forward + 2.5 * forward


@pytest.mark.parametrize("kernel", ["flash_attention", "efficient_attention", "cudnn_attention"])
def test_a_cards_attention_counts_for_every_head_of_the_query(kernel) -> None:
    """Also where four heads share keys and values, which torch's own list refuses; by shapes, as there is no card."""
    query, shared = torch.empty(2, 8, 16, 4), torch.empty(2, 2, 12, 4)
    forward = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default
    backward = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_backward").default
    one_product = 2 * (2 * 8 * 16 * 12 * 4)
    assert flops_of(forward, (query, shared, shared), {}, query) == 2 * one_product
    assert flops_of(backward, (query, query, shared, shared), {}, query) == 5 * one_product


def test_flex_attention_counts_and_runs_uncompiled_meanwhile(recwarn) -> None:
    """A compiler that fails when it is asked stands for one that nothing must ask."""

    def refuse(*_):
        raise AssertionError("compiled")

    compiled = torch.compile(flex_attention, backend=refuse)
    query, shared = torch.randn(2, 4, 128, 16), torch.randn(2, 2, 128, 16)
    with torch.no_grad(), FlopCount() as count:
        compiled(query, shared, shared, enable_gqa=True)
    assert count.total == 2 * 2 * (2 * 4 * 128 * 128 * 16)
    assert not [one for one in recwarn if "flex_attention" in str(one.message)]
    with torch.no_grad(), pytest.raises(Exception, match="compiled"):
        compiled(query, shared, shared, enable_gqa=True)


def test_a_cpu_has_no_known_peak() -> None:
    assert most_flops(torch.device("cpu"), "bf16-mixed") is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989.4e12), ("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA A100-SXM4-80GB", 312e12)],
)
def test_a_cards_peak_is_its_makers_without_sparsity(name, peak, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert most_flops(torch.device("cuda"), "bf16-mixed") == peak
