"""A processor, a model and sources small enough to see through."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn

from infotok_lit.batch import (
    Branch,
    BrokenSampleError,
    GenerationBatch,
    GenerationSample,
    PairedText,
    Sample,
    Source,
    UnderstandingBatch,
    UnderstandingSample,
)
from infotok_lit.data.datamodule import UnifiedDataModule


def _pixels(samples: Sequence[Sample]) -> Tensor:
    images = [np.asarray(sample.image.resize((2, 2)), dtype=np.float32) / 127.5 - 1 for sample in samples]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def _text(size: int) -> PairedText:
    ids = torch.zeros(size, 1, dtype=torch.int64)
    return PairedText(ids, ids == 0, ids != 0, ids[:, 0])


class StandInProcessor:
    def check(self, sample: Sample) -> None:
        """Takes every sample."""

    def understanding(self, samples: Sequence[UnderstandingSample], skipped: Sequence[str] = ()) -> UnderstandingBatch:
        text = _text(len(samples))
        return UnderstandingBatch(
            _pixels(samples),
            text.ids,
            text.mask,
            text.ids,
            text,
            [sample.question for sample in samples],
            [sample.answer for sample in samples],
            [sample.name for sample in samples],
            list(skipped),
        )

    def generation(self, samples: Sequence[GenerationSample], skipped: Sequence[str] = ()) -> GenerationBatch:
        text = _text(len(samples))
        captions = ["" if sample.drop_prompt else sample.caption for sample in samples]
        names = [sample.name for sample in samples]
        return GenerationBatch(_pixels(samples), text.ids, text.mask, text, captions, names, list(skipped))


class StandInBase(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.processor = StandInProcessor()


class Recorder(LightningModule):
    """Trains three weights, and remembers the samples of each batch and the random numbers it drew itself."""

    def __init__(self) -> None:
        super().__init__()
        self.base = StandInBase()
        self.steps: list[tuple[list[str], list[str], list[str]]] = []
        self.validated: list[tuple[int, list[str]]] = []
        self.val_captions: list[str] = []
        self.noise: list[float] = []

    def setup(self, stage: str) -> None:
        self.trainer.datamodule.connect(lambda: self.base.processor, hard_negatives={})

    def training_step(self, batch: dict[str, UnderstandingBatch | GenerationBatch], batch_idx: int) -> Tensor:
        read, drawn = batch["understanding"], batch["generation"]
        self.steps.append((read.names, drawn.names, [*read.questions, *drawn.captions]))
        self.noise.append(torch.rand(()).item())
        return ((read.pixel_values.mean((0, 2, 3)) - self.base.weight) ** 2).sum()

    def validation_step(
        self, batch: UnderstandingBatch | GenerationBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.validated.append((dataloader_idx, batch.names))
        self.val_captions += batch.captions if isinstance(batch, GenerationBatch) else []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Numbers(Source):
    """Sample i is a flat image named "i"; those in `broken` cannot be read."""

    def __init__(self, length: int = 10, broken: Sequence[int] = ()) -> None:
        self.length = length
        self.broken = frozenset(broken)

    def __len__(self) -> int:
        return self.length

    def sample(self, branch: Branch, index: int, rng: np.random.Generator) -> Sample:
        if index in self.broken:
            raise BrokenSampleError(f"number {index}: it is broken")
        image = Image.new("RGB", (10, 10), (index % 256, 0, 0))
        number = f"{rng.random():.6f}"
        if branch == "understanding":
            return UnderstandingSample(image, number, "answer", str(index))
        return GenerationSample(image, number, str(index), crop_offset=rng.random())


def make_trainer(folder: str, **settings) -> Trainer:
    settings = {"max_steps": 4, "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0} | settings
    return Trainer(
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **settings,
    )


def data(length: int = 11, **settings) -> UnifiedDataModule:
    sizes = {"understanding_batch_size": 3, "generation_batch_size": 4}
    return UnifiedDataModule(Numbers(length), **(sizes | settings))


def fit(folder: Path, module: UnifiedDataModule, resume: str | None = None, **settings) -> Recorder:
    recorder = Recorder()
    torch.manual_seed(0)
    settings = {"check_val_every_n_epoch": None, "val_check_interval": 2} | settings
    trainer = make_trainer(str(folder), **settings)
    trainer.fit(recorder, datamodule=module, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / "end.ckpt")
    return recorder


def as_shard(folder: Path) -> Path:
    with tarfile.open(folder / "photos.tar", "w") as tar:
        for row in json.loads((folder / "annotations.json").read_text()):
            image = folder / row["image"]
            if image.exists():
                content = json.dumps(row).encode()
                info = tarfile.TarInfo(image.stem + ".json")
                info.size = len(content)
                tar.add(image, image.name)
                tar.addfile(info, io.BytesIO(content))
    return folder / "photos.tar"
