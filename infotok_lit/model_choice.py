"""Which model is meant by a folder, a run, a file or a name on the hub, and reading it.

Nothing heavy is imported before a model is read, so that typing errors are answered at once.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from infotok_lit.assets import shipped_bases
from infotok_lit.checkpoints import (
    CHECKPOINT_KEY,
    exported_family,
    find_checkpoint,
    read_run,
    read_settings,
    run_checkpoint,
)
from infotok_lit.errors import MissingFileError, SettingsError
from infotok_lit.hub import fetch
from infotok_lit.models.export import DType
from infotok_lit.models.family import families
from infotok_lit.models.family import family as family_called
from infotok_lit.sharded_checkpoints import is_sharded_checkpoint
from infotok_lit.weight_files import CheckpointError

if TYPE_CHECKING:
    from infotok_lit.models.unified import UnifiedModel
    from infotok_lit.modules.token_budget import TokenSelector

PARTS = ("autoencoder", "vlm", "transformer")
"""Official files that some family needs beside its main one."""


@dataclass(frozen=True)
class ModelOptions:
    """What an official checkpoint does not say about itself, and where a model runs.

    Args:
        family: Official checkpoint: its family.
        model_size: Official checkpoint: its size, such as 0.5b.
        autoencoder: Official checkpoint: the file or folder of its image autoencoder.
        vlm: Official checkpoint: the folder of OpenUni's InternVL3.
        transformer: Official checkpoint: the folder of OpenUni's SANA, if it holds none.
        tokenizer: Official checkpoint: folder or hub name of its tokenizer; default: that of the size.
        device: Where to run; `auto` is cuda if there is one.
        dtype: Of the weights.
    """

    family: str | None = None
    model_size: str | None = None
    autoencoder: str | None = None
    vlm: str | None = None
    transformer: str | None = None
    tokenizer: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: DType = "float32"

    @property
    def parts(self) -> dict[str, str]:
        """The official files that are given, by name."""
        return {name: getattr(self, name) for name in PARTS if getattr(self, name) is not None}


@dataclass(frozen=True)
class ModelChoice:
    """A model that is there, not loaded yet.

    Args:
        source: As it was named.
        path: The exported folder, the run's checkpoint, or the official file or folder.
        family: The family that it belongs to.
        is_run: Whether it is a run's checkpoint.
    """

    source: str
    path: Path
    family: str
    is_run: bool
    options: ModelOptions

    def load(self) -> "UnifiedModel":
        """The model in evaluation mode, read on the CPU and then moved.

        Raises:
            ExplainedError: if weights do not fit, a file is missing, or there is no such device.
        """
        import torch

        device = chosen_device(self.options.device)
        model = self._read()
        # Parameters only: buffers are tables (frequencies, bases) that lose their meaning in few bits.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, self.options.dtype))
        return model.to(device).eval()

    def token_selector(self, base: "UnifiedModel", budget: float) -> "TokenSelector":
        """Which tokens of an image the loaded model reads at a budget, the mean share of them.

        Raises:
            ExplainedError: if the model was not trained or exported for it.
        """
        from infotok_lit.modules.token_budget import TokenSelector

        if self.is_run:
            return TokenSelector.of_run(read_run(self.path), base, keep=budget)
        return TokenSelector.of_folder(self.path, base, budget)

    def _read(self) -> "UnifiedModel":
        if self.is_run:
            from infotok_lit.modules.base_model import rebuild_base

            return rebuild_base(read_run(self.path))
        known, size = family_called(self.family), self.options.model_size
        if size is not None:
            parts = {name: fetch(path) for name, path in self.options.parts.items()}
            return known.from_official(self.path, size, parts, self.options.tokenizer)
        try:
            return known.from_folder(self.path)
        except (TypeError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(f"the config.json in {self.path} describes no model: {error}") from error


def choose(source: str | Path, options: ModelOptions = ModelOptions()) -> ModelChoice:
    """The model behind a name, checked as far as that is possible without reading weights.

    Args:
        source: An exported folder; a run, or one of its checkpoints; an official file or folder, with its family and
            size in the options; or any of these by its name on the Hugging Face hub (hub.py). A base that ships with
            the package goes by its name, such as `harmon_scenes32`, where no file has it.

    Raises:
        MissingFileError: if there is none.
        SettingsError: naming what is missing or does not belong, and the mend.
    """
    path = fetch(source)
    if not path.exists():
        path = shipped_bases().get(str(source), path)
    if not path.exists():
        raise MissingFileError(f"there is no model at {path}; those that ship are {', '.join(shipped_bases())}")
    family = exported_family(path)
    if family is not None:
        _refuse_official_options(source, "an exported folder", options)
        return ModelChoice(str(source), path, _known(family, path), False, options)
    if options.family is not None:
        return ModelChoice(str(source), path, _official_family(path, options), False, options)
    named = path.suffix == ".ckpt" and (path.is_file() or is_sharded_checkpoint(path))
    checkpoint = run_checkpoint(path) if named else find_checkpoint(path)
    if checkpoint is None:
        raise SettingsError(
            f"{path} is neither an exported folder nor a run: name one of these, or an official checkpoint with "
            f"--family ({', '.join(families())}) and --model_size"
        )
    _refuse_official_options(source, "a run", options)
    family = read_settings(checkpoint)[CHECKPOINT_KEY].get("family")
    return ModelChoice(str(source), checkpoint, _known(family, checkpoint), True, options)


def tell_what_was_found(choices: Sequence[ModelChoice]) -> None:
    """Say on stderr which checkpoint was taken, where a folder was named: it may hold several, or several runs."""
    for choice in choices:
        if choice.is_run and Path(choice.source) != choice.path:
            sys.stderr.write(f"infotok_lit: {choice.source}: taking the newest checkpoint, {choice.path}\n")


def labels(choices: Sequence[ModelChoice]) -> list[str]:
    """What tells models apart: the last parts of their names, or where those are equal, the whole names."""
    names = [Path(choice.source).absolute().name for choice in choices]
    return [name if names.count(name) == 1 else choice.source for name, choice in zip(names, choices, strict=True)]


def chosen_device(name: Literal["auto", "cpu", "cuda"]) -> str:
    """`cpu` or `cuda`; SettingsError if there is none."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("there is no CUDA device here: leave out device, or set it to cpu")
    return name


def _known(family: object, path: Path) -> str:
    if family not in families():
        raise SettingsError(f"{path} holds a model of family {family!r}; this version knows {', '.join(families())}")
    return family


def _official_family(path: Path, options: ModelOptions) -> str:
    family, size = _known(options.family, path), options.model_size
    known = family_called(family)
    sizes = known.sizes
    if size not in sizes:
        wrong = "needs its --model_size" if size is None else f"of family {family} has no size {size!r}"
        raise SettingsError(f"the official checkpoint {path} {wrong}: choose one of {', '.join(sizes)}")
    for name, part in options.parts.items():
        if name not in known.parts:
            raise SettingsError(f"--{name} means nothing to a {family} checkpoint: leave it out")
        if not fetch(part).exists():
            raise MissingFileError(f"there is no {name} at {part}")
    return family


def _refuse_official_options(source: str | Path, what: str, options: ModelOptions) -> None:
    names = ("family", "model_size", *PARTS, "tokenizer")
    given = [f"--{name}" for name in names if getattr(options, name) is not None]
    if given:
        raise SettingsError(f"{source} is {what}, which brings everything: leave out {', '.join(given)}")
