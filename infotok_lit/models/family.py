"""What a family of base models is: its sizes, its official files, and how its models are built and read.

A family is a folder beside this file with a `family.py`, which describes it without importing anything heavy and has
the one instance as `FAMILY`, and a `model.py`, which holds its model and is imported when one is built.
"""

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from infotok_lit import models
from infotok_lit.assets import ASSETS, SCENES_TOKENIZER
from infotok_lit.batch import Branch
from infotok_lit.checkpoints import CheckpointError, first_existing, read_config, read_folder, read_weights
from infotok_lit.errors import SettingsError
from infotok_lit.models.common.model_config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from infotok_lit.models.unified import UnifiedModel

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Part:
    """Weights that an official checkpoint keeps beside its main file, or under a prefix inside it."""

    missing: str
    """What to say if it is not given: "image autoencoder: set `autoencoder` to kl16.ckpt"."""
    prefix: str
    """Of its names where it lies in the main file."""
    stem: str | None
    """Of its own file in an exported folder; None if export writes it into the main file."""


@dataclass(frozen=True)
class OfficialWeights:
    """Official state dicts, read but not yet in a model."""

    files: Mapping[str, tuple[dict[str, "Tensor"], str]]
    """Stem of the exported file -> weights, and where they come from."""

    def load_into(self, model: "UnifiedModel") -> "UnifiedModel":
        """The model with these weights; CheckpointError names what does not fit."""
        for stem, (weights, source) in self.files.items():
            model.load_official_weights(stem, weights, source)
        return model


class Family(ABC):
    """A family of base models; a subclass says what is its own."""

    model_class: ClassVar[str]
    """The name of its UnifiedModel in `model.py`, whose constructor takes a configuration and a tokenizer."""
    config_class: ClassVar[type[ModelConfig]]
    sampling: ClassVar[type]
    """A dataclass of the options of generation."""
    tokenizers: ClassVar[Mapping[str, str]]
    """Size -> a folder, or a name on the Hugging Face hub."""
    parts: ClassVar[Mapping[str, Part]] = NOTHING
    """Name -> an official file that a checkpoint needs beside its main one."""
    weighted: ClassVar[tuple[str, ...]]
    """The entries of a configuration that decide which weights there are."""
    encoded_branches: ClassVar[tuple[Branch, ...]] = ()
    """Whose images pass a frozen `autoencoder`, so that their latents can be cached."""
    essential: ClassVar[tuple[str, ...]] = ()
    """Beginnings of names that every main file of the family holds."""

    @property
    @abstractmethod
    def sizes(self) -> Mapping[str, ModelConfig]:
        """Name -> configuration."""

    @property
    def name(self) -> str:
        """The name of the family's folder, and of the main file that export writes."""
        return type(self).__module__.split(".")[-2]

    @property
    def title(self) -> str:
        """The family's name for people."""
        return self.config_class.title

    # What a subclass may override

    @property
    def stems(self) -> set[str]:
        """What the weight files of its exports are called, without suffix."""
        return {self.name, *(part.stem for part in self.parts.values() if part.stem is not None)}

    def load_tokenizer(self, source: str) -> "PreTrainedTokenizerBase":
        """A tokenizer from a folder or the hub, with the tokens that the family adds."""
        from infotok_lit.models.common.text import load_tokenizer

        return load_tokenizer(source)

    def tokenizer_folder(self, weights: Path, parts: Mapping[str, Path]) -> Path | None:
        """Where an official checkpoint may bring its tokenizer."""
        return weights

    def needs(self, part: str, config: Any) -> bool:
        """Whether a model has a part; the block transform in the place of an autoencoder has no weights."""
        return part != "autoencoder" or config.autoencoder.kind != "dct"

    def differing_parts(self, found: Any, wanted: Any) -> list[str]:
        """The entries in which two configurations differ so that weights of one do not fit the other."""
        # Positions are computed without a table, and the spread of fresh weights is none of trained ones.
        free = {name: getattr(wanted.llm, name) for name in ("max_position_embeddings", "initializer_range")}
        found = replace(found, llm=replace(found.llm, **free))
        return [name for name in self.weighted if getattr(found, name) != getattr(wanted, name)]

    # What all families share

    def config_of_size(self, size: str) -> Any:
        """The configuration of a size; SettingsError if there is none."""
        if size not in self.sizes:
            raise SettingsError(f"no {self.title} of size {size!r}; choose one of {', '.join(self.sizes)}")
        return self.sizes[size]

    def fresh(self, size: str, tokenizer: str | None = None, settings: Mapping[str, Any] = NOTHING) -> "UnifiedModel":
        """A model with random weights.

        Args:
            tokenizer: a folder, a name on the Hugging Face hub, or a size, for its own; default: the one of `size`.
            settings: entries of the size's configuration that are to differ.
        """
        return self.build(self.config_of_size(size).with_settings(settings), tokenizer or size)

    def build(self, config: Any, tokenizer: str) -> "UnifiedModel":
        """A model of any configuration with random weights.

        Args:
            tokenizer: a folder, a hub name, or a size: a size names its tokenizer in a checkpoint, so that the
                checkpoint can be moved to another machine.

        Raises:
            SettingsError: if there is no such tokenizer, or it has more tokens than the language model.
        """
        source = self.tokenizers.get(tokenizer, tokenizer)
        loaded, rows = self.load_tokenizer(source), config.llm.vocab_size
        if len(loaded) > rows and tokenizer in self.tokenizers and Path(source).is_relative_to(ASSETS):
            # Runs from before the words of garments were tokens have no rows for them.
            loaded = self.load_tokenizer(str(SCENES_TOKENIZER))
        if len(loaded) > rows:
            raise SettingsError(
                f"the tokenizer has {len(loaded)} tokens, the language model only {rows}: set model.tokenizer to its "
                f"own, or llm.vocab_size to {len(loaded)} or more"
            )
        module = import_module(f"{models.__name__}.{self.name}.model")
        return getattr(module, self.model_class)(config, loaded)

    def with_weights(self, official: OfficialWeights, config: Any, tokenizer: str) -> "UnifiedModel":
        """A model of a configuration with weights from files; what has no file begins with random weights.

        Raises:
            SettingsError: as `build`.
            CheckpointError: naming what does not fit.
        """
        import torch

        from infotok_lit.models.common.loading import without_initial_weights

        with without_initial_weights():
            model = self.build(config, tokenizer)
        if model.official_weights().keys() - official.files.keys():
            with torch.device("cpu"):
                model = self.build(config, tokenizer)
        return official.load_into(model)

    def rebuild(self, config: Mapping[str, Any], tokenizer: str, state: Mapping[str, "Tensor"]) -> "UnifiedModel":
        """The model of a training checkpoint, in evaluation mode; `state` has our own parameter names."""
        from infotok_lit.models.common.loading import adopt_state, without_initial_weights

        with without_initial_weights():
            model = self.build(self.config_class.from_dict(config), tokenizer)
        adopt_state(model, state, "the checkpoint")
        return model.eval()

    def from_folder(self, folder: Path) -> "UnifiedModel":
        """The model in an exported folder, in evaluation mode."""
        config, official = self.read_exported(folder)
        return self.with_weights(official, config, str(folder)).eval()

    def from_official(
        self, weights: Path, size: str, parts: Mapping[str, Path], tokenizer: str | None = None
    ) -> "UnifiedModel":
        """The model in official files, in evaluation mode; `parts` are those of `Family.parts`."""
        config = self.config_of_size(size)
        official = self.read_official(weights, parts, config)
        folder = self.tokenizer_folder(weights, parts)
        if tokenizer is None and folder is not None and (folder / "tokenizer_config.json").exists():
            tokenizer = str(folder)
        return self.with_weights(official, config, tokenizer or size).eval()

    def read_exported(self, folder: Path) -> tuple[Any, OfficialWeights]:
        """The configuration and the weights in an exported folder; CheckpointError if it holds another family."""
        config = self.config_class.from_dict(read_config(folder, self.name, self.title))
        stems = {name: part.stem for name, part in self.parts.items() if part.stem is not None}
        parts = {n: first_existing(folder, f"{stem}.safetensors", f"{stem}.ckpt") for n, stem in stems.items()}
        main = first_existing(folder, f"{self.name}.safetensors", f"{self.name}.pth")
        return config, self.read_official(main, parts, config)

    def read_official(self, weights: Path, parts: Mapping[str, Path], config: Any) -> OfficialWeights:
        """The weights in official files; a part that lies in the main file needs no file of its own.

        Raises:
            SettingsError: naming a part that is needed and not given.
            CheckpointError: if the main file is not one of this family.
        """
        main = read_weights(weights)
        absent = [start for start in self.essential if not any(name.startswith(start) for name in main)]
        if absent:
            raise CheckpointError(f"{weights} is no {self.title} checkpoint: it lacks {', '.join(absent)}")
        files = {}
        for name, part in self.parts.items():
            inside = {key: tensor for key, tensor in main.items() if key.startswith(part.prefix)}
            if part.stem is not None:
                main = {key: tensor for key, tensor in main.items() if key not in inside}
            if not self.needs(name, config) or (inside and part.stem is None):
                continue
            if not inside and name not in parts:
                raise SettingsError(f"{weights} holds no {part.missing}")
            if inside:
                own, source = {key.removeprefix(part.prefix): tensor for key, tensor in inside.items()}, weights
            else:
                own, source = read_weights(parts[name]), parts[name]
            if part.stem is None:
                main |= {part.prefix + key: tensor for key, tensor in own.items()}
            else:
                files[part.stem] = (own, str(source))
        return OfficialWeights({self.name: (main, str(weights)), **files})


def families() -> list[str]:
    """The names of the families that there are."""
    found = (module.name for module in pkgutil.iter_modules(models.__path__) if module.ispkg)
    return [name for name in found if name != "common"]


def family(name: str) -> Family:
    """A family by its name; SettingsError for one that there is not."""
    if name not in families():
        raise SettingsError(f"the model is of family {name!r}; this version knows {', '.join(families())}")
    return import_module(f"{models.__name__}.{name}.family").FAMILY


def load_folder(folder: Path) -> "UnifiedModel":
    """The model in an exported folder, in evaluation mode."""
    name, _ = read_folder(folder)
    return family(name).from_folder(folder)
