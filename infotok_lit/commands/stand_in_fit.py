"""A fit as a configuration shapes it, without its weights, its tokenizer and its data: stand-ins have their place."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.batch import Branch, GenerationSample, Sample, Source, UnderstandingSample
from infotok_lit.errors import SettingsError

if TYPE_CHECKING:
    import numpy as np

    from infotok_lit.data import UnifiedDataModule
    from infotok_lit.modules.infotok_module import InfoTokModule

RECOMPUTE = "--model.init_args.activation_checkpointing true"
DRAWN = "infotok_lit.scenes.Scenes"
"""The class of images that need no files."""
TEXT_TOKENS = 128
"""Of texts that are not at hand."""
SIDE = 64
"""Of the stand-in images, which are resized as all images are."""
WORDS = ("red", "green", "blue", "cyan", "purple", "yellow", "circle", "square", "cross", "triangle", "small")
"""Each is one token after a space."""


@dataclass(frozen=True)
class Plan:
    """How a step is cut up: samples of each branch at a time, and batches whose gradients are added up."""

    understanding: int
    generation: int
    accumulate: int
    recompute: bool

    @property
    def smallest(self) -> "Plan":
        """The same samples in a step, as few at a time as the branches' ratio allows, and two: alignment needs another.

        What is one image already stays one.
        """
        both = gcd(self.understanding, self.generation)
        fewest = min(self.understanding, self.generation)
        times = max(n for n in range(1, both + 1) if both % n == 0 and (n == 1 or fewest // n >= 2))
        return replace(
            self,
            understanding=self.understanding // times,
            generation=self.generation // times,
            accumulate=self.accumulate * times,
        )

    def options_after(self, other: "Plan") -> str:
        """The options that turn another plan into this one."""
        options = [RECOMPUTE] if self.recompute and not other.recompute else []
        if self.accumulate != other.accumulate:
            options += [
                f"--data.init_args.understanding_batch_size {self.understanding}",
                f"--data.init_args.generation_batch_size {self.generation}",
                f"--trainer.accumulate_grad_batches {self.accumulate}",
            ]
        return " ".join(options)


def read_settings(fit_arguments: Sequence[str]) -> Namespace:
    """The configuration of a fit, of which nothing is instantiated; SettingsError if it is no unified model's."""
    from infotok_lit.commands.fit import InfoTokCLI

    class Settings(InfoTokCLI):
        def instantiate_classes(self) -> None:
            """Nothing: neither the data nor the cards need be here."""

    config = Settings(["fit", *fit_arguments, "--trainer.accelerator=cpu"], run=False).config
    if "activation_checkpointing" not in config.model.init_args:
        raise SettingsError(f"estimate knows the modules of unified models; {config.model.class_path} is none of them")
    return config


def plan_of(settings: Namespace) -> Plan:
    """How the configuration cuts up a step."""
    data = settings.data.init_args
    return Plan(
        data.understanding_batch_size,
        data.generation_batch_size,
        settings.trainer.accumulate_grad_batches,
        settings.model.init_args.activation_checkpointing,
    )


def build_module(settings: Namespace, plan: Plan) -> "InfoTokModule":
    """A configured module, that would begin with random weights and reads with a stand-in for its tokenizer."""
    import lightning.pytorch as pl

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningModule, "model")
    module = parser.instantiate(Namespace(model=settings.model.clone())).model
    module.activation_checkpointing = plan.recompute
    # No weight is read and no name looked up.
    stand_in = {"init_from": None, "parts": {}, "tokenizer": str(SCENES_TOKENIZER)}
    module.initial_model = replace(module.initial_model, **stand_in)
    return module


def build_data(settings: Namespace, plan: Plan, text_tokens: int | None) -> "UnifiedDataModule":
    """Images with texts in batches of a plan: those that are configured if they are drawn by a program, or stand-ins.

    Args:
        text_tokens: the length of the stand-ins' texts; None for what is configured, or for TEXT_TOKENS.
    """
    from infotok_lit.data import UnifiedDataModule

    configured = settings.data.init_args.train
    if text_tokens is None and configured.class_path == DRAWN:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(Source, "train")
        source = parser.instantiate(Namespace(train=configured.clone())).train
    else:
        source = StandIns(text_tokens or TEXT_TOKENS)
    return UnifiedDataModule(
        train=source,
        understanding_batch_size=plan.understanding,
        generation_batch_size=plan.generation,
        prompt_dropout=0.0,
    )


def shaping(settings: Namespace, plan: Plan) -> dict[str, Any]:
    """The settings of the trainer that shape a step."""
    trainer = settings.trainer
    return {
        # On a CPU there is no scaling of losses, which takes no memory to speak of.
        "precision": "bf16-mixed" if trainer.precision == "16-mixed" else trainer.precision,
        # That there are several matters, as gradients then live through forward passes; how many does not.
        "accumulate_grad_batches": min(plan.accumulate, 2),
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
    }


class StandIns(Source):
    """Grey images with texts of some number of tokens, most of them different.

    Args:
        tokens: how many the Scenes tokenizer makes of an answer, or of a caption.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return 1024

    def sample(self, branch: Branch, index: int, rng: "np.random.Generator") -> Sample:
        """The same for an index, whatever the random numbers."""
        from PIL import Image

        image = Image.new("RGB", (SIDE, SIDE), "gray")
        text = "".join(f" {WORDS[(index * (place + 1)) % len(WORDS)]}" for place in range(self.tokens))
        if branch == "understanding":
            return UnderstandingSample(image, "what is in the image?", text, str(index))
        return GenerationSample(image, text, str(index))
