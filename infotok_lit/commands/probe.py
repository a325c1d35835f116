"""Measure what the shared tokens hold: bits about the objects of unseen scenes, and about the texture behind them.

Probes are trained on some scenes and measured on others, none of which the model was trained on. Every number is a
lower bound on mutual information, in bits per image. A run brings its posteriors too: their means, and samples of
them, whose structure and texture together stay below their rate.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from infotok_lit import __version__
from infotok_lit.checkpoints import read_run
from infotok_lit.commands.parsing import Seed
from infotok_lit.errors import SettingsError
from infotok_lit.files import check_target, write_json
from infotok_lit.inference import InferenceModel
from infotok_lit.model_choice import ModelChoice, ModelOptions, choose, chosen_device
from infotok_lit.progress import progress_bar
from infotok_lit.tables import Table

if TYPE_CHECKING:
    from infotok_lit.models.unified import UnifiedModel
    from infotok_lit.objective.infotok import InfoTok


def probe(
    model: str,
    options: ModelOptions,
    scenes: Literal["scenes32", "scenes64", "scenes32_hard", "garments32"] = "scenes32",
    train: PositiveInt = 1500,
    test: PositiveInt = 500,
    hidden: NonNegativeInt = 0,
    batch_size: PositiveInt = 50,
    seed: Seed = 0,
    texture: float | None = None,
    jitter: float | None = None,
    out: Path | None = None,
) -> None:
    """Measure what the shared tokens hold: bits about the objects of unseen scenes, and about the texture behind them.

    Args:
        model: An exported folder, a run, an official checkpoint, a name on the Hugging Face hub, or a base that ships,
            such as harmon_scenes32.
        scenes: Family of scenes.
        train: Scenes that fit the probes, 50 or more.
        test: Scenes that measure them.
        hidden: Hidden width of the probes of objects; 0 for linear ones.
        batch_size: Scenes at a time.
        seed: Of scenes and random numbers.
        texture: Strength of the background in [0, 1]; default: the family's own.
        jitter: Most pixels off a cell's centre; default: the family's own.
        out: A JSON file to write the numbers to, too.
    """
    check_target(out)
    choice = choose(model, options)
    from infotok_lit.callbacks.scene_probes import probed_model
    from infotok_lit.scenes.prior import ScenePrior
    from infotok_lit.scenes.probe import ProbeOptions, measure
    from infotok_lit.scenes.spec import SPECS

    asked = ProbeOptions(scenes, train, test, hidden, batch_size, seed, texture, jitter)
    base, heads, running = _load(choice)
    with progress_bar(1.0) as bar:
        rows = [row.to_dict() for row in measure(probed_model(base, heads, running), asked, bar.show)]
    result = {"infotok_lit": __version__, "model": model, "family": base.family, **asdict(asked)}
    # What there is to know about the objects, in bits per scene.
    result |= {"structure_ceiling": ScenePrior(SPECS[scenes]).entropy_bits(), "rows": rows}
    write_json(out, result)
    for table in tables(result):
        table.show()


def _load(
    choice: ModelChoice,
) -> "tuple[UnifiedModel, InfoTok | None, Callable[[], AbstractContextManager[Any]]]":
    """The model, the heads if it is a run, and the context to call them in."""
    if not choice.is_run:
        model = choice.load()
        return model, None, InferenceModel(model).running
    if choice.options.dtype != "float32":
        raise SettingsError("a run is probed in float32: leave out --dtype, or export the run first")
    import torch

    from infotok_lit.modules.base_model import read_heads, rebuild_base

    checkpoint = read_run(choice.path)
    device = chosen_device(choice.options.device)
    base = rebuild_base(checkpoint).to(device)
    return base, read_heads(checkpoint, base).to(device), torch.inference_mode


def tables(result: dict[str, Any]) -> list[Table]:
    """The result for people: a table per branch, with a row per part and a column per kind of features."""
    ceiling = result["structure_ceiling"] | {"structure": sum(result["structure_ceiling"].values())}
    shown = []
    for branch in dict.fromkeys(row["branch"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["branch"] == branch]
        lines = []
        parts = list(rows[0]["parts"])
        split = len(result["structure_ceiling"])
        for name in ("structure", *parts[:split], "texture", *parts[split:]):
            label = name if name in ("structure", "texture") else f"  {name}"
            bits = [row["parts"].get(name) or row[name] for row in rows]
            lines.append([label, f"{ceiling[name]:.2f}" if name in ceiling else "", *map(_cell, bits)])
        if any(row["rate_bits"] is not None for row in rows):
            rates = ["" if row["rate_bits"] is None else f"{row['rate_bits']:.1f}" for row in rows]
            lines.append(["rate (most)", "", *rates])
        header = ["", "of", *(row["features"].replace(" ", "\n") for row in rows)]
        shown.append(Table(f"{branch}: bits per image, at least", header, lines, "\u00b1 standard error"))
    return shown


def _cell(bits: dict[str, float]) -> str:
    # Adding 0 turns a rounded -0 into 0.
    return f"{round(bits['mean'], 2) + 0.0:.2f} \u00b1{bits['error']:.1f}"
