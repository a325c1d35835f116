"""What happens around training: seeds, pictures, scores, export."""

from infotok_lit.callbacks.drawings import Drawings
from infotok_lit.callbacks.export import ExportInference
from infotok_lit.callbacks.readings import Readings
from infotok_lit.callbacks.report import FinalReport
from infotok_lit.callbacks.step_seed import StepSeed

__all__ = ["Drawings", "ExportInference", "FinalReport", "Readings", "StepSeed"]
