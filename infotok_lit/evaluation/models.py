"""What can be evaluated: this package's models, transformers image-text-to-text models, diffusers pipelines.

Everything else here knows a model only as an `EvaluatedModel`.
"""

import hashlib
import json
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image

from infotok_lit.batch import UnderstandingSample
from infotok_lit.errors import ExplainedError, SettingsError
from infotok_lit.inference import InferenceModel
from infotok_lit.pictures import to_uint8
from infotok_lit.weight_files import DAMAGE_ERRORS

WEIGHTS = (".safetensors", ".pth", ".ckpt", ".bin", ".pt", ".distcp")
SETTINGS = ("*.json", "*.jinja")
"""Files of a folder of transformers or diffusers that say how it answers or draws."""
EDGE = 1 << 16
"""Bytes at either end of a weight file that tell it from another."""
BEGINNING = 1 << 12
"""Bytes at the beginning of each tensor that do so in a safetensors file."""


@contextmanager
def loading(fault: str, kind: type[ExplainedError] = SettingsError) -> Iterator[None]:
    """Whatever a library raises on a folder that it cannot load, in one sentence that begins with `fault`."""
    try:
        yield
    except ImportError as error:
        text = "it needs a package that is not here (models that read videos, torchvision)"
        raise kind(f"{fault}: {text}: {error}") from error
    except Exception as error:  # on damaged files almost anything: SafetensorError, KeyError, TypeError...
        raise kind(f"{fault}: {error}") from error


class EvaluatedModel(ABC):
    """A model that draws, or answers questions about images, or both."""

    name: str
    path: Path | None
    """None for weights that lie in no file."""

    def description(self) -> dict[str, Any]:
        """What its results depend on; two equal ones may share a result folder."""
        return {"name": self.name, "weights": None if self.path is None else fingerprint(self.path)}

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """One image per prompt; image i depends on its prompt and its seed only."""
        raise SettingsError(f"{self.name} draws no images: choose benchmarks of understanding for it")

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int) -> list[str]:
        """One answer per question, greedily, without white space around it; images that are one object are encoded once
        where the model can."""
        raise SettingsError(f"{self.name} answers no questions: choose benchmarks of generation for it")

    def likelihoods(
        self, images: Sequence[Image.Image], questions: Sequence[str], options: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """For each question the mean log-likelihood of each option as its answer, in nats per token."""
        raise SettingsError(f"{self.name} tells no likelihoods: choose the letters instead (seed, not seed_likelihood)")


class OwnModel(EvaluatedModel):
    """A model of this package.

    Args:
        path: its weights; None where they lie in no file.
        parts: the weights that an official checkpoint needs beside them, by name.
    """

    def __init__(
        self, model: InferenceModel, name: str, path: Path | None, parts: Mapping[str, Path] | None = None
    ) -> None:
        self.model, self.name, self.path, self.parts = model, name, path, parts or {}
        self.base = model.base

    def description(self) -> dict[str, Any]:
        dtype = str(next(self.base.parameters()).dtype).removeprefix("torch.")
        sampler = asdict(self.base.config.sampling)
        found = super().description() | {"family": self.base.family, "dtype": dtype, "sampler": sampler}
        found |= {name: fingerprint(part) for name, part in self.parts.items()}
        return found if self.model.selector is None else found | {"budget": self.model.selector.keep}

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        drawn: list[Image.Image] = []
        # The model gives image i the seed of the first one plus i.
        cuts = [0, *(i for i, (one, next_) in enumerate(pairwise(seeds), 1) if next_ != one + 1), len(seeds)]
        with self.model.running():
            for start, end in pairwise(cuts):
                images = self.base.generate(prompts[start:end], seed=seeds[start])
                drawn += [Image.fromarray(image) for image in to_uint8(images)]
        return drawn

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int) -> list[str]:
        distinct = list({id(image): image for image in images}.values())
        place = {id(image): number for number, image in enumerate(distinct)}
        image_of = None if len(distinct) == len(images) else [place[id(image)] for image in images]
        with self.model.running() as device:
            pixels = self.base.processor.pixels(distinct).to(device)
            return self.model.read(pixels, questions, max_new_tokens, image_of)

    def likelihoods(
        self, images: Sequence[Image.Image], questions: Sequence[str], options: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        return [
            [self._likelihood(UnderstandingSample(image, question, option, "")) for option in choices]
            for image, question, choices in zip(images, questions, options, strict=True)
        ]

    def _likelihood(self, sample: UnderstandingSample) -> float:
        # Its import takes longer than most answers, and no other question needs it.
        from lightning.pytorch.utilities import move_data_to_device

        batch = self.base.processor.understanding([sample])
        with self.model.running() as device:
            return -self.model.answer_loss(move_data_to_device(batch, device))


class TransformersModel(EvaluatedModel):
    """Any image-text-to-text model of transformers, through its chat template."""

    def __init__(self, path: Path, name: str, device: str, dtype: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import is_torchvision_available

        self.path, self.name, self.dtype = path, name, dtype
        with loading(f"{path} is no image-text-to-text model of transformers, or a damaged one"):
            # Models that read videos, too, have a processor that only torchvision runs.
            backend = {} if is_torchvision_available() else {"backend": "pil"}
            self.processor = AutoProcessor.from_pretrained(path, local_files_only=True, **backend)
            self.model = AutoModelForImageTextToText.from_pretrained(
                path, local_files_only=True, trust_remote_code=False, dtype=getattr(torch, dtype)
            )
        if getattr(self.processor, "chat_template", None) is None:
            raise SettingsError(
                f"{path} has no chat template, by which a model is asked: take one that was tuned to chat"
            )
        self.model = self.model.to(device).eval()

    def description(self) -> dict[str, Any]:
        own = {"family": self.model.config.model_type, "dtype": self.dtype, "settings": settings_digest(self.path)}
        return super().description() | own

    @torch.inference_mode()
    def answer(self, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int) -> list[str]:
        chats = [_chat(image, question) for image, question in zip(images, questions, strict=True)]
        inputs = self._inputs(chats)
        output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    @torch.inference_mode()
    def likelihoods(
        self, images: Sequence[Image.Image], questions: Sequence[str], options: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        found = []
        for image, question, choices in zip(images, questions, options, strict=True):
            asked = self._inputs([_chat(image, question)])
            found.append([self._likelihood(asked, option) for option in choices])
        return found

    def _likelihood(self, asked: Any, option: str) -> float:
        """By the model's own way to generate, which knows its masks and positions, made to say the option."""
        ids = self.processor.tokenizer(option, add_special_tokens=False)["input_ids"]
        start = asked["input_ids"].shape[1]

        def forced(before: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            wanted = torch.full_like(scores, -torch.inf)
            wanted[:, ids[before.shape[1] - start]] = 0.0
            return wanted

        output = self.model.generate(
            **asked,
            max_new_tokens=len(ids),
            do_sample=False,
            logits_processor=[forced],
            output_logits=True,
            return_dict_in_generate=True,
        )
        told = [logits[0].float().log_softmax(-1)[one] for logits, one in zip(output.logits, ids, strict=True)]
        return float(torch.stack(told).mean())

    def _inputs(self, chats: list[list[dict[str, Any]]]) -> Any:
        """Up to where the answer starts; left-padded, so that answers follow at once."""
        return self.processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(self.model.device, dtype=self.model.dtype)


class DiffusersModel(EvaluatedModel):
    """Any text-to-image pipeline of diffusers, with its own defaults."""

    def __init__(self, path: Path, name: str, device: str, dtype: str) -> None:
        from diffusers import DiffusionPipeline

        self.path, self.name, self.dtype, self.device = path, name, dtype, device
        with loading(f"{path} is no pipeline of diffusers, or a damaged one"):
            pipeline = DiffusionPipeline.from_pretrained(path, local_files_only=True, dtype=getattr(torch, dtype))
        if "prompt" not in signature(pipeline.__call__).parameters:
            raise SettingsError(f"{path} is a {type(pipeline).__name__}, which takes no prompts: choose one that does")
        self.pipeline = pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)

    def description(self) -> dict[str, Any]:
        own = {"family": type(self.pipeline).__name__, "dtype": self.dtype, "settings": settings_digest(self.path)}
        return super().description() | own

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        # Random numbers are drawn on the CPU, so that a seed means one image on every device.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        return [image.convert("RGB") for image in self.pipeline(prompt=list(prompts), generator=generators).images]


def kind_of(path: Path) -> str | None:
    """`diffusers` or `transformers` for a folder of such a model; None for anything else."""
    if (path / "model_index.json").is_file():
        return "diffusers"
    if (path / "config.json").is_file() and '"model_type"' in (path / "config.json").read_text(errors="replace"):
        return "transformers"
    return None


def settings_digest(path: Path) -> str:
    """What tells a folder's settings from others: scheduler, chat template, the size of images, and the like."""
    total = hashlib.sha256()
    for file in sorted(file for pattern in SETTINGS for file in path.rglob(pattern) if file.is_file()):
        content = file.read_bytes()
        total.update(f"{file.relative_to(path)} {len(content)}\n".encode() + content)
    return total.hexdigest()[:16]


def fingerprint(path: Path) -> str:
    """What tells one model's weights from another's: the names, sizes and marks of all weight files."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in WEIGHTS)
    total = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            total.update(f"{file.name} {size}\n".encode() + _marks(stream, size))
    return total.hexdigest()[:16]


def _marks(stream: BinaryIO, size: int) -> bytes:
    """Of a safetensors file what `_tensor_marks` gives; of any other file both ends, where a file of torch has the
    checksums of its tensors."""
    with suppress(*DAMAGE_ERRORS):
        return _tensor_marks(stream, size)
    stream.seek(0)
    beginning = stream.read(EDGE)
    stream.seek(max(0, size - EDGE))
    return beginning + stream.read(EDGE)


def _tensor_marks(stream: BinaryIO, size: int) -> bytes:
    """The header of a safetensors file in one order, as its own is random, and the beginning of every tensor.

    Raises:
        DAMAGE_ERRORS: it is no such file.
    """
    length = int.from_bytes(stream.read(8), "little")
    if length > size:
        raise ValueError("it has no header")
    header = json.loads(stream.read(length))
    parts = [json.dumps(header, sort_keys=True).encode()]
    for name in sorted(set(header) - {"__metadata__"}):
        start, end = header[name]["data_offsets"]
        stream.seek(8 + length + start)
        parts.append(stream.read(min(BEGINNING, end - start)))
    return b"".join(parts)


def _chat(image: Image.Image, question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
