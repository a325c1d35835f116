"""Which base model is fine-tuned, where its weights come from, and the heads that fit it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import nn

from infotok_lit import hub
from infotok_lit.assets import EMBEDDED, embedded_base
from infotok_lit.batch import Encoding
from infotok_lit.checkpoints import (
    CHECKPOINT_KEY,
    CheckpointError,
    exported_family,
    find_checkpoint,
    read_run,
    read_settings,
)
from infotok_lit.errors import ExplainedError, SettingsError
from infotok_lit.models.common.autoencoders import autoencoder_digest
from infotok_lit.models.common.loading import adopt_state, without_initial_weights
from infotok_lit.models.export import Weights
from infotok_lit.models.family import Family, family
from infotok_lit.models.unified import UnifiedModel
from infotok_lit.modules.average import AVERAGE, module_weights, record_of_average
from infotok_lit.modules.half_linear import is_halved, with_originals
from infotok_lit.modules.lora import LoraConfig, merged, merged_state
from infotok_lit.modules.run_checkpoint import BASE_PREFIX, FrozenWeights, completed
from infotok_lit.modules.sharding import gathered_state, is_sharded
from infotok_lit.objective.config import ObjectiveConfig
from infotok_lit.objective.infotok import InfoTok
from infotok_lit.objective.term import Widths

HOW_TO_LOAD = (
    "a run's model is loaded by infotok_lit.load({path!r}); to go on training, use `fit --ckpt_path`, and to start a "
    "new run from its weights, model.init_from"
)
HEADS_PREFIX = "infotok."


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
        known.config_of_size(self.size).with_settings(self.settings)
        unknown = sorted(self.parts.keys() - known.parts.keys())
        if unknown:
            raise SettingsError(
                f"model.parts: {self.family} has no {', '.join(unknown)}; it has {', '.join(known.parts)}"
            )

    def build(self) -> UnifiedModel:
        """The model with its initial weights.

        Of what files hold, nothing is drawn, and nothing copied that they hold as it is needed. The embedded base alone
        is drawn first all the same, which takes no time: so the first numbers of the heads, which come after it in the
        order of a seed, stay what they were in published results.
        """
        if self.init_from is None:
            return self._fresh()
        source = self._source
        wanted = self._family.config_of_size(self.size).with_settings(self.settings)
        if exported_family(source) is not None:
            found, official = self._family.read_exported(source)
            self._check_same(found, wanted, source)
            if self.init_from == EMBEDDED:
                return official.load_into(self._fresh())
            return self._family.with_weights(official, wanted, self._tokenizer_source)
        if self._checkpoint is not None:
            run = read_run(self._checkpoint)
            saved = run[CHECKPOINT_KEY]
            # Of another family, no name fits.
            if saved["family"] == self.family:
                self._check_same(self._family.config_class.from_dict(saved["config"]), wanted, self._checkpoint)
            state = base_weights(run)
            with without_initial_weights():
                base = self._fresh()
            adopt_state(base, state, str(self._checkpoint))
            return base
        parts = {name: hub.fetch(path) for name, path in self.parts.items()}
        official = self._family.read_official(source, parts, wanted)
        return self._family.with_weights(official, wanted, self._tokenizer_source)

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
            "tokenizer": None if self.tokenizer is None else self._tokenizer_source,
            "settings": dict(self.settings),
        }

    def frozen_weights(self, base: UnifiedModel, strategy: Strategy | None, halved: bool) -> FrozenWeights:
        """What the checkpoints of a run from here leave out.

        Not the layers into which adapters of an earlier run were merged, whose last bits are this processor's; but they
        are where they are kept halved, as a checkpoint would have the rounded ones.

        Args:
            base: the model as it trains.
            strategy: what is about to shard it; None for nothing.
            halved: whether frozen layers are about to be halved.
        """
        merged = () if halved else self._merged_targets
        return FrozenWeights(base, self.init_from, strategy, halved, merged)

    @property
    def _merged_targets(self) -> tuple[str, ...]:
        """Of the adapters that are merged into these weights: those of the run that they come from."""
        if self.init_from in (None, EMBEDDED) or exported_family(self._source) is not None or not self._checkpoint:
            return ()
        lora = read_settings(self._checkpoint)[CHECKPOINT_KEY].get("lora")
        return () if lora is None else LoraConfig(**lora).targets

    def rebuilding(self, module: nn.Module, lora: LoraConfig | None) -> dict[str, Any]:
        """What rebuilds the trained model `module.base` and its heads from a run's checkpoint; primitives only."""
        return {
            "family": module.base.family,
            "config": module.base.config.to_dict(),
            **self.reference(),
            "initial": self.recipe(),
            "lora": None if lora is None else asdict(lora) | {"targets": list(lora.targets)},
            "objective": asdict(module.infotok.config),
            "term_weights": module.infotok.equivalents(),
            AVERAGE: record_of_average(module),
        }

    @cached_property
    def _source(self) -> Path:
        """Where the initial weights lie; fetched once, not again at each checkpoint."""
        return embedded_base(self.family, self.size) if self.init_from == EMBEDDED else hub.fetch(self.init_from)

    @cached_property
    def _checkpoint(self) -> Path | None:
        """That of the run whose weights these are, if they are a run's; all of it is read to look for it."""
        return find_checkpoint(self._source)

    @property
    def _family(self) -> Family:
        return family(self.family)

    def _fresh(self) -> UnifiedModel:
        return self._family.fresh(self.size, self._tokenizer_source, self.settings)

    @cached_property
    def _tokenizer_source(self) -> str:
        """The configured tokenizer, or the one that the initial weights bring, or the size, which names its own."""
        if self.tokenizer is not None:
            return self.tokenizer if self.tokenizer in self._family.tokenizers else _anywhere(self.tokenizer)
        if self.init_from in (None, EMBEDDED):
            return self.size
        beside = hub.tokenizer_beside(self.init_from)
        if beside is not None:
            return beside if hub.is_on_hub(self.init_from) else _anywhere(beside)
        # Of a repository no weights are fetched for this, unless they may be a run's.
        is_run = not hub.is_on_hub(self.init_from) or self.init_from.endswith(".ckpt")
        run = read_settings(self._checkpoint)[CHECKPOINT_KEY] if is_run and self._checkpoint is not None else {}
        return run["tokenizer"] if run.get("family") == self.family else self.size

    def _check_same(self, found: Any, wanted: Any, source: Path) -> None:
        differing = self._family.differing_parts(found, wanted)
        if differing:
            raise CheckpointError(
                f"{source} holds another {self.family} model than model.size and model.settings ask for: "
                f"{', '.join(differing)} differ"
            )


def refuse_lost_average(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """CheckpointError if a run kept a moving average, and what is to go on with it does not."""
    kept = any(name.startswith(f"{AVERAGE}.") for name in checkpoint.get("state_dict", {}))
    if kept and not hasattr(module, AVERAGE):
        raise CheckpointError(
            "the checkpoint holds a moving average of the weights, and trainer.callbacks has no WeightAverage to go on "
            "with it: add --config trainer/weight_average, or start anew from the average with model.init_from"
        )


def base_weights(checkpoint: dict[str, Any], weights: Weights = "averaged") -> dict[str, torch.Tensor]:
    """The base model's part of a run's state dict, under the base model's own names; adapters are merged in.

    Args:
        weights: `raw` leaves out the averaging of a run that averages its weights; elsewhere the two are the same.
    """
    state = _with_frozen(module_weights(checkpoint, weights), checkpoint[CHECKPOINT_KEY])
    base = {name.removeprefix(BASE_PREFIX): value for name, value in state.items() if name.startswith(BASE_PREFIX)}
    lora = checkpoint[CHECKPOINT_KEY].get("lora")
    return base if lora is None else merged_state(base, LoraConfig(**lora))


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


def _anywhere(source: str) -> str:
    """The path of what lies here, so that it is found from another folder; anything else as it is."""
    return str(Path(source).absolute()) if Path(source).exists() else source


def rebuild_base(checkpoint: dict[str, Any], weights: Weights = "averaged") -> UnifiedModel:
    """The base model of a run's checkpoint, in evaluation mode; CheckpointError says what does not fit."""
    saved = checkpoint[CHECKPOINT_KEY]
    try:
        return family(saved["family"]).rebuild(saved["config"], saved["tokenizer"], base_weights(checkpoint, weights))
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint does not hold the model that it describes: {error}") from error


@contextmanager
def plain(
    base: UnifiedModel, initial: InitialModel, lora: LoraConfig | None, exact: bool = False
) -> Iterator[UnifiedModel | None]:
    """Inside, the base model without adapters, which are merged in; a collective call if it is sharded.

    Of a sharded model it is a whole copy on the first process, and None on the others.

    Args:
        exact: what training keeps in bfloat16 is as in the files that it came from; then it is a copy, too.
    """
    restored = exact and is_halved(base)
    if is_sharded(base) or restored:
        state = gathered_state(base) if is_sharded(base) else _on_host(base)
        if state and restored and initial.init_from is not None:
            state = with_originals(state, base, initial.build().state_dict())
        state = merged_state(state, lora) if state and lora is not None else state
        tokenizer = initial.reference()["tokenizer"]
        yield family(base.family).rebuild(base.config.to_dict(), tokenizer, state) if state else None
        return
    with nullcontext() if lora is None else merged(base, lora):
        yield base


def _on_host(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in module.state_dict().items()}


def encoding_of(base: UnifiedModel) -> Encoding:
    """What a cache of a model's latents belongs to; SettingsError for a family that takes none."""
    branches = family(base.family).encoded_branches
    if not branches:
        raise SettingsError(
            f"{base.title} takes no latents from a cache, as its family has no encoded_branches: do without `cache` "
            "and data.latents"
        )
    config = base.config.autoencoder
    digest = autoencoder_digest(config, base.autoencoder)
    return Encoding(base.family, base.config.image_size, config.kind, digest, branches)


def build_heads(objective: ObjectiveConfig, base: UnifiedModel) -> InfoTok:
    """Fresh training-only heads for a base model."""
    widths = {
        branch: Widths(width, base.latent_width, base.text_width, base.num_extras[branch])
        for branch, width in base.token_widths.items()
    }
    return InfoTok(objective, widths)


def read_heads(checkpoint: dict[str, Any], base: UnifiedModel, weights: Weights = "averaged") -> InfoTok:
    """The heads in a run's checkpoint, in evaluation mode; `weights` is as for `base_weights`."""
    heads = build_heads(ObjectiveConfig.from_dict(checkpoint[CHECKPOINT_KEY]["objective"]), base)
    state = module_weights(checkpoint, weights)
    heads.load_state_dict(
        {name.removeprefix(HEADS_PREFIX): value for name, value in state.items() if name.startswith(HEADS_PREFIX)}
    )
    return heads.eval()
