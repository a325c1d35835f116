"""Which model an inference command runs, and on what. Nothing heavy is imported before `load`."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infotok_lit.checkpoints import exported_family
from infotok_lit.models.family import families
from infotok_lit.models.family import family as family_called

if TYPE_CHECKING:
    import torch

    from infotok_lit.models.unified import UnifiedModel

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelChoice:
    """An exported folder, or an official checkpoint with what such a file does not say about itself."""

    path: Path
    family: str
    size: str | None
    """None for an exported folder."""
    parts: dict[str, Path]
    """Official files beside the main one, by name."""
    tokenizer: str | None
    device: str
    dtype: str

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
        """The options that choose a model, or with `several` at least one."""
        group = parser.add_argument_group("model")
        what = "an exported folder; or an official checkpoint (file or folder), with the options that follow"
        group.add_argument(
            "--model",
            required=True,
            type=Path,
            metavar="DIR|FILE",
            help=f"{what}; several are put side by side" if several else what,
            **({"nargs": "+", "action": "extend"} if several else {}),
        )
        group.add_argument("--family", choices=families(), help="official checkpoint: its family")
        group.add_argument("--model_size", metavar="SIZE", help="official checkpoint: its size, such as 0.5b")
        for name, descriptions in known_parts().items():
            group.add_argument(
                f"--{name}", type=Path, metavar="PATH", help=f"official checkpoint: {', or '.join(descriptions)}"
            )
        group.add_argument(
            "--tokenizer", metavar="DIR|NAME", help="official checkpoint: folder or hub name; default: that of the size"
        )
        group.add_argument("--device", choices=DEVICES, default="auto", help="default: cuda if there is one")
        group.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights; default: float32")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "ModelChoice":
        """The choice, checked as far as that is possible without reading weights.

        Raises:
            ValueError: naming what is missing or does not belong, and the mend.
        """
        path, family = arguments.model, arguments.family
        if not path.exists():
            raise ValueError(f"there is no model at {path}")
        exported = exported_family(path)
        if exported is None:
            family = _official_family(arguments)
        else:
            _refuse_official_options(arguments)
            family = _known(exported, path)
        return cls(
            path,
            family,
            arguments.model_size,
            _given_parts(arguments),
            arguments.tokenizer,
            arguments.device,
            arguments.dtype,
        )

    @classmethod
    def each_from_arguments(cls, arguments: argparse.Namespace) -> "list[ModelChoice]":
        """The choices where several may be given; ValueError as for one."""
        return [
            cls.from_arguments(argparse.Namespace(**{**vars(arguments), "model": path})) for path in arguments.model
        ]

    def load(self) -> "UnifiedModel":
        """The model in evaluation mode: read on the CPU, then moved.

        Raises:
            ValueError: if the weights do not fit, or there is no such device.
            FileNotFoundError: if a file is missing.
        """
        import torch

        known = family_called(self.family)
        device = chosen_device(self.device)
        if self.size is None:
            model = known.from_folder(self.path)
        else:
            model = known.from_official(self.path, self.size, self.parts, self.tokenizer)
        # Parameters only: buffers are tables (frequencies, bases) that lose their meaning in few bits.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, self.dtype))
        return model.to(device).eval()

    @contextmanager
    def running(self, model: "UnifiedModel") -> Iterator["torch.device"]:
        """Where the model is called: without gradients, in the precision of its weights. Yields its device."""
        import torch

        device, dtype = next(model.parameters()).device, getattr(torch, self.dtype)
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            yield device


def chosen_device(name: str) -> str:
    """One of DEVICES -> `cpu` or `cuda`; ValueError if there is none."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here: leave out --device, or set it to cpu")
    return name


def labels(choices: Sequence[ModelChoice]) -> list[str]:
    """What tells models apart: the names of their folders, or where those are equal, their paths."""
    names = [choice.path.resolve().name for choice in choices]
    return [name if names.count(name) == 1 else str(choice.path) for name, choice in zip(names, choices, strict=True)]


def known_parts() -> dict[str, list[str]]:
    """Every part that the official checkpoint of some family needs -> what it is, per family."""
    parts: dict[str, list[str]] = {}
    for family in families():
        for name, part in family_called(family).parts.items():
            parts.setdefault(name, []).append(part.help)
    return parts


def _given_parts(arguments: argparse.Namespace) -> dict[str, Path]:
    return {name: getattr(arguments, name) for name in known_parts() if getattr(arguments, name) is not None}


def _known(family: str, path: Path) -> str:
    if family not in families():
        raise ValueError(f"{path} holds a model of family {family!r}; this version knows {', '.join(families())}")
    return family


def _official_family(arguments: argparse.Namespace) -> str:
    path, family, size = arguments.model, arguments.family, arguments.model_size
    if family is None:
        raise ValueError(
            f"{path} is not an exported folder: strip a run with `python -m infotok_lit export --ckpt RUN --out DIR`; "
            f"for an official checkpoint, say --family ({', '.join(families())}) and --model_size"
        )
    sizes = family_called(family).sizes
    if size not in sizes:
        wrong = "needs its --model_size" if size is None else f"of family {family} has no size {size!r}"
        raise ValueError(f"the official checkpoint {path} {wrong}: choose one of {', '.join(sizes)}")
    for name, part in _given_parts(arguments).items():
        if name not in family_called(family).parts:
            raise ValueError(f"--{name} means nothing to a {family} checkpoint: leave it out")
        if not part.exists():
            raise ValueError(f"there is no {name} at {part}")
    return family


def _refuse_official_options(arguments: argparse.Namespace) -> None:
    names = ("family", "model_size", *known_parts(), "tokenizer")
    given = [f"--{name}" for name in names if getattr(arguments, name) is not None]
    if given:
        raise ValueError(
            f"{arguments.model} is an exported folder, which brings everything: leave out {', '.join(given)}"
        )
