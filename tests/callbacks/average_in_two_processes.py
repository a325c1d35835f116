"""Trains a small network with a moving average, alone and in two processes, replicated and sharded."""

import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from infotok_lit.callbacks import WeightAverage
from infotok_lit.modules.average import AVERAGE
from infotok_lit.modules.run_callbacks import tell_model_is_built

ROWS = torch.linspace(-1, 1, 16).view(4, 4).sin().repeat(4, 1)
"""Four equal batches of 4, so that a resumed run need not find its place."""


class Network(pl.LightningModule):
    """A regression whose gradient is the mean over the batch of 4, however many processes share it."""

    def __init__(self, sharded: bool) -> None:
        super().__init__()
        self.sharded = sharded
        self.seen: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        if hasattr(self, "inner"):
            return
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        if self.sharded:
            fully_shard(self.inner, mesh=self.device_mesh["data_parallel"])
            fully_shard(self, mesh=self.device_mesh["data_parallel"])
        tell_model_is_built(self)

    def forward(self, rows: Tensor) -> Tensor:
        return (self.outer(self.inner(rows).tanh()) * self.frozen).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self(batch)

    def on_validation_epoch_end(self) -> None:
        self.seen = {name: whole(weight.detach()).clone() for name, weight in self.named_parameters()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([weight for weight in self.parameters() if weight.requires_grad], lr=0.1)


def run(folder: Path, name: str, strategy: Strategy | str, steps: int = 4, checkpoint: Path | None = None) -> None:
    """Train, and leave what the average came to."""
    average = WeightAverage(0.6, warmup=4)
    processes = 1 if strategy == "auto" else 2
    rank = int(os.environ.get("RANK", 0))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        max_steps=steps,
        val_check_interval=steps,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        callbacks=[average],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    network = Network(sharded=isinstance(strategy, ModelParallelStrategy))
    loader = DataLoader(ROWS[rank::processes], batch_size=4 // processes)
    trainer.fit(network, loader, loader, ckpt_path=checkpoint, weights_only=True)
    trainer.strategy.barrier()
    average.show(network, average=False)
    local = [value.to_local() if isinstance(value, DTensor) else value for _, value in averages(network)]
    found = {
        "average": {name: whole(value) for name, value in averages(network)},
        "validated": network.seen,
        "updates": average.updates,
        "local": sum(value.numel() for value in local),
    }
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    if trainer.is_global_zero:
        torch.save(found, folder / f"{name}.pt")


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def averages(network: Network) -> list[tuple[str, Tensor]]:
    return list(network.get_submodule(AVERAGE).named_buffers())


def sharding() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")


def one_of_two(rank: int, folder: Path) -> None:
    """All runs on two processes."""
    run(folder, "replicated", DDPStrategy(process_group_backend="gloo"))
    run(folder, "sharded", sharding())
    run(folder, "half", sharding(), steps=2)
    run(folder, "resumed", sharding(), checkpoint=folder / "half.ckpt")
