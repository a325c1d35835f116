"""What happens around training: pictures, scores, export."""

from infotok_lit.callbacks.drawings import Drawings
from infotok_lit.callbacks.export import ExportInference
from infotok_lit.callbacks.readings import Readings
from infotok_lit.callbacks.report import FinalReport

__all__ = ["Drawings", "ExportInference", "FinalReport", "Readings"]
