"""The training-only heads that fit a base model: fresh ones, or those of a run."""

from typing import Any

from infotok_lit.checkpoints import CHECKPOINT_KEY
from infotok_lit.models.unified import UnifiedModel
from infotok_lit.objective.config import ObjectiveConfig
from infotok_lit.objective.heads import Widths
from infotok_lit.objective.infotok import InfoTok

HEADS_PREFIX = "infotok."


def build_heads(objective: ObjectiveConfig, base: UnifiedModel) -> InfoTok:
    """Fresh heads."""
    widths = {
        branch: Widths(width, base.latent_width, base.text_width, base.num_extras[branch])
        for branch, width in base.token_widths.items()
    }
    return InfoTok(objective, widths)


def read_heads(checkpoint: dict[str, Any], base: UnifiedModel) -> InfoTok:
    """The heads in a run's checkpoint, in evaluation mode."""
    heads = build_heads(ObjectiveConfig.from_dict(checkpoint[CHECKPOINT_KEY]["objective"]), base)
    state = checkpoint["state_dict"]
    heads.load_state_dict(
        {name.removeprefix(HEADS_PREFIX): value for name, value in state.items() if name.startswith(HEADS_PREFIX)}
    )
    return heads.eval()
