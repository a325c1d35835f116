"""`gpu_check`: within some minutes, whether all of this works on a card, and how fast: a table of checks with marks."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any, Literal

from jsonargparse.typing import PositiveFloat, PositiveInt

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.errors import ExplainedError, SettingsError
from infotok_lit.files import check_target, write_json
from infotok_lit.progress import progress_bar
from infotok_lit.tables import Table

FAMILIES = ("harmon", "showo2", "openuni")
SIZES = ("harmon/0.5b", "showo2/1.5b", "harmon/1.5b", "openuni/b-512")
LOSS_DIFFERENCE = 1e-4
MOST_GIB = 72.0
MOST_OVERHEAD = 1.15
LEAST_MFU = {"0.5b": 0.30, "1.5b": 0.40}
"""What the name of a configuration ends in -> the share of a card's peak that training is to reach."""
QUIET = ("--trainer.logger.init_args.name=check", "--trainer.enable_progress_bar=false")
STEPS, KEPT = 10, 6
"""Steps of the run that is resumed, and after how many of them it goes on anew."""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    passed: bool
    value: float | str
    """A number, or what went wrong."""
    wanted: str = ""
    seconds: float = 0.0


Block = tuple[str, Callable[[], Iterable[Check]]]
"""The name of a group of checks, and what makes them."""


class FailedCommandError(ExplainedError, RuntimeError):
    """A command of the check did not end well; the message is its last line."""


@dataclass(frozen=True)
class Place:
    """Where the checks run: a kind of device, a folder to write into, and when they must have ended."""

    accelerator: str
    folder: Path
    deadline: float

    @property
    def device(self) -> str:
        """Its name in PyTorch."""
        return "cuda" if self.accelerator == "gpu" else self.accelerator

    def call(self, *arguments: str) -> str:
        """Run a subcommand in a process of its own, and return all that it said.

        Raises:
            FailedCommandError: it failed, took too long, or compiled something anew too often.
        """
        command = [sys.executable, "-m", "infotok_lit", *arguments]
        environment = os.environ | {"TORCH_LOGS": "recompiles", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        left = self.deadline - monotonic()
        if left <= 0:
            raise FailedCommandError("there was no time left")
        try:
            done = subprocess.run(
                command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=left
            )
        except subprocess.TimeoutExpired:
            raise FailedCommandError("there was no time left") from None
        said = done.stdout + done.stderr
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise FailedCommandError(lines[-1] if lines else f"exit status {done.returncode}")
        if "recompile_limit" in said or "cache_size_limit" in said:
            raise FailedCommandError("torch.compile reached its limit of recompilations")
        return said

    def fit(self, folder: str, *arguments: str) -> Path:
        """Train into a folder of its own, and return that of the run."""
        root = self.folder / folder
        own = [f"--trainer.accelerator={self.accelerator}", "--trainer.devices=1"]
        self.call("fit", *arguments, *own, *QUIET, f"--trainer.logger.init_args.save_dir={root}")
        (config,) = root.glob("**/config.yaml")
        return config.parent


def gpu_check(
    accelerator: Literal["gpu", "cpu"] = "gpu",
    sizes: list[str] | None = None,
    families: list[str] | None = None,
    steps: PositiveInt = 6,
    minutes: PositiveFloat = 15.0,
    out: Path | None = None,
) -> int:
    """Check on one card, without the network: the three families in both precisions, resuming, and the full sizes.

    The full sizes have random weights. Marks: the losses of a card are a CPU's within 1e-4 in 32 bits; a resumed run
    ends with the weights of one that went through, bit for bit; nothing is compiled anew too often; the peak is below
    72 GiB, the MFU at least 0.30 (0.5B) and 0.40 (1.5B), and C&S&A takes at most 1.15 of plain fine-tuning's time.

    Args:
        accelerator: `cpu` goes through the same checks without a card, without marks for speed.
        sizes: Configurations that are timed; default: the official sizes that one card trains.
        families: Which families; default: all.
        steps: How many steps are timed of each.
        minutes: When to stop; what then has not run has not passed.
        out: Also write the checks to this JSON file.
    """
    check_target(out)
    import torch

    from infotok_lit.callbacks.history import versions

    date, device = datetime.now(UTC).isoformat(timespec="seconds"), name_of_device(accelerator)
    with TemporaryDirectory() as folder:
        place = Place(accelerator, Path(folder), monotonic() + 60 * minutes)
        checks = run_checks(list(all_checks(place, sizes or SIZES, families or FAMILIES, steps)))
    result = {"device": device, "date": date, "versions": versions() | {"cuda": torch.version.cuda}}
    result["checks"] = [asdict(check) for check in checks]
    write_json(out, result)
    show(result)
    return 0 if all(check.passed for check in checks) else 1


def run_checks(blocks: Sequence[Block]) -> list[Check]:
    """What the blocks found, one after another; what goes wrong in one has failed, whatever it is."""
    checks: list[Check] = []
    with progress_bar(len(blocks)) as bar:
        for number, (name, block) in enumerate(blocks):
            bar.show(number, name)
            start = monotonic()
            try:
                found = list(block())
            except Exception as error:
                # The other blocks have their turn, and what was found on a rented card is not lost.
                found = [Check(name, passed=False, value=str(error) or type(error).__name__)]
            checks += [replace(check, seconds=(monotonic() - start) / len(found)) for check in found]
    return checks


def all_checks(place: Place, sizes: Sequence[str], families: Sequence[str], steps: int) -> Iterator[Block]:
    """The blocks in their order, the riskiest first."""
    for family in families:
        yield f"{family}: fit, validate, draw, answer, export", lambda family=family: user_path(place, family)
        yield f"{family}: losses in 32 bits", lambda family=family: losses(place, family)
    yield "exact resume", lambda: resume(place)
    for size in sizes:
        yield f"{size}: speed", lambda size=size: speed(place, size, steps)
    yield f"{sizes[0]}: fit, go on, generate", lambda: official_path(place, sizes[0])


# The checks


def user_path(place: Place, family: str) -> Iterator[Check]:
    """A short fit in mixed precision with all that happens around training."""
    few = ["--trainer.max_steps=4", "--trainer.val_check_interval=4", "--data.init_args.val_samples=8"]
    path = place.fit(f"{family}_path", f"--config={family}/scenes32", "--trainer.precision=bf16-mixed", *few)
    weights = sorted(one.name for one in path.glob("export/*.safetensors"))
    yield Check(f"{family}: fit to export in bf16-mixed", bool(weights), ", ".join(weights), "exported weights")


def losses(place: Place, family: str) -> Iterator[Check]:
    """The first losses and terms of both branches on the device, against a CPU's, from the same random numbers."""
    from infotok_lit.commands.same_numbers import largest_difference

    difference = largest_difference(family, place.device)
    passed = difference <= LOSS_DIFFERENCE
    yield Check(f"{family}: losses against a CPU's in 32 bits", passed, difference, f"<= {LOSS_DIFFERENCE:g}")


def resume(place: Place) -> Iterator[Check]:
    """A run with dropout that goes on from its middle must end where it ended when it went through."""
    from safetensors.torch import load_file

    settings = [
        *("--config=harmon/scenes32", "--trainer.deterministic=true", f"--trainer.max_steps={STEPS}"),
        '--model.init_args.settings={"mar": {"dropout": 0.1}}',
        *("--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0"),
        *(f"--checkpoint.every_n_train_steps={KEPT}", "--checkpoint.save_top_k=-1"),
    ]
    whole = place.fit("whole", *settings)
    (middle,) = (path for path in whole.glob("checkpoints/*.ckpt") if re.search(rf"step={KEPT}\b", path.name))
    parts = place.fit("parts", *settings, f"--ckpt_path={middle}")
    ends = [load_file(path / "export" / "harmon.safetensors") for path in (whole, parts)]
    differing = [name for name, value in ends[0].items() if not value.equal(ends[1][name])]
    yield Check("exact resume, with dropout", not differing, f"{len(differing)} weights differ", "none")


def speed(place: Place, size: str, steps: int) -> Iterator[Check]:
    """What a step takes, with the real batch and random weights."""
    numbers = place.folder / f"{size.replace('/', '_')}.json"
    place.call(
        *("bench", *with_stand_ins(place, size), "--trainer.accumulate_grad_batches=1"),
        *(f"--steps={steps}", "--warmup=2", "--rounds=1", "--variants", "plain", "C&S&A", f"--out={numbers}"),
    )
    result = json.loads(numbers.read_text())
    on_card = place.accelerator == "gpu"
    full = next(variant for variant in result["variants"] if variant["name"] == "C&S&A")
    milliseconds = round(1000 * full["step_seconds"], 1)
    yield Check(f"{size}: step, ms", True, milliseconds)
    overhead = full["ratio"]
    passed = not on_card or overhead <= MOST_OVERHEAD
    yield Check(f"{size}: C&S&A / plain", passed, round(overhead, 3), f"<= {MOST_OVERHEAD}" if on_card else "")
    if not on_card:
        return
    peak = full["peak_memory_bytes"] / 2**30
    yield Check(f"{size}: peak memory, GiB", peak < MOST_GIB, round(peak, 2), f"< {MOST_GIB:g}")
    least = next((mark for name, mark in LEAST_MFU.items() if size.endswith(name)), None)
    mfu = full["mfu"]
    passed = least is None or (mfu is not None and mfu >= least)
    value = "the card's peak is not known" if mfu is None else round(mfu, 3)
    yield Check(f"{size}: MFU", passed, value, "" if least is None else f">= {least:.2f}")


def official_path(place: Place, size: str) -> Iterator[Check]:
    """Train a few steps, go on from the export, and draw from that."""
    short = [
        # The export is what is gone on from.
        *("--trainer.max_steps=3", "--trainer.accumulate_grad_batches=1", "--trainer.enable_checkpointing=false"),
        *("--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0"),
    ]
    arguments = with_stand_ins(place, size)
    first = place.fit("first", *arguments, *short)
    second = place.fit("second", *arguments, *short, f"--model.init_args.init_from={first / 'export'}")
    picture = place.folder / "picture.png"
    place.call(
        *("generate", f"--model={second / 'export'}", "--prompt=a red circle", "--iterations=8", f"--out={picture}"),
        f"--device={place.device}",
    )
    yield Check(f"{size}: fit, go on from its export, generate", picture.stat().st_size > 0, picture.name, "a picture")


def with_stand_ins(place: Place, size: str) -> list[str]:
    """The options of a configuration with random weights, and stand-ins for its tokenizer and data."""
    train = {"class_path": "infotok_lit.commands.stand_in_fit.StandIns", "init_args": {"tokens": 128}}
    model = {"init_from": str(random_weights(place, size)), "parts": None, "tokenizer": str(SCENES_TOKENIZER)}
    content = {"model": {"init_args": model}, "data": {"init_args": {"train": train}}}
    overlay = place.folder / "stand_ins.yaml"
    overlay.write_text(json.dumps(content))
    return [f"--config={size}", f"--config={overlay}", f"--trainer.accelerator={place.accelerator}"]


def random_weights(place: Place, size: str) -> Path:
    """An exported folder of a configuration's model, drawn once and on the card: a CPU takes a minute for a billion."""
    import torch

    from infotok_lit.commands.stand_in_fit import build_module, plan_of, read_settings
    from infotok_lit.models.export import export_model

    folder = place.folder / f"{size.replace('/', '_')}_weights"
    if not folder.exists():
        settings = read_settings([f"--config={size}"])
        initial = build_module(settings, plan_of(settings)).initial_model
        with torch.random.fork_rng(), torch.device(place.device):
            torch.manual_seed(0)
            base = initial.build()
        export_model(base.to("cpu"), folder, provenance={})
        torch.cuda.empty_cache()
    return folder


# For people


def name_of_device(accelerator: str) -> str:
    """What the checks run on; SettingsError where there is no card."""
    import torch

    if accelerator == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        raise SettingsError(
            "gpu_check needs a GPU, and PyTorch sees none; `--accelerator cpu --sizes harmon/scenes32` goes through "
            "the same checks on a CPU"
        )
    return torch.cuda.get_device_name()


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    lines = []
    for check in result["checks"]:
        value = check["value"] if isinstance(check["value"], str) else f"{check['value']:.4g}"
        verdict = "passed" if check["passed"] else "FAILED"
        lines.append([check["name"], value, check["wanted"], verdict, f"{check['seconds']:.0f}"])
    title = f"{result['device']}, torch {result['versions']['torch']}"
    Table(title, ["", "value", "wanted", "", "s"], lines, wraps=True).show()
