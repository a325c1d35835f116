"""Official checkpoint names of Harmon and of its KL-16 autoencoder, from ours.

Official files: `harmon_*.pth` (everything but the autoencoder) and `kl16.ckpt`.
"""

from infotok_lit.checkpoints import KeyMap

HARMON_KEYS = KeyMap(
    renames=(
        (r"^encoder\.token_embed\.", r"mar.z_proj."),
        (r"^encoder\.buffer_token$", r"mar.fake_latent"),
        (r"^encoder\.positions$", r"mar.encoder_pos_embed_learned"),
        (r"^encoder\.input_norm\.", r"mar.z_proj_ln."),
        (r"^(encoder|decoder)\.transformer\.(blocks|norm)\.", r"mar.\1_\2."),
        (r"^decoder\.embed\.", r"mar.decoder_embed."),
        (r"^decoder\.mask_token$", r"mar.mask_token"),
        (r"^decoder\.positions$", r"mar.decoder_pos_embed_learned"),
        (r"^decoder\.diffusion_positions$", r"mar.diffusion_pos_embed_learned"),
        (r"^class_table$", r"mar.class_emb.weight"),
        (r"^token_diffusion\.time_embed\.", r"mar.diffloss.net.time_embed.mlp."),
        (r"^token_diffusion\.condition_embed\.", r"mar.diffloss.net.cond_embed."),
        (r"^token_diffusion\.input_embed\.", r"mar.diffloss.net.input_proj."),
        (r"^token_diffusion\.blocks\.(\d+)\.norm\.", r"mar.diffloss.net.res_blocks.\1.in_ln."),
        (r"^token_diffusion\.blocks\.(\d+)\.mlp\.", r"mar.diffloss.net.res_blocks.\1.mlp."),
        (r"^token_diffusion\.blocks\.(\d+)\.modulation\.", r"mar.diffloss.net.res_blocks.\1.adaLN_modulation.1."),
        (r"^token_diffusion\.output_modulation\.", r"mar.diffloss.net.final_layer.adaLN_modulation.1."),
        (r"^token_diffusion\.output\.", r"mar.diffloss.net.final_layer.linear."),
        (r"^project_(in|out)\.", r"proj_\1."),
    ),
    tied=(("llm.lm_head.weight", "llm.model.embed_tokens.weight"),),
)


def kl16_keys(num_levels: int) -> KeyMap:
    """Names of the KL-16 autoencoder; the official decoder counts its levels from the finest."""
    decoder_levels = tuple(
        (rf"^decoder\.up_blocks\.{ours}\.", f"decoder.up.{num_levels - 1 - ours}.") for ours in range(num_levels)
    )
    return KeyMap(
        renames=(
            *decoder_levels,
            (r"^encoder\.down_blocks\.(\d+)\.", r"encoder.down.\1."),
            (r"\.mid_block\.resnets\.0\.", r".mid.block_1."),
            (r"\.mid_block\.resnets\.1\.", r".mid.block_2."),
            (r"\.mid_block\.attentions\.0\.", r".mid.attn_1."),
            (r"\.resnets\.", r".block."),
            (r"\.attentions\.", r".attn."),
            (r"\.conv_shortcut\.", r".nin_shortcut."),
            (r"\.downsamplers\.0\.", r".downsample."),
            (r"\.upsamplers\.0\.", r".upsample."),
            (r"\.group_norm\.", r".norm."),
            (r"\.to_([qkv])\.", r".\1."),
            (r"\.to_out\.0\.", r".proj_out."),
            (r"\.conv_norm_out\.", r".norm_out."),
        ),
        pointwise=r".*\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight",
    )
