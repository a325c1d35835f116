"""Harmon as a LightningModule."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from infotok_lit.assets import HARMON_SCENES32
from infotok_lit.models.checkpoint import CheckpointError
from infotok_lit.models.folder import CONFIG_FILE
from infotok_lit.models.harmon.config import HarmonConfig, Size, config_of_size
from infotok_lit.models.harmon.loading import harmon_of_size, read_exported, read_official
from infotok_lit.models.harmon.model import Harmon
from infotok_lit.modules.infotok_module import InfoTokModule, TaskWeights
from infotok_lit.modules.optimiser import OptimiserConfig
from infotok_lit.modules.run import find_checkpoint, load_base_weights
from infotok_lit.objective.config import ObjectiveConfig

EMBEDDED = "embedded"


class HarmonModule(InfoTokModule):
    """Fine-tunes Harmon.

    Args:
        size: Which Harmon. `scenes32` is the small one for the embedded benchmark.
        init_from: Where the weights come from, without any optimiser state: `embedded` (the base that ships with the
            package, for scenes32), an official file (harmon_0.5b.pth, harmon_1.5b.pth), an exported folder, or a run
            (its folder or one of its checkpoints). None starts from random weights.
        autoencoder: The official kl16.ckpt, for sizes that need it; exported folders and runs bring their own.
        tokenizer: Folder or hub name of the tokenizer; default: the one that init_from brings, or that of the size.
        image_size: Side of the images in pixels; default: that of the size (512 for the official ones).
        objective: The InfoTok objective; its `terms` decide which heads exist.
        optimiser: AdamW and its schedule.
        task_weights: Weights of the two task losses.
        freeze: Prefixes of the parameters that stay as they are, such as `llm.`; the autoencoder always does.
        activation_checkpointing: Save memory by recomputing activations in the backward pass.
        answer_tokens: The longest answer that validation generates, in tokens.
    """

    def __init__(
        self,
        size: Size = "scenes32",
        init_from: str | None = None,
        autoencoder: str | None = None,
        tokenizer: str | None = None,
        image_size: int | None = None,
        objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008 - frozen
        optimiser: OptimiserConfig = OptimiserConfig(),  # noqa: B008 - frozen
        task_weights: TaskWeights = TaskWeights(),  # noqa: B008 - frozen
        freeze: tuple[str, ...] = (),
        activation_checkpointing: bool = False,
        answer_tokens: int = 32,
    ) -> None:
        super().__init__(objective, optimiser, task_weights, freeze, activation_checkpointing, answer_tokens)
        self.size = size
        self.init_from = init_from
        self.autoencoder = autoencoder
        self.tokenizer = tokenizer
        self.image_size = image_size

    def build_base(self) -> Harmon:
        """A Harmon of the size, with the weights of `init_from`."""
        base = self._load_base()
        source = "random weights" if self.init_from is None else self.init_from
        rank_zero_info(f"The base model is Harmon {self.size}, initialised from {source}.")
        return base

    def _load_base(self) -> Harmon:
        """Weights are read before the model is built: a wrong path should not wait for gigabytes of random numbers."""
        if self.init_from is None:
            return self._fresh_base()
        source = HARMON_SCENES32 if self.init_from == EMBEDDED else Path(self.init_from)
        if (source / CONFIG_FILE).exists():
            config, official = read_exported(source)
            _check_same_model(config, config_of_size(self.size), source)
            return official.load_into(self._fresh_base())
        checkpoint = find_checkpoint(source)
        if checkpoint is not None:
            base = self._fresh_base()
            load_base_weights(base, checkpoint)
            return base
        autoencoder = None if self.autoencoder is None else Path(self.autoencoder)
        official = read_official(source, autoencoder, config_of_size(self.size))
        return official.load_into(self._fresh_base())

    def _fresh_base(self) -> Harmon:
        return harmon_of_size(self.size, self._tokenizer_source(), self.image_size)

    def _tokenizer_source(self) -> str:
        """The configured tokenizer, or the one that the initial weights bring, or that of the size."""
        if self.tokenizer is not None:
            return self.tokenizer
        brought = self.init_from is not None and (Path(self.init_from) / "tokenizer_config.json").exists()
        return self.init_from if brought else self.size

    def base_reference(self) -> dict[str, Any]:
        """The tokenizer's source, and where the weights came from."""
        return {"tokenizer": self._tokenizer_source(), "init_from": self.init_from}


def _check_same_model(found: HarmonConfig, wanted: HarmonConfig, source: Path) -> None:
    differing = [name for name in ("autoencoder", "mar", "llm") if getattr(found, name) != getattr(wanted, name)]
    if differing:
        raise CheckpointError(f"{source} holds another Harmon than model.size asks for: {', '.join(differing)} differ")
