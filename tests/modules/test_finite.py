"""Numbers that are not finite: nothing waits for the device, no weight is changed, and the run stops when it logs."""

import traceback
from contextlib import ExitStack
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from test_fair_comparison import BALANCED
from test_training_step import TERMS, trainer
from tiny import TinyModule, scenes_data
from torch.utils._python_dispatch import TorchDispatchMode

from infotok_lit.modules.finite import NonFiniteError
from infotok_lit.objective.alignment import NegativesConfig

WATCHED = ("infotok_lit/modules/", "infotok_lit/objective/")


class NoReading(TorchDispatchMode):
    """Refuses to read a number from the device, if our training code does it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            frames = traceback.extract_stack()
            ours = [frame for frame in frames if "infotok_lit/" in frame.filename]
            if ours and any(part in ours[-1].filename for part in WATCHED):
                raise AssertionError(f"a number is read at {ours[-1]}")
        return function(*args, **(kwargs or {}))


class Watch(pl.Callback):
    """Puts steps that do not log under `NoReading`."""

    def __init__(self) -> None:
        self.watched = 0
        self.stack = ExitStack()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if (trainer.global_step + 1) % trainer.log_every_n_steps:
            self.stack.enter_context(NoReading())
            self.watched += 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.stack.close()


@pytest.mark.parametrize("family", ["harmon", "showo2"])
@pytest.mark.parametrize("estimator", ["variational", "hsic"])
def test_only_steps_that_log_read_from_the_device(tmp_path, family, estimator) -> None:
    module, watch = TinyModule(TERMS, family=family), Watch()
    negatives = NegativesConfig(queue_size=8, limit=4)
    module.objective_config = replace(
        module.objective_config, estimator=estimator, balance=BALANCED, negatives=negatives
    )
    torch.manual_seed(0)
    run = trainer(tmp_path, max_steps=6, log_every_n_steps=3, limit_val_batches=0, gradient_clip_val=1.0)
    run.callbacks.append(watch)
    with watch.stack:
        run.fit(module, scenes_data())
    assert watch.watched == 4 and run.global_step == 6


def test_the_watch_would_see_a_reading() -> None:
    from infotok_lit.objective.report import inert_message

    with pytest.raises(AssertionError, match="a number is read"), NoReading():
        inert_message("generation", torch.tensor(0.0), torch.tensor(1.0))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_step_changes_nothing_and_the_next_one_that_logs_names_it(tmp_path, where) -> None:
    """Step 1 of 4 is bad; steps 0, 2 and 3 train; the last one logs."""
    module = TinyModule(())
    module.configure_model()
    weights: list[dict[str, torch.Tensor]] = []

    def keep() -> None:
        weights.append({name: value.clone() for name, value in module.state_dict().items()})

    original = module.base.understanding

    def poisoned(batch, transform=None):
        output = original(batch, transform)
        if where == "loss" and module.global_step == 1:
            output.loss_sum = output.loss_sum + float("inf")
        return output

    module.base.understanding = poisoned
    if where == "gradient":
        module.base.encoder.token_embed.weight.register_hook(
            lambda gradient: gradient * (float("nan") if module.global_step == 1 else 1)
        )
    named = {"loss": r"understanding/task = inf\. Samples: understanding: scenes32", "gradient": "base = nan"}
    run = trainer(tmp_path, max_steps=8, log_every_n_steps=4, limit_val_batches=0)
    run.callbacks.append(pl.callbacks.LambdaCallback(on_train_batch_start=lambda *_: keep()))
    torch.manual_seed(0)
    with pytest.raises(NonFiniteError, match=f"step 1: not finite: {named[where]}.*No weight was changed by it"):
        run.fit(module, scenes_data())
    assert module.global_step == 3
    moved = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in zip(weights, weights[1:], strict=False)]
    assert moved == [True, False, True]
    assert all(value.isfinite().all() for value in module.state_dict().values() if value.is_floating_point())


def test_what_happens_after_the_last_step_that_logs_is_found_at_the_end(tmp_path) -> None:
    module = TinyModule(())
    module.configure_model()
    module.base.encoder.token_embed.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteError, match="step 0"):
        trainer(tmp_path, max_steps=2, log_every_n_steps=50, limit_val_batches=0).fit(module, scenes_data())


def test_a_run_that_never_logs_trains_and_is_checked_all_the_same(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("infotok_lit.modules.finite.UNLOGGED_EVERY", 3)
    module = TinyModule(())
    module.configure_model()
    module.base.encoder.token_embed.weight.register_hook(
        lambda gradient: gradient * (float("nan") if module.global_step == 4 else 1)
    )
    with pytest.raises(NonFiniteError, match="step 4"):
        trainer(tmp_path, max_steps=9, log_every_n_steps=0, limit_val_batches=0).fit(module, scenes_data())
    assert module.global_step == 5, "at the end of the sixth step"


def test_weights_that_are_not_finite_are_not_blamed_on_the_learning_rate(tmp_path) -> None:
    module = TinyModule(())
    module.configure_model()
    module.base.encoder.token_embed.weight.data[0, 0] = float("nan")
    with pytest.raises(
        NonFiniteError, match=r"The weights themselves are not finite \(base.encoder.token_embed"
    ) as said:
        trainer(tmp_path, limit_val_batches=0).fit(module, scenes_data())
    assert "optimiser.lr" not in str(said.value)


def test_a_grad_scaler_may_overflow_and_go_on(tmp_path) -> None:
    """A scale that float16 cannot hold: the scaler skips steps and lowers it, until training goes on."""
    module = TinyModule(TERMS, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=1000, backoff_factor=2.0**-40)
    scales: list[float] = []
    run = trainer(
        tmp_path,
        max_steps=4,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
    )
    weights: list[torch.Tensor] = []

    def keep(*_) -> None:
        scales.append(scaler.get_scale())
        weights.append(torch.cat([parameter.detach().flatten() for parameter in module.base.parameters()]))

    run.callbacks.append(pl.callbacks.LambdaCallback(on_train_start=keep, on_train_batch_end=keep))
    torch.manual_seed(0)
    run.fit(module, scenes_data())
    assert scales[1] < scales[0] == 2.0**60, "the first step has overflowed"
    assert torch.equal(weights[1], weights[0]) and not torch.equal(weights[-1], weights[0])
    assert weights[-1].isfinite().all()


def test_optimiser_states_of_older_runs_load() -> None:
    """They were written by AdamW without the mask."""
    from infotok_lit.modules.optimiser import MaskedAdamW

    def step(optimiser, parameter) -> None:
        parameter.grad = parameter.detach().cos()
        optimiser.step()

    old, new = (torch.nn.Parameter(torch.linspace(-1, 1, 9)) for _ in range(2))
    before = torch.optim.AdamW([old], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    step(before, old)
    new.data.copy_(old.data)
    after = MaskedAdamW([{"params": [new], "lr": 1e-2, "weight_decay": 0.1}], (0.9, 0.95), 1e-8)
    after.load_state_dict(before.state_dict())
    step(before, old)
    step(after, new)
    torch.testing.assert_close(new, old)
    after.mask(torch.tensor(1.0))
    kept, state = new.detach().clone(), {name: value.clone() for name, value in after.state[new].items()}
    new.grad = torch.full_like(new, float("nan"))
    after.step()
    assert torch.equal(new, kept)
    torch.testing.assert_close(after.state[new], state, rtol=0, atol=0)
