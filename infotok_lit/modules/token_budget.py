"""A token budget at inference: the heads that say what a token carries, in a small file beside the official weights."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infotok_lit.checkpoints import CHECKPOINT_KEY, CheckpointError, KeyMap
from infotok_lit.errors import MissingFileError, SettingsError
from infotok_lit.models.export import BUDGET_STEM, Weights
from infotok_lit.models.unified import UnifiedModel
from infotok_lit.modules.average import RAW
from infotok_lit.modules.base_model import read_heads
from infotok_lit.objective.compactness import Projection, ProjectionConfig
from infotok_lit.objective.config import ObjectiveConfig
from infotok_lit.objective.token_budget import TokenBudget
from infotok_lit.weight_files import read_metadata, read_safetensors

FILE = f"{BUDGET_STEM}.safetensors"
MEAN_PREFIX = "infotok.budget."
HOW_TO_TRAIN = "train with objective.token_budget (docs/budgets.md)"


class TokenSelector(nn.Module):
    """Which shared tokens of understanding are read at a budget.

    Args:
        projection: f_u, which gives their rates.
        budget: with the mean of what images carry.
        keep: the share of its tokens that an image of mean rate keeps; in (0, 1].
    """

    def __init__(self, projection: Projection, budget: TokenBudget, keep: float = 1.0) -> None:
        super().__init__()
        self.projection = projection
        self.budget = budget
        self.keep = checked_share(keep)

    @torch.no_grad()
    def rates(self, tokens: Tensor) -> Tensor:
        """k_i (B, N) of shared tokens (B, N, D), in nats."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self.projection(tokens).kl().sum(-1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N) bool: the tokens that are read."""
        return self.budget.kept(self.rates(tokens), self.keep)

    # Where it comes from, and goes

    @classmethod
    def of_run(
        cls, checkpoint: dict[str, Any], base: UnifiedModel, weights: Weights = "averaged", keep: float = 1.0
    ) -> "TokenSelector":
        """That of a run's checkpoint, for its base model, and on its device.

        Raises:
            CheckpointError: the run measured no rates, or not their mean.
        """
        config = ObjectiveConfig.from_dict(checkpoint[CHECKPOINT_KEY]["objective"])
        if config.token_budget is None:
            raise CheckpointError(f"this run has no token budget: {HOW_TO_TRAIN}")
        heads = read_heads(checkpoint, base, weights)
        # The mean is an average already, and the average of a beginning average lags behind it.
        state = checkpoint.get(RAW, checkpoint["state_dict"])
        mean = {name.removeprefix(MEAN_PREFIX): value for name, value in state.items() if name.startswith(MEAN_PREFIX)}
        heads.budget.load_state_dict(mean)
        heads.budget.mean.settle()  # an exported file does not say by which factor it was averaged
        return cls(heads.heads["understanding"].projection, heads.budget, keep).to(device_of(base)).eval()

    @classmethod
    def of_folder(cls, folder: Path, base: UnifiedModel, keep: float = 1.0) -> "TokenSelector":
        """That of an exported folder, for its base model, and on its device.

        Raises:
            MissingFileError: the folder was exported without it.
            CheckpointError: the file is damaged, or belongs to another model.
        """
        path = folder / FILE
        if not path.exists():
            raise MissingFileError(
                f"{folder} has no {FILE}: export the run again with --with_budget; if it has no token budget, "
                f"{HOW_TO_TRAIN}"
            )
        metadata = read_metadata(path)
        try:
            config = ProjectionConfig(**json.loads(metadata["projection"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} does not say what its heads are; export the run again") from error
        # Without memory, whatever widths the file claims.
        with torch.device("meta"):
            projection = Projection(config, base.token_widths["understanding"], with_variance=True)
            selector = cls(projection, TokenBudget(base.num_extras["understanding"]), keep)
        state = KeyMap(renames=()).from_official(read_safetensors(path), selector.state_dict(), str(path))
        selector.load_state_dict(state, assign=True)
        return selector.to(device_of(base)).eval()

    def write(self, folder: Path) -> None:
        """Write the file into an exported folder."""
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / FILE, {"format": "pt", "projection": json.dumps(asdict(self.projection.config))})


def checked_share(keep: float) -> float:
    """A budget; SettingsError for one that is none."""
    if not 0 < keep <= 1:
        raise SettingsError(f"a budget is a share of tokens, above 0 and up to 1, not {keep}")
    return keep


def device_of(model: nn.Module) -> torch.device:
    """Where a model lies."""
    return next(model.parameters()).device
