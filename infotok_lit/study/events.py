"""Reading numbers back from the event files that TensorBoard's logger leaves."""

from collections.abc import Iterable
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curve = dict[int, float]
"""Step -> value."""


def read_curves(run_folder: Path, tags: Iterable[str] | None = None) -> dict[str, Curve]:
    """The curves of a run by tag: all, or those of `tags` that there are.

    A run that was killed and resumed has several files and has logged some steps twice: the later one counts.
    """
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    logged = events.Tags()["scalars"]
    wanted = logged if tags is None else [tag for tag in tags if tag in logged]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in wanted}
