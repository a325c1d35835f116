"""What the families' samplers share: options, an image's random numbers, classifier-free guidance, features of time."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infotok_lit.models.common.model_config import Grid

TIME_FEATURES = 256
MAX_PERIOD = 10000.0
NORMAL_BLOCK = 16
"""torch draws normal numbers by so many: of whole blocks, one long call gives what several short ones do, faster."""

Progress = Callable[[int, int], None]
"""Called with (iteration, iterations) after each iteration."""


class DrawingOptions(NamedTuple):
    """How the images of one call are drawn, beside their random numbers."""

    sampling: Any
    """The family's SamplingConfig."""
    grid: Grid
    """Of the images' tokens."""
    progress: Progress | None = None
    use_cache: bool = True
    """Compute the prompts' keys and values once, and record what a card repeats; the images are the same without."""


class ImageNoise:
    """One generator per image, so that an image depends on its own seed alone and not on the rest of the batch."""

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        # On the CPU: the same seed gives the same image on every device.
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) float32, standard normal."""
        return self.normals(1, *shape)[0]

    def normals(self, count: int, *shape: int) -> Tensor:
        """(count, B, *shape): what so many calls of `normal` give, with one copy to the device for all of them."""
        if math.prod(shape) % NORMAL_BLOCK == 0:
            own = [torch.randn(count, *shape, generator=generator) for generator in self.generators]
            return torch.stack(own, dim=1).to(self.device)
        rows = [[torch.randn(shape, generator=generator) for generator in self.generators] for _ in range(count)]
        return torch.stack([torch.stack(row) for row in rows]).to(self.device)

    def orders(self, places: int) -> Tensor:
        """(B, places) int64: for each image, a random order of its places."""
        orders = [torch.randperm(places, generator=generator) for generator in self.generators]
        return torch.stack(orders).to(self.device)


def is_guided(guidance: float) -> bool:
    """Whether a scale asks for guidance: at 1 the prompts alone are followed."""
    return guidance != 1


def guide(predictions: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance in float32 (Ho & Salimans 2022, arXiv 2207.12598).

    Args:
        predictions: (2 B, ...): conditional ones, then unconditional ones; without guidance (B, ...), as they are.
        guidance: w in  unconditional + w (conditional - unconditional).
    """
    if not is_guided(guidance):
        return predictions.float()
    conditional, unconditional = predictions.float().chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def sinusoid(time: Tensor) -> Tensor:
    """Features (n, 256) float32 of times (n,), which are used as they are: cosines, then sines."""
    half = TIME_FEATURES // 2
    steps = torch.arange(half, device=time.device, dtype=torch.float32)
    angles = time.float().unsqueeze(1) * torch.exp(-math.log(MAX_PERIOD) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Recorded:
    """A function of tensors on a CUDA device, whose kernels are recorded once for each set of shapes, then replayed.

    For small networks that are called often, of which launching the kernels takes longer than running them. The numbers
    are those of the function, which must do the same work in each call, on the device alone. What it returns is valid
    until the next call. It reads the weights where they were when it recorded: keep it for as long as they stay there.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self._recordings: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}
        self._memory = torch.cuda.graph_pool_handle()
        """Of all recordings: no two of them run at a time."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the function makes of tensors whose shapes may differ from call to call, but not their types."""
        shapes = tuple(each.shape for each in inputs)
        if shapes not in self._recordings:
            self._recordings[shapes] = self._record(inputs)
        graph, places, output = self._recordings[shapes]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return output

    def _record(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
        places, side = tuple(each.clone() for each in inputs), torch.cuda.Stream()
        # What kernels set up when they first run cannot be recorded.
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.function(*places)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those of data loaders, may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            output = self.function(*places)
        return graph, places, output
