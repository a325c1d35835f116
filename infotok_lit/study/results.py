"""What the finished cells of a study measured, read from their raw event files."""

from collections.abc import Sequence
from dataclasses import dataclass

from infotok_lit.study.cells import Cell
from infotok_lit.study.config import Study
from infotok_lit.study.events import Curve, read_curves
from infotok_lit.study.record import Record, read_record


@dataclass(frozen=True)
class CellResult:
    """A cell and what is known of it.

    Args:
        record: Its record; None if it never ran.
        values: Final value of each metric that it logged, by the metric's name; empty unless it has finished.
        curves: Every curve that the study shows, by tag.
    """

    cell: Cell
    record: Record | None
    values: dict[str, float]
    curves: dict[str, Curve]

    @property
    def state(self) -> str:
        """How far the cell is."""
        return "waiting" if self.record is None else self.record.state


def read_results(study: Study, cells: Sequence[Cell]) -> list[CellResult]:
    """The results of cells, in their order."""
    return [_read_result(study, cell) for cell in cells]


def required_tags(study: Study) -> list[str]:
    """The tags that every finished cell has logged."""
    return [metric.tag for metric in study.metrics.values() if not metric.optional]


def _read_result(study: Study, cell: Cell) -> CellResult:
    record = read_record(cell.folder)
    if record is None or record.state != "finished":
        return CellResult(cell, record, {}, {})
    tags = [metric.tag for metric in study.metrics.values()]
    curves = read_curves(cell.run_folder, [*tags, *study.curves])
    values = {
        name: curves[metric.tag][cell.last_step]
        for name, metric in study.metrics.items()
        if cell.last_step in curves.get(metric.tag, {})
    }
    return CellResult(cell, record, values, curves)
