"""Scenes: procedurally drawn compositional images with exact ground truth."""

from infotok_lit.scenes.generator import Scene, SceneObject
from infotok_lit.scenes.grammar import CATEGORIES, Mention, Prompt, parse_caption, write_caption
from infotok_lit.scenes.parser import ParsedObject, parse_image, parser_error_rate
from infotok_lit.scenes.questions import QUESTION_KINDS, describe_scene, question_kind
from infotok_lit.scenes.render import render
from infotok_lit.scenes.scoring import satisfies, score
from infotok_lit.scenes.source import Scenes
from infotok_lit.scenes.spec import SPECS, SceneSpec

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
