"""Which base model is fine-tuned, where its weights come from, and the heads that fit it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infotok_lit import hub
from infotok_lit.assets import EMBEDDED, embedded_base
from infotok_lit.checkpoints import CHECKPOINT_KEY, CheckpointError, KeyMap, exported_family, find_checkpoint, read_run
from infotok_lit.errors import ExplainedError, SettingsError
from infotok_lit.models.export import Weights
from infotok_lit.models.family import Family, family
from infotok_lit.models.unified import UnifiedModel
from infotok_lit.modules.lora import LoraConfig, merged_state
from infotok_lit.modules.run_checkpoint import completed
from infotok_lit.modules.sharding import gathered_state
from infotok_lit.objective.config import ObjectiveConfig
from infotok_lit.objective.infotok import InfoTok
from infotok_lit.objective.term import Widths

HOW_TO_LOAD = (
    "a run's model is loaded by infotok_lit.load({path!r}); to go on training, use `fit --ckpt_path`, and to start a "
    "new run from its weights, model.init_from"
)
BASE_PREFIX = "base."
HEADS_PREFIX = "infotok."
AVERAGED, RAW = "state_dict", "current_model_state"
"""Where Lightning keeps the weights of a run that averages them; any other run has the first alone, and it is raw."""


@dataclass(frozen=True)
class InitialModel:
    """The model that training starts from: a size of a family, and where its weights come from.

    Args:
        family: the folder in `models/`.
        size: one of the family's sizes.
        init_from: `embedded`, an official file or folder, an exported folder, a run, or a name on the Hugging Face hub
            (hub.py); None for random weights.
        parts: the official files that the family needs beside its main one, also by their names on the hub.
        tokenizer: folder or hub name; default: the one that init_from brings, or that of the size.
        settings: entries of the configuration that differ from the size's.

    Raises:
        SettingsError: for a size or a part that the family does not have.
    """

    family: str
    size: str
    init_from: str | None
    parts: Mapping[str, str]
    tokenizer: str | None
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        known = family(self.family)
        if self.size not in known.sizes:
            raise SettingsError(
                f"model.size: {self.family} has no size {self.size!r}; choose one of {', '.join(known.sizes)}"
            )
        unknown = sorted(self.parts.keys() - known.parts.keys())
        if unknown:
            raise SettingsError(
                f"model.parts: {self.family} has no {', '.join(unknown)}; it has {', '.join(known.parts)}"
            )

    def build(self) -> UnifiedModel:
        """The model with its initial weights.

        Weights are read before the model is built: a wrong path should not wait for gigabytes of random numbers.
        """
        if self.init_from is None:
            return self._fresh()
        source = self._source
        wanted = self._family.config_of_size(self.size).with_settings(self.settings)
        if exported_family(source) is not None:
            found, official = self._family.read_exported(source)
            self._check_same(found, wanted, source)
            return official.load_into(self._fresh())
        checkpoint = find_checkpoint(source)
        if checkpoint is not None:
            base = self._fresh()
            load_base_weights(base, checkpoint)
            return base
        parts = {name: hub.fetch(path) for name, path in self.parts.items()}
        return self._family.read_official(source, parts, wanted).load_into(self._fresh())

    def reference(self) -> dict[str, Any]:
        """What a checkpoint says of the base model beside its configuration and weights."""
        init_from = None if self.init_from is None else hub.full_name(self.init_from)
        return {"tokenizer": self._tokenizer_source, "init_from": init_from}

    def recipe(self) -> dict[str, Any]:
        """What makes the same InitialModel again, wherever it is read; primitives only."""
        return {
            "family": self.family,
            "size": self.size,
            "init_from": None if self.init_from is None else _lasting(self.init_from),
            "parts": {name: _lasting(path) for name, path in self.parts.items()},
            "tokenizer": self.tokenizer,
            "settings": dict(self.settings),
        }

    @cached_property
    def _source(self) -> Path:
        """Where the initial weights lie; fetched once, not again at each checkpoint."""
        return embedded_base(self.family, self.size) if self.init_from == EMBEDDED else hub.fetch(self.init_from)

    @property
    def _family(self) -> Family:
        return family(self.family)

    def _fresh(self) -> UnifiedModel:
        return self._family.fresh(self.size, self._tokenizer_source, self.settings)

    @cached_property
    def _tokenizer_source(self) -> str:
        """The configured tokenizer, or the one that the initial weights bring, or the size, which names its own."""
        if self.tokenizer is not None:
            return self.tokenizer
        if self.init_from in (None, EMBEDDED):
            return self.size
        brought = (self._source / "tokenizer_config.json").exists()
        # A name on the hub outlives the cache of this machine.
        return self.init_from.removeprefix(hub.SCHEME) if brought else self.size

    def _check_same(self, found: Any, wanted: Any, source: Path) -> None:
        differing = self._family.differing_parts(found, wanted)
        if differing:
            raise CheckpointError(
                f"{source} holds another {self.family} model than model.size and model.settings ask for: "
                f"{', '.join(differing)} differ"
            )


def base_weights(checkpoint: dict[str, Any], weights: Weights = "averaged") -> dict[str, torch.Tensor]:
    """The base model's part of a run's state dict, under the base model's own names; adapters are merged in.

    Args:
        weights: `raw` leaves out the averaging of a run that averages its weights; elsewhere the two are the same.
    """
    state = _with_frozen(_state(checkpoint, weights), checkpoint[CHECKPOINT_KEY])
    base = {name.removeprefix(BASE_PREFIX): value for name, value in state.items() if name.startswith(BASE_PREFIX)}
    lora = checkpoint[CHECKPOINT_KEY].get("lora")
    return base if lora is None else merged_state(base, LoraConfig(**lora))


def _state(checkpoint: Mapping[str, Any], weights: Weights) -> Mapping[str, torch.Tensor]:
    return checkpoint[RAW] if weights == "raw" and RAW in checkpoint else checkpoint[AVERAGED]


def _with_frozen(state: dict[str, torch.Tensor], saved: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A run's state dict with the weights that its checkpoints leave out; CheckpointError names what is missing."""
    recorded = {name: found for name, found in saved.get("frozen", {}).items() if f"{BASE_PREFIX}{name}" not in state}
    if not recorded:
        return state
    initial = saved["initial"]
    source = ", ".join([f"model.init_from {initial['init_from']}", *(f"{k} {v}" for k, v in initial["parts"].items())])
    try:
        base = InitialModel(**initial).build()
    except ExplainedError as error:
        raise CheckpointError(
            f"the checkpoint leaves out {len(recorded)} weights that its run did not train ({next(iter(recorded))}, "
            f"...) and takes them from {source}. {error}"
        ) from error
    return completed(state, base.state_dict(), recorded, source)


def _lasting(source: str) -> str:
    """A name on the hub or a path, so that it means the same from another folder."""
    if source == EMBEDDED or hub.is_on_hub(source):
        return hub.full_name(source) if source != EMBEDDED else source
    return str(Path(source).absolute())


def average_updates(checkpoint: Mapping[str, Any]) -> int | None:
    """How often a run's average of its weights was updated; None for a run that has none."""
    return int(checkpoint["averaging_state"]["n_averaged"]) if RAW in checkpoint else None


def weights_in_words(checkpoint: Mapping[str, Any], weights: Weights) -> str:
    """What a run's `averaged` or `raw` weights are, for people."""
    updates = average_updates(checkpoint)
    if updates is None:
        return "raw (no moving average)"
    return "raw (not the run's moving average)" if weights == "raw" else f"moving average ({updates} updates)"


def rebuild_base(checkpoint: dict[str, Any], weights: Weights = "averaged") -> UnifiedModel:
    """The base model of a run's checkpoint, in evaluation mode; CheckpointError says what does not fit."""
    saved = checkpoint[CHECKPOINT_KEY]
    try:
        return family(saved["family"]).rebuild(saved["config"], saved["tokenizer"], base_weights(checkpoint, weights))
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint does not hold the model that it describes: {error}") from error


def collect_base(base: UnifiedModel, initial: InitialModel, lora: LoraConfig | None) -> UnifiedModel | None:
    """On the first process a whole copy of a sharded base model, with adapters merged in; collective."""
    state = gathered_state(base)
    if not state:
        return None
    state = state if lora is None else merged_state(state, lora)
    return family(base.family).rebuild(base.config.to_dict(), initial.reference()["tokenizer"], state)


def load_base_weights(base: nn.Module, path: Path) -> None:
    """Load the base model of a run into `base`; CheckpointError says what does not fit."""
    weights = base_weights(read_run(path))
    base.load_state_dict(KeyMap(renames=()).from_official(weights, base.state_dict(), str(path)))


def build_heads(objective: ObjectiveConfig, base: UnifiedModel) -> InfoTok:
    """Fresh training-only heads for a base model; SettingsError if it cannot be trained with this objective."""
    if objective.token_budget is not None:
        base.check_reads_causally()
    widths = {
        branch: Widths(width, base.latent_width, base.text_width, base.num_extras[branch])
        for branch, width in base.token_widths.items()
    }
    return InfoTok(objective, widths)


def read_heads(checkpoint: dict[str, Any], base: UnifiedModel, weights: Weights = "averaged") -> InfoTok:
    """The heads in a run's checkpoint, in evaluation mode; `weights` is as for `base_weights`."""
    heads = build_heads(ObjectiveConfig.from_dict(checkpoint[CHECKPOINT_KEY]["objective"]), base)
    state = _state(checkpoint, weights)
    heads.load_state_dict(
        {name.removeprefix(HEADS_PREFIX): value for name, value in state.items() if name.startswith(HEADS_PREFIX)}
    )
    return heads.eval()
