"""The benchmarks that the field reports: one file each, and what they share.

This module is imported with every start of lmms-eval where this package is installed, so it imports nothing itself.
"""

from typing import Any


def lmms_eval_models() -> Any:
    """What the entry point `lmms_eval.models` gives: how lmms-eval finds our models, `--model infotok`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("infotok", simple_class_path="infotok_lit.evaluation.lmms_eval_model.InfoTok")
