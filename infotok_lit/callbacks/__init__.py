"""What happens around training: pictures, scores, export."""

from infotok_lit.callbacks.active_units import ActiveUnits
from infotok_lit.callbacks.codebook import Codebook
from infotok_lit.callbacks.constraints import Constraints
from infotok_lit.callbacks.drawings import Drawings
from infotok_lit.callbacks.export import ExportInference
from infotok_lit.callbacks.history import RunResult
from infotok_lit.callbacks.information_plane import InformationPlane
from infotok_lit.callbacks.progress import Progress, StartingValues
from infotok_lit.callbacks.readings import Readings
from infotok_lit.callbacks.report import FinalReport
from infotok_lit.callbacks.scene_probes import SceneProbes
from infotok_lit.callbacks.token_similarity import TokenSimilarity

__all__ = [
    "ActiveUnits",
    "Codebook",
    "Constraints",
    "Drawings",
    "ExportInference",
    "FinalReport",
    "InformationPlane",
    "Progress",
    "Readings",
    "RunResult",
    "SceneProbes",
    "StartingValues",
    "TokenSimilarity",
]
