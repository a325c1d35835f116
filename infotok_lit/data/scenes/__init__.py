"""Scenes: procedurally drawn compositional images with exact ground truth."""

from infotok_lit.data.scenes.generator import Scene, SceneObject
from infotok_lit.data.scenes.grammar import CATEGORIES, Mention, Prompt, parse_caption, write_caption
from infotok_lit.data.scenes.parser import ParsedObject, parse_image, parser_error_rate
from infotok_lit.data.scenes.questions import QUESTION_KINDS, describe_scene, question_kind
from infotok_lit.data.scenes.render import render
from infotok_lit.data.scenes.scoring import satisfies, score
from infotok_lit.data.scenes.source import Scenes
from infotok_lit.data.scenes.spec import SPECS, SceneSpec

__all__ = [
    "CATEGORIES",
    "QUESTION_KINDS",
    "SPECS",
    "Mention",
    "ParsedObject",
    "Prompt",
    "Scene",
    "SceneObject",
    "SceneSpec",
    "Scenes",
    "describe_scene",
    "parse_caption",
    "parse_image",
    "parser_error_rate",
    "question_kind",
    "render",
    "satisfies",
    "score",
    "write_caption",
]
