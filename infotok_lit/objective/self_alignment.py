"""Self-alignment: generation's tokens are to resemble the model's own tokens of the same, clean images.

A rival of the paper's terms: REPA (arXiv 2410.06940) with the model's own understanding tokens as the target instead of
another encoder's. It acts in generation only.

Shapes: B images, N tokens, D their width, N' and D' those of the target.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infotok_lit.batch import BranchOutput
from infotok_lit.objective.term import TermNats


class SelfAlignment(nn.Module):
    """1 - cosine between each token, through a small MLP, and its target, which receives no gradient.

    Args:
        token_width: D.
        target_width: D'.
        hidden_width: of the MLP.
    """

    def __init__(self, token_width: int, target_width: int, hidden_width: int) -> None:
        super().__init__()
        self.map = nn.Sequential(
            nn.LayerNorm(token_width),
            nn.Linear(token_width, hidden_width),
            nn.SiLU(),
            nn.Linear(hidden_width, target_width),
        )

    def forward(self, tokens: Tensor, output: BranchOutput, target: Tensor | None) -> TermNats:
        """(B, N, D), (B, N', D') -> 1 - cosine, summed over tokens; it has no unit.

        A token is compared with the one at its place. Where the two kinds of tokens do not share their places, as
        OpenUni's queries and patches, their means over the image are compared, and count as one token.
        """
        if target is None:
            raise ValueError("self_alignment compares with the understanding tokens of the images; give understood.")
        found = self.map(tokens.float())
        target = target.detach().float()
        rows, columns = output.layout.grid
        if rows * columns and target.shape[1] == output.layout.num_tokens:
            places = output.token_index[..., None].expand(-1, -1, target.shape[2])
            target = target.gather(1, places)
        else:
            found, target = found.mean(1, keepdim=True), target.mean(1, keepdim=True)
        distance = 1 - F.cosine_similarity(found, target, dim=-1)
        return TermNats(distance.sum(1), torch.full_like(output.text.key, distance.shape[1]))
