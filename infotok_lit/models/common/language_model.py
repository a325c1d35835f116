"""What the families that have a Qwen2 do with it.

Shapes: B batch, T text length, H width, V vocabulary.
"""

from dataclasses import asdict

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from infotok_lit.batch import IMAGE_TOKEN_ID
from infotok_lit.models.common.language_model_config import LanguageModelConfig


def build_language_model(config: LanguageModelConfig, attention: str = "sdpa") -> Qwen2ForCausalLM:
    """A Qwen2 with fresh weights.

    Args:
        attention: the name of an attention function that transformers knows.
    """
    values = asdict(config)
    rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    special_ids = {"bos_token_id": None, "eos_token_id": None}
    return Qwen2ForCausalLM(Qwen2Config(**values, **special_ids, rope_parameters=rope, attn_implementation=attention))


def embed_with_images(embedding: nn.Embedding, input_ids: Tensor, visual: Tensor) -> Tensor:
    """Embeddings (B, T, H) of ids (B, T) whose image slots are filled with visual tokens (n, N, H), in order.

    Raises:
        ValueError: if there are not as many slots as tokens.
    """
    slots = input_ids == IMAGE_TOKEN_ID
    num_slots, num_visual = int(slots.sum()), visual.shape[0] * visual.shape[1]
    if num_slots != num_visual:
        raise ValueError(
            f"the text has {num_slots} image slots for {num_visual} visual tokens: the image size and the "
            "processor's disagree, or max_length cut an image off"
        )
    embeds = embedding(input_ids.masked_fill(slots, 0))
    return embeds.masked_scatter(slots.unsqueeze(-1), visual.to(embeds.dtype))


def text_loss(head: nn.Module, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token cross entropy (nats) summed over labelled tokens, and their number; the head runs on these alone.

    Args:
        head: (..., H) -> (..., V) logits.
        hidden: (B, T, H).
        labels: (B, T) int64; negative where no loss is taken.
    """
    labels = labels[:, 1:]
    labelled = labels >= 0
    logits = head(hidden[:, :-1][labelled])
    return F.cross_entropy(logits.float(), labels[labelled], reduction="sum"), labelled.sum()
