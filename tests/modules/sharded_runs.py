"""What the processes of test_sharding.py do.

Each family is trained under DDP and under FSDP2 with everything else equal, and leaves what it was in a file per rank.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, Strategy
from tiny import FAMILIES, TinyModule, scenes_data

from infotok_lit.callbacks.export import ExportInference
from infotok_lit.callbacks.weight_average import WeightAverage
from infotok_lit.checkpoints import CheckpointError
from infotok_lit.modules import HarmonModule
from infotok_lit.modules.lora import LoraConfig
from infotok_lit.modules.losses import TaskWeights
from infotok_lit.modules.run_checkpoint import WholeCheckpoints
from infotok_lit.modules.sharded_strategy import ShardedStrategy
from infotok_lit.modules.sharding import own_share
from infotok_lit.objective.balance import BalanceConfig, Shares

STEPS = 4
CLIPPED = 0.1
KEPT = ("steps", "names", "validation", "answers", "bytes")
CHECKPOINT = "step=2.ckpt"


class Record(pl.Callback):
    """What is logged at every step, and how many bytes this process holds after the last."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.names: list[list[str]] = []
        self.validation: dict[str, float] = {}
        self.answers: list[str] = []
        self.bytes = 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int):
        self.names.append(batch["understanding"].names + batch["generation"].names)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")})

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any):
        self.answers += outputs.answers or []

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validation = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        (optimiser,) = trainer.optimizers
        tensors = [*pl_module.parameters()]
        tensors += [value for state in optimiser.state.values() for value in state.values()]
        self.bytes = sum(own_share(tensor).numel() * tensor.element_size() for tensor in tensors)


def fit(
    folder: Path,
    module: TinyModule,
    strategy: Strategy | str,
    devices: int = 2,
    checkpoint: Path | None = None,
    keeps: bool = False,
    steps: int = STEPS,
    callbacks: Sequence[pl.Callback] = (),
) -> pl.Trainer:
    """A run of a few steps with validation, which goes on from a checkpoint.

    Args:
        keeps: whether it has checkpoints and an export of its own, and a validation before its first step.
    """
    pl.seed_everything(0, verbose=False)
    record = Record()
    kept = [
        ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1, save_last="link"),
        ExportInference(str(folder / "export"), force=True),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    data = scenes_data(batch_size=8 // devices)
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=steps,
        max_epochs=1,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        num_sanity_val_steps=int(keeps),
        log_every_n_steps=1,
        gradient_clip_val=CLIPPED,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[WholeCheckpoints()],
        callbacks=[record, *callbacks, *(kept if keeps else ())],
        enable_checkpointing=keeps,
    )
    trainer.fit(module, data, ckpt_path=checkpoint)
    torch.save({name: getattr(record, name) for name in KEPT}, folder / f"record_{trainer.global_rank}.pt")
    return trainer


def module(family: str, **options: Any) -> TinyModule:
    """Of each family what it trains by default."""
    freeze = ("vlm.",) if family == "openuni" else ()
    made = TinyModule(family=family, freeze=freeze, task_weights=TaskWeights(reconstruction=1.0), **options)
    # Some gradients are zero but for rounding, as that of a bias of keys, and Adam would scale the rounding up.
    made.optimiser_config = replace(made.optimiser_config, eps=1e-5)
    return made


def with_lora() -> TinyModule:
    """Adapters in a frozen language model."""
    return TinyModule(freeze=("llm.",), lora=LoraConfig(("llm.model.*",), rank=2))


def halved() -> TinyModule:
    """The same, kept in bfloat16."""
    made = with_lora()
    made.halve_frozen = True
    return made


def with_inline_bottleneck() -> TinyModule:
    """The heads' noise is put on the tokens inside the base model, with a weight that is found."""
    return balanced(TinyModule(("compactness", "alignment"), "inline"))


def with_placebo() -> TinyModule:
    """The heads see copies of the tokens."""
    made = balanced(TinyModule())
    made.objective_config = replace(made.objective_config, placebo=True)
    return made


def balanced(made: TinyModule) -> TinyModule:
    """With strengths that follow the task's pull."""
    shares = Shares(compactness=0.03, sufficiency=0.1, alignment=0.3)
    made.objective_config = replace(made.objective_config, balance=BalanceConfig(shares, shares))
    return made


OTHERS = {
    "lora": with_lora,
    "halved": halved,
    "balanced": lambda: balanced(TinyModule()),
    "inline": with_inline_bottleneck,
    "placebo": with_placebo,
}


def one_of_two(rank: int, folder: Path) -> None:
    """All runs on two processes."""
    for family in FAMILIES:
        # Only Harmon's runs are resumed, after two of their steps.
        steps = STEPS if family == "harmon" else 2
        fit(folder / family / "ddp", module(family), DDPStrategy(), keeps=True, steps=steps)
        fit(folder / family / "fsdp", module(family), ShardedStrategy(), keeps=True, steps=steps)
    first = folder / "harmon"
    for name, strategy, run in (
        ("resumed", ShardedStrategy(), "fsdp"),
        ("from_ddp", ShardedStrategy(), "ddp"),
        ("to_ddp", DDPStrategy(), "fsdp"),
    ):
        fit(first / name, module("harmon"), strategy, checkpoint=first / run / CHECKPOINT)
    fit(first / "copies", module("harmon"), ShardedStrategy(data_parallel_size=2, tensor_parallel_size=1))
    for name, other in OTHERS.items():
        # Balance measures pulls in the first step, weighs by them in the second, and the third has trained so.
        steps = 2 if name in ("lora", "halved") else 3
        for kind, strategy in (("ddp", DDPStrategy()), ("fsdp", ShardedStrategy())):
            fit(folder / name / kind, other(), strategy, keeps=name == "lora", steps=steps)


def one_of_four(rank: int, folder: Path) -> None:
    """Two copies of the model, each shared out among two processes, beside DDP over all four."""
    copies = ShardedStrategy(data_parallel_size=2, tensor_parallel_size=2)
    for name, strategy in (("ddp", DDPStrategy()), ("copies", copies)):
        fit(folder / name, module("harmon"), strategy, devices=4, steps=2)


def alone(rank: int, folder: Path) -> None:
    """In one process, a run whose checkpoints leave frozen weights out, and which goes on under FSDP2."""
    frozen = partial(HarmonModule, init_from="embedded", freeze=("llm.",))
    fit(folder / "plain", frozen(), "auto", devices=1, keeps=True)
    fit(folder / "sharded", frozen(), ShardedStrategy(), 1, checkpoint=folder / "plain" / CHECKPOINT)
    fit(folder / "left", TinyModule(), ShardedStrategy(), 1, keeps=True, steps=2, callbacks=[WeightAverage()])
    for name, other, callbacks in (
        ("fewer_terms", TinyModule(("alignment",)), [WeightAverage()]),
        ("other_terms", TinyModule(("self_alignment",)), [WeightAverage()]),
        ("more_frozen", TinyModule(freeze=("llm.",)), [WeightAverage()]),
        ("no_average", TinyModule(), []),
    ):
        try:
            fit(folder / name, other, ShardedStrategy(), 1, folder / "left" / CHECKPOINT, callbacks=callbacks)
        except CheckpointError as error:
            (folder / f"{name}.txt").write_text(str(error))
