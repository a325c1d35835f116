"""The language model of the families that have a Qwen2."""

from dataclasses import asdict

from transformers import Qwen2Config, Qwen2ForCausalLM

from infotok_lit.models.language_model_config import LanguageModelConfig


def build_language_model(config: LanguageModelConfig, attention: str = "sdpa") -> Qwen2ForCausalLM:
    """A Qwen2 with fresh weights.

    Args:
        attention: the name of an attention function that transformers knows.
    """
    values = asdict(config)
    rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    special_ids = {"bos_token_id": None, "eos_token_id": None}
    return Qwen2ForCausalLM(Qwen2Config(**values, **special_ids, rope_parameters=rope, attn_implementation=attention))
