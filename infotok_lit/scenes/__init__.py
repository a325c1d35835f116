"""Scenes: procedurally drawn compositional images with exact ground truth."""

from infotok_lit.scenes.grammar import parse_caption
from infotok_lit.scenes.parser import score
from infotok_lit.scenes.questions import question_kind
from infotok_lit.scenes.source import Scenes
from infotok_lit.scenes.spec import SPECS, SceneSpec

__all__ = ["SPECS", "SceneSpec", "Scenes", "parse_caption", "question_kind", "score"]
