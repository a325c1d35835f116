"""A Show-o2 golden as our model: configuration, weights and token layouts."""

from dataclasses import replace

import torch
from golden import Golden, language_model_of
from torch import Tensor

from infotok_lit.batch import IMAGE_TOKEN_ID
from infotok_lit.models.common.autoencoders import WanVAE, wan_keys
from infotok_lit.models.common.model_config import WanConfig
from infotok_lit.models.showo2.family import DiffusionHeadConfig, PromptConfig, SemanticConfig, Showo2Config
from infotok_lit.models.showo2.model import Showo2


class RecordedTokenizer:
    """Knows the strings that the official code tokenised, and no others."""

    def __init__(self, golden: Golden) -> None:
        markers = golden.info["config"]["ids"]
        self.calls = dict(golden.info["meta"]["tokenizer_calls"])
        # The image marker is one token of its own, so what follows it is tokenised alone.
        self.calls |= {text.removeprefix("<image>"): ids[1:] for text, ids in self.calls.items() if "<image>" in text}
        self.calls |= {
            "<|im_start|>": [markers["bos_id"]],
            "<|im_end|>": [markers["eos_id"]],
            "<|vision_start|>": [markers["boi_id"]],
            "<|vision_end|>": [markers["eoi_id"]],
            "[PAD]": [markers["pad_id"]],
        }

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self.calls[text])

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, token_ids))


def config_of(golden: Golden) -> Showo2Config:
    given = golden.info["config"]
    llm, siglip, head, vae = given["llm"], given["siglip_vision"], given["diffusion_head"], given["vae"]
    height, width = given["grid"]
    stride = 8
    depth = 1 + max(int(key.split(".")[2]) for key in golden.state if key.startswith("und_trans.layers."))
    return Showo2Config(
        autoencoder=WanConfig(
            latent_channels=given["showo"]["image_latent_dim"],
            base_width=vae["dim"],
            width_multipliers=tuple(vae["dim_mult"]),
            blocks_per_level=vae["num_res_blocks"],
            temporal_downsample=tuple(vae["temperal_downsample"]),
        ),
        semantic=SemanticConfig(
            width=siglip["hidden_size"],
            mlp_width=siglip["intermediate_size"],
            depth=depth,
            heads=siglip["num_attention_heads"],
            table_side=siglip["image_size"] // siglip["patch_size"],
            layer_norm_eps=siglip["layer_norm_eps"],
        ),
        llm=replace(language_model_of(llm), vocab_size=given["showo"]["llm_vocab_size"]),
        diffusion_head=DiffusionHeadConfig(
            width=head["hidden_size"],
            mlp_width=head["intermediate_size"],
            depth=given["showo"]["num_diffusion_layers"],
            heads=head["num_attention_heads"],
            kv_heads=head["num_key_value_heads"],
            head_dim=head["head_dim"],
        ),
        prompts=PromptConfig(max_caption=golden.info["meta"]["layout_args"]["max_text_len_gen"]),
        image_size=2 * stride * max(height, width),
    )


def build(golden: Golden) -> Showo2:
    """Our model with the golden's weights, but for the autoencoder, whose latents are wider than the tiny model's."""
    config = config_of(golden)
    slots = golden.info["meta"]["layout_args"]["num_image_tokens"]
    model = Showo2(config, RecordedTokenizer(golden)).eval()
    model.processor.num_image_tokens = slots
    model.load_official_weights("showo2", golden.state, "golden")
    return model


def build_vae(golden: Golden) -> WanVAE:
    """The golden's autoencoder."""
    config = replace(config_of(golden).autoencoder, latent_channels=16)
    vae = WanVAE(config).eval()
    prefix = "vae_state/"
    official = {key.removeprefix(prefix): value for key, value in golden.tensors.items() if key.startswith(prefix)}
    keys = wan_keys(len(config.width_multipliers), config.blocks_per_level)
    own = {f"autoencoder.{name}": value for name, value in vae.state_dict().items()}
    loaded = keys.from_official(official, own, "golden")
    vae.load_state_dict({name.removeprefix("autoencoder."): value for name, value in loaded.items()})
    return vae


def layouts(golden: Golden, *names: str) -> dict[str, Tensor]:
    """Recorded sequences, stacked: our ids, official labels, and the regions of their images."""
    img_pad = golden.info["config"]["ids"]["img_pad_id"]
    ids = torch.stack([golden.output(f"j_layout/{name}", "text_tokens") for name in names])
    regions = torch.stack([golden.output(f"j_layout/{name}", "modality_positions") for name in names])
    return {
        "ids": ids.masked_fill(ids == img_pad, IMAGE_TOKEN_ID),
        "labels": torch.stack([golden.output(f"j_layout/{name}", "text_labels") for name in names]),
        "regions": regions,
    }
