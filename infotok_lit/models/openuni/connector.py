"""From the language model's queries to the diffusion transformer's condition.

Shapes: B batch, Q queries, H language-model width, W connector width, D condition width.
"""

from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from infotok_lit.errors import SettingsError
from infotok_lit.models.openuni.config import ConnectorConfig

NORM_EPS = 1e-6


def build_connector(config: ConnectorConfig) -> SiglipEncoder:
    """A bidirectional transformer without positions or final norm, as fresh as the official one begins."""
    connector = SiglipEncoder(
        SiglipVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            layer_norm_eps=NORM_EPS,
            attn_implementation="sdpa",
        )
    )
    for name, parameter in connector.named_parameters():
        if parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
        elif name.endswith("_proj.bias"):
            nn.init.zeros_(parameter)
        elif name.endswith((".fc1.bias", ".fc2.bias")):
            nn.init.normal_(parameter, std=1e-6)
    return connector


def build_projector(config: ConnectorConfig, llm_width: int, condition_width: int) -> nn.Linear | nn.ModuleList:
    """The linear maps beside the connector.

    Raises:
        SettingsError: if the connector's width does not suit the order.
    """
    required = {"connector_first": llm_width, "projector_first": condition_width}.get(config.order, config.width)
    if config.width != required:
        raise SettingsError(f"connector.width must be {required} for order {config.order}, not {config.width}")
    if config.order == "projector_on_both_sides":
        return nn.ModuleList([nn.Linear(llm_width, config.width), nn.Linear(config.width, condition_width)])
    return nn.Linear(llm_width, condition_width)


def before_connector(projector: nn.Linear | nn.ModuleList, order: str, queries: Tensor) -> Tensor:
    """(B, Q, H) -> (B, Q, W): what the connector reads."""
    if order == "connector_first":
        return queries
    return projector(queries) if order == "projector_first" else projector[0](queries)


def after_connector(projector: nn.Linear | nn.ModuleList, order: str, connected: Tensor) -> Tensor:
    """(B, Q, W) -> (B, Q, D): the condition."""
    if order == "projector_first":
        return connected
    return projector(connected) if order == "connector_first" else projector[1](connected)
