"""Figures and where they go: matplotlib without global state, colours that colour-blind people can tell apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import Logger
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from infotok_lit.batch import Branch
from infotok_lit.files import replacing
from infotok_lit.modules.run_callbacks import run_folder

BRANCH_COLOURS: dict[Branch, str] = {"understanding": "#0072B2", "generation": "#D55E00"}
"""Okabe and Ito's blue and vermilion."""
GREY = "#666666"
PANEL = (4.4, 3.3)
"""Inches of width and height of one panel."""
DPI = 110


def panels(rows: int, columns: int, title: str) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns)."""
    figure = Figure(figsize=(columns * PANEL[0], rows * PANEL[1] + 0.4), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        tidy(axis)
    return figure, axes


def tidy(axis: Axes) -> None:
    """A light grid, and no frame where there are no numbers."""
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)


def log_axis(axis: Axes, name: Literal["x", "y"], lowest: float, highest: float) -> None:
    """A logarithmic axis with plain numbers, also where it spans less than a decade."""
    axis.set(**{f"{name}scale": "log"})
    scaled = axis.xaxis if name == "x" else axis.yaxis
    span = highest / max(lowest, 1e-9)
    scaled.set_major_locator(MaxNLocator(5) if span < 10 else LogLocator(subs=(1, 2, 5) if span < 300 else (1,)))
    scaled.set_major_formatter("{x:g}")
    scaled.set_minor_formatter(NullFormatter())


def rendered(figure: Figure) -> Image.Image:
    """The figure as an RGB picture."""
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())


def publish(trainer: pl.Trainer, name: str, draw: Callable[[], Image.Image]) -> None:
    """Show a picture where the run logs, and keep it under the run folder as PNG; a collective call.

    TensorBoard, Weights & Biases, Comet and MLflow show pictures; for other loggers only the file is left. Without a
    logger there is no run folder.

    Args:
        draw: makes the picture; called on the first process alone.
    """
    folder, step = run_folder(trainer), trainer.global_step  # all processes settle the folder between them
    if not trainer.is_global_zero:
        return
    picture = draw()
    for logger in trainer.loggers:
        show_in(logger, name, picture, step)
    if folder is not None:
        path = Path(folder) / "pictures" / f"{name.replace('/', '_')}_{step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            picture.save(file, "PNG")


def show_in(logger: Logger, name: str, picture: Image.Image, step: int) -> None:
    """Show a picture in one logger, by the way that it has; nothing where it has none."""
    experiment = logger.experiment
    if hasattr(experiment, "add_image"):  # TensorBoard
        experiment.add_image(name, np.array(picture), step, dataformats="HWC")
    elif hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(key=name, images=[picture], step=step)
    elif hasattr(logger, "run_id") and hasattr(experiment, "log_image"):  # MLflow
        experiment.log_image(logger.run_id, picture, key=name.replace("/", "_"), step=step)
    elif hasattr(experiment, "log_image"):  # Comet
        experiment.log_image(picture, name=name, step=step)
