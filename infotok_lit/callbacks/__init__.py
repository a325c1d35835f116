"""What happens around training: pictures, scores, export."""

from infotok_lit.callbacks.active_units import ActiveUnits
from infotok_lit.callbacks.answered_questions import AnsweredQuestions
from infotok_lit.callbacks.codebook import Codebook
from infotok_lit.callbacks.constraints import Constraints
from infotok_lit.callbacks.export import ExportInference
from infotok_lit.callbacks.generated_images import GeneratedImages
from infotok_lit.callbacks.history import RunResult
from infotok_lit.callbacks.information_plane import InformationPlane
from infotok_lit.callbacks.progress import Progress, StartingValues
from infotok_lit.callbacks.reconstruction import Reconstruction
from infotok_lit.callbacks.report import FinalReport
from infotok_lit.callbacks.scene_probes import SceneProbes
from infotok_lit.callbacks.throughput import Throughput
from infotok_lit.callbacks.token_similarity import TextSimilarity, TokenSimilarity
from infotok_lit.callbacks.trade_off import TradeOff
from infotok_lit.callbacks.weight_average import WeightAverage
from infotok_lit.errors import SettingsError

__all__ = [
    "ActiveUnits",
    "AnsweredQuestions",
    "Codebook",
    "Constraints",
    "ExportInference",
    "FinalReport",
    "GeneratedImages",
    "InformationPlane",
    "Progress",
    "Reconstruction",
    "RunResult",
    "SceneProbes",
    "StartingValues",
    "TextSimilarity",
    "Throughput",
    "TokenSimilarity",
    "TradeOff",
    "WeightAverage",
]

_NOW_CALLED = {"Drawings": "GeneratedImages", "Readings": "AnsweredQuestions"}


def __getattr__(name: str) -> object:
    """Say what an older configuration's callback is called now."""
    if name in _NOW_CALLED:
        raise SettingsError(f"infotok_lit.callbacks.{name} is now infotok_lit.callbacks.{_NOW_CALLED[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
