"""Official checkpoint names of Show-o2 and of its Wan2.1 VAE, from ours."""

from infotok_lit.checkpoints import KeyMap

LM_HEAD, EMBEDDINGS = "showo.lm_head.weight", "showo.model.embed_tokens.weight"

_RENAMES = (
    (r"^llm\.", r"showo."),
    (r"^encoder\.understanding_embed\.", r"image_embedder_und.proj."),
    (r"^encoder\.generation_embed\.", r"image_embedder_gen.proj."),
    (r"^encoder\.positions\.", r"position_embedding."),
    (r"^encoder\.semantic\.", r"und_trans."),
    (r"^encoder\.fusion\.", r"fusion_proj."),
    (r"^time_to_token\.", r"time_embed_proj."),
    (r"^to_diffusion\.", r"diff_proj."),
    (r"^diffusion_head\.blocks\.(\d+)\.attention\.", r"diffusion_head_a.\1.self_attn."),
    (r"^diffusion_head\.blocks\.(\d+)\.attention_norm\.", r"diffusion_head_a.\1.input_layernorm."),
    (r"^diffusion_head\.blocks\.(\d+)\.mlp_norm\.", r"diffusion_head_a.\1.post_attention_layernorm."),
    (r"^diffusion_head\.blocks\.(\d+)\.mlp\.", r"diffusion_head_a.\1.mlp."),
    (r"^diffusion_head\.blocks\.(\d+)\.modulation\.", r"diffusion_head_a.\1.adaLN_modulation.1."),
    (r"^diffusion_head\.output_norm\.", r"diffusion_head_b.norm_final."),
    (r"^diffusion_head\.output_modulation\.", r"diffusion_head_b.adaLN_modulation.1."),
    (r"^diffusion_head\.output\.", r"diffusion_head_b.linear."),
)


def showo2_keys(tied: bool) -> KeyMap:
    """Names of everything but the autoencoder; `tied`: the language model's head is its embedding table."""
    return KeyMap(_RENAMES, tied=((LM_HEAD, EMBEDDINGS),) if tied else ())


def wan_keys(num_levels: int, blocks_per_level: int) -> KeyMap:
    """Names of the Wan VAE; the official decoder numbers its blocks and upsamplers through."""
    per_level = blocks_per_level + 2
    decoder_blocks = tuple(
        (rf"^decoder\.up_blocks\.{level}\.resnets\.{block}\.", f"decoder.upsamples.{level * per_level + block}.")
        for level in range(num_levels)
        for block in range(blocks_per_level + 1)
    )
    upsamplers = tuple(
        (rf"^decoder\.up_blocks\.{level}\.upsamplers\.0\.", f"decoder.upsamples.{(level + 1) * per_level - 1}.")
        for level in range(num_levels)
    )
    residual = r"((?:middle|downsamples|upsamples)\.\d+)"
    return KeyMap(
        renames=(
            (r"^quant_conv\.", r"conv1."),
            (r"^post_quant_conv\.", r"conv2."),
            *decoder_blocks,
            *upsamplers,
            (r"^encoder\.down_blocks\.(\d+)\.", r"encoder.downsamples.\1."),
            (r"\.mid_block\.resnets\.0\.", r".middle.0."),
            (r"\.mid_block\.attentions\.0\.", r".middle.1."),
            (r"\.mid_block\.resnets\.1\.", r".middle.2."),
            (rf"{residual}\.norm1\.", r"\1.residual.0."),
            (rf"{residual}\.conv1\.", r"\1.residual.2."),
            (rf"{residual}\.norm2\.", r"\1.residual.3."),
            (rf"{residual}\.conv2\.", r"\1.residual.6."),
            (rf"{residual}\.conv_shortcut\.", r"\1.shortcut."),
            (r"\.conv_in\.", r".conv1."),
            (r"\.norm_out\.", r".head.0."),
            (r"\.conv_out\.", r".head.2."),
        )
    )
