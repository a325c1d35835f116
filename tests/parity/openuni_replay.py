"""An OpenUni golden as our model: configuration, weights and its byte tokenizer."""

from dataclasses import replace
from typing import Any

from golden import Golden, language_model_of

from infotok_lit.models.common.model_config import DCAEConfig
from infotok_lit.models.openuni.family import (
    ConnectorConfig,
    DiffusionTransformerConfig,
    OpenUniConfig,
    SamplingConfig,
    VisionConfig,
)
from infotok_lit.models.openuni.model import OpenUni
from infotok_lit.models.openuni.processor import OpenUniProcessor

ORDERS = {"": "connector_first", "_proj_enc": "projector_first", "_proj_enc_proj": "projector_on_both_sides"}
"""Suffix of the golden's extra parameter sets -> our order."""


class ByteTokenizer:
    """One id per UTF-8 byte, and the markers of the golden."""

    def __init__(self, markers: dict[str, int]) -> None:
        self.markers = markers

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        found = [(text.index(marker), marker) for marker in self.markers if marker in text]
        if not found:
            return list(text.encode())
        _, marker = min(found)
        before, after = text.split(marker, 1)
        return list(before.encode()) + [self.markers[marker]] + self.encode(after)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(number for number in token_ids if number < 256).decode(errors="replace")


def sana_config(given: dict[str, Any]) -> DiffusionTransformerConfig:
    return DiffusionTransformerConfig(
        heads=given["num_attention_heads"],
        head_dim=given["attention_head_dim"],
        depth=given["num_layers"],
        cross_heads=given["num_cross_attention_heads"],
        cross_head_dim=given["cross_attention_head_dim"],
        caption_width=given["caption_channels"],
        mlp_ratio=given["mlp_ratio"],
        sample_size=given["sample_size"],
        qk_norm=given["qk_norm"],
    )


def connector_config(golden: Golden, suffix: str) -> ConnectorConfig:
    given = golden.info["config"][f"connector{suffix}"]
    return ConnectorConfig(
        width=given["hidden_size"],
        mlp_width=given["intermediate_size"],
        depth=given["num_hidden_layers"],
        heads=given["num_attention_heads"],
        order=ORDERS[suffix],
    )


def config_of(golden: Golden) -> OpenUniConfig:
    given = golden.info["config"]
    vision, llm, vae = given["vision"], given["llm"], given["vae"]
    return OpenUniConfig(
        vision=VisionConfig(
            width=vision["hidden_size"],
            mlp_width=vision["intermediate_size"],
            depth=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            input_size=given["vit_input_size"],
        ),
        llm=language_model_of(llm),
        connector=connector_config(golden, ""),
        transformer=sana_config(given["transformer"]),
        autoencoder=DCAEConfig(
            latent_channels=vae["latent_channels"],
            widths=tuple(vae["encoder_block_out_channels"]),
            encoder_layers=tuple(vae["encoder_layers_per_block"]),
            decoder_layers=tuple(vae["decoder_layers_per_block"]),
            attention_stages=sum(kind == "EfficientViTBlock" for kind in vae["encoder_block_types"]),
            attention_head_dim=vae["attention_head_dim"],
        ),
        sampling=SamplingConfig(iterations=given["gen"]["steps"], guidance=given["gen"]["cfg"]),
        num_queries=given["num_queries"],
        latent_scale=vae["scaling_factor"],
        image_size=given["pix"]["h"],
    )


def processor_of(golden: Golden, config: OpenUniConfig) -> OpenUniProcessor:
    return OpenUniProcessor(config, ByteTokenizer(golden.info["tokenizer"]["specials"]))


def without(prefix: str, weights: dict) -> dict:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def build(golden: Golden, suffix: str = "") -> OpenUni:
    """Our model with the golden's weights; with a suffix, with that set of connector and projector."""
    config = replace(config_of(golden), connector=connector_config(golden, suffix))
    model = OpenUni(config, ByteTokenizer(golden.info["tokenizer"]["specials"])).eval()
    assert model.processor.num_image_tokens == golden.info["config"]["image_length"]
    state = golden.state
    own = {name: tensor for name, tensor in state.items() if not name.startswith(("lmm.", "vae."))}
    if suffix:
        swapped = without(f"state{suffix}/", golden.tensors)
        own = {n: t for n, t in own.items() if not n.startswith(("connector.", "projector."))} | swapped
    model.load_official_weights("openuni", own, "golden")
    model.load_official_weights("internvl3", without("lmm.", state), "golden")
    model.load_official_weights("dc_ae", without("vae.", state), "golden")
    return model
