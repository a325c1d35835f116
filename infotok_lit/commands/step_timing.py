"""Times training steps of one base model under several objectives, on equal terms.

The variants share the base model and its optimiser state, and the learning rate is 0: an optimiser step does all of
its work, and every step of every variant starts from the same weights. Within a round all variants see the same
batches and random numbers, hence the same masks, which decide how much a step computes.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.optim import AdamW

from infotok_lit.batch import BRANCHES, Batch, Branch
from infotok_lit.modules.infotok_module import InfoTokModule
from infotok_lit.modules.optimiser import build_optimiser
from infotok_lit.objective.infotok import InfoTok
from infotok_lit.objective.term import Term
from infotok_lit.seeding import seed_of

ModuleT = TypeVar("ModuleT", bound=nn.Module)
StepBatch = Mapping[Branch, Batch]
Span = tuple[Any, Any]
"""Two moments of a Stopwatch."""

PHASES = ("base_forward", "objective_forward", "backward", "optimiser")


@dataclass(frozen=True)
class Variant:
    """One set of terms with its heads."""

    terms: tuple[Term, ...]
    heads: InfoTok
    optimiser: AdamW
    """Over the base model and the heads."""

    def own_bytes(self) -> int:
        """Memory that the variant holds beside what all share: heads, and their part of the optimiser's state."""
        parameters = list(self.heads.parameters())
        state = [value for p in parameters for value in self.optimiser.state.get(p, {}).values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *state))


@dataclass(frozen=True)
class StepTime:
    """One step of one variant."""

    phases: dict[str, float]
    """Seconds by PHASES; their sum is the step."""
    peak_bytes: int | None
    """CUDA memory at the worst moment, of all variants together; None on other devices."""

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(self.phases.values())


class Stopwatch:
    """Moments in time: of the device's queue on CUDA, so that watching does not hold the device up."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"

    def mark(self) -> Any:
        """This moment."""
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two moments; the device must have reached both."""
        return start.elapsed_time(end) / 1000 if self.on_cuda else end - start


class StepTimer:
    """Runs and times training steps as the trainer would: forward, backward, clipping, optimiser.

    Loading data, moving it to the device, logging and the checks for finite numbers are not part of a step here.

    Args:
        module: configured; its base model is what the variants share.
        trainer: says device, precision and clipping; it is not run.
    """

    def __init__(self, module: InfoTokModule, trainer: pl.Trainer) -> None:
        self.trainer = trainer
        self.precision = trainer.precision_plugin
        self.device = trainer.strategy.root_device
        self.module = self._ready(module)
        self.watch = Stopwatch(self.device)
        scaler = getattr(self.precision, "scaler", None)
        self.scaler = scaler or torch.amp.GradScaler(self.device.type, enabled=False)
        self._objective_spans: list[Span] = []

    def build_variants(self, term_sets: Sequence[tuple[Term, ...]], batches: Sequence[StepBatch]) -> list[Variant]:
        """A variant per set of terms; takes a step of the first, whose optimiser state of the base all then share."""
        variants = [self._build_variant(terms) for terms in term_sets]
        first = variants[0].optimiser
        self.step(variants[0], batches, seed=0)
        shared = {p: first.state[p] for p in self.module.base.parameters() if p in first.state}
        for variant in variants[1:]:
            variant.optimiser.state.update(shared)
        return variants

    def step(self, variant: Variant, batches: Sequence[StepBatch], seed: int) -> StepTime:
        """One optimiser step over batches whose gradients are accumulated."""
        self.module.infotok = variant.heads
        self._objective_spans.clear()
        if self.watch.on_cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        mark = self.watch.mark
        forward, backward = [], []
        for micro, batch in enumerate(batches):
            start = mark()
            loss = self._loss(batch, seed_of(seed, micro)) / len(batches)
            between = mark()
            self.scaler.scale(loss).backward()
            forward.append((start, between))
            backward.append((between, mark()))
        start = mark()
        self._optimise(variant.optimiser)
        optimiser = [(start, mark())]
        if self.watch.on_cuda:
            torch.cuda.synchronize(self.device)
        spans = (forward, self._objective_spans, backward, optimiser)
        phases = {
            name: sum(self.watch.seconds(*span) for span in part) for name, part in zip(PHASES, spans, strict=True)
        }
        # The objective is called from within the forward pass.
        phases["base_forward"] -= phases["objective_forward"]
        return StepTime(phases, torch.cuda.max_memory_allocated(self.device) if self.watch.on_cuda else None)

    def _loss(self, batch: StepBatch, seed: int) -> Tensor:
        results = {}
        with self.precision.forward_context():
            for index, branch in enumerate(self.module.trained_branches):
                # Anew for each branch: the objective's own draws must not shift the masks of the next branch.
                torch.manual_seed(seed_of(seed, index))
                results[branch] = self.module.run_branch(branch, batch[branch])
            reconstruction = None
            if self.module.task_weights.reconstruction:
                torch.manual_seed(seed_of(seed, len(BRANCHES)))
                reconstruction = self.module.run_reconstruction(batch["generation"])
            return torch.stack(list(self.module.loss_parts(results, reconstruction).values())).sum()

    def _optimise(self, optimiser: AdamW) -> None:
        self.scaler.unscale_(optimiser)
        clip, algorithm = self.trainer.gradient_clip_val or 0.0, self.trainer.gradient_clip_algorithm
        self.precision.clip_gradients(optimiser, clip, GradClipAlgorithmType(algorithm or "norm"))
        self.scaler.step(optimiser)
        self.scaler.update()
        optimiser.zero_grad()

    def _build_variant(self, terms: tuple[Term, ...]) -> Variant:
        module = self.module
        heads = self._ready(module.build_heads(replace(module.objective_config, terms=terms)))
        begun: list[Any] = []
        heads.register_forward_pre_hook(lambda *_: begun.append(self.watch.mark()))
        heads.register_forward_hook(lambda *_: self._objective_spans.append((begun.pop(), self.watch.mark())))
        standing_still = replace(module.optimiser_config, lr=0.0, heads_lr=0.0)
        return Variant(terms, heads, build_optimiser(standing_still, module.base, heads, module.base.decays))

    def _ready(self, module: ModuleT) -> ModuleT:
        return self.precision.convert_module(module).to(self.device).train()
