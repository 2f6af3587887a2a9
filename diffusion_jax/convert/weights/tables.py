"""Regular expressions that turn the names of our parameters into names of released files.

A name starts as our path with dots and with PyTorch's name of the leaf: "out_0/scale" starts as
"out_0.weight". DOTTED and VAE_DOTTED turn it into the name of latent-diffusion (UNet, VAE) or of
transformers (CLIP); the other tables translate these names further. All are applied in order.
"""

from typing import TypeAlias

Renames: TypeAlias = tuple[tuple[str, str], ...]

# The prefix of averages (EMA), which stand beside the trained weights.
EMA = "model_ema."
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}

# input_blocks_1_0 is input_blocks.1.0, to_out_0 is to_out.0.
DOTTED: Renames = ((r"_(\d+)", r".\1"),)

# blocks_0/attn_qkv is blocks.0.attn.qkv, t_embedder_mlp_0 is t_embedder.mlp.0.
DIT_DOTTED: Renames = (
    *DOTTED,
    (r"\b(attn|mlp)_", r"\1."),
    (r"^([xty]_embedder)_", r"\1."),
    (r"^(t_embedder|y_embedder)\.mlp_", r"\1.mlp."),
    (r"^final_layer_", "final_layer."),
)

# The layers of a DiT in diffusers, where to_qkv is three layers. Our layers that attend to a text
# have the names of PixArt's.
DIT_DIFFUSERS: Renames = (
    (r"^final_layer\.adaLN_modulation\.1\.", "proj_out_1."),
    (r"^final_layer\.linear\.", "proj_out_2."),
    (r"^x_embedder\.proj\.", "pos_embed.proj."),
    (r"^blocks\.", "transformer_blocks."),
    (r"\.attn\.qkv\.", ".attn1.to_qkv."),
    (r"\.attn\.proj\.", ".attn1.to_out.0."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.mlp\.fc1\.", ".ff.net.0.proj."),
    (r"\.mlp\.fc2\.", ".ff.net.2."),
    (r"\.adaLN_modulation\.1\.", ".norm1.linear."),
)

# down_0_block_1 is down.0.block.1, but mid_block_1 is mid.block_1.
VAE_DOTTED: Renames = (
    (r"\bmid_(block|attn)_(\d+)", r"mid.\1@\2"),
    (r"\b(down|up)_(\d+)_(block|attn|downsample|upsample)", r"\1.\2.\3"),
    (r"_(\d+)", r".\1"),
    ("@", "_"),
    # The codebook of a VQ model.
    (r"^quantize\.weight$", "quantize.embedding.weight"),
    # How the decoder of a video sees other frames.
    (r"\.time_mixer\.mix_factor$", ".mix_factor"),
    (r"(^|\.)time_mix_conv\.", r"\1conv_out.time_mix_conv."),
)
# generative-models calls everything between encoder and decoder so.
CODES_ALIASES: Renames = ((r"^quantize\.", "regularization."),)

RES_BLOCK: Renames = (
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".conv_shortcut."),
)
# Everything in a UNet but its blocks, which names.unet_blocks renames.
UNET_DIFFUSERS: Renames = (
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^time_embed_cond_proj\.", "time_embedding.cond_proj."),
    (r"^label_emb\.0\.0\.", "add_embedding.linear_1."),
    (r"^label_emb\.0\.2\.", "add_embedding.linear_2."),
    (r"^label_emb\.1\.0\.", "class_embedding.linear_1."),
    (r"^label_emb\.1\.2\.", "class_embedding.linear_2."),
    (r"^label_emb\.", "class_embedding."),
    (r"^middle_block\.0\.", "mid_block.resnets.0."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    (r"^middle_block\.2\.", "mid_block.resnets.1."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    *RES_BLOCK,
)
# What a ControlNet has beside the blocks of a UNet, but for the last convolution over its hint.
CONTROL_DIFFUSERS: Renames = (
    (r"^input_hint_block\.0\.", "controlnet_cond_embedding.conv_in."),
    (r"^zero_convs\.(\d+)\.0\.", r"controlnet_down_blocks.\1."),
    (r"^middle_block_out\.0\.", "controlnet_mid_block."),
)
# The blocks over time, and the residual blocks beside them. Applied before UNET_DIFFUSERS.
UNET_VIDEO: Renames = (
    (r"\.(?=(in_layers|emb_layers|out_layers|skip_connection)\.)", ".spatial_res_block."),
    (r"\.time_stack\.spatial_res_block\.", ".temporal_res_block."),
    (r"\.time_stack\.(\d+)\.", r".temporal_transformer_blocks.\1."),
    (r"\.time_pos_embed\.0\.", ".time_pos_embed.linear_1."),
    (r"\.time_pos_embed\.2\.", ".time_pos_embed.linear_2."),
)
# The vector enters here in unCLIP, and as add_embedding in SDXL.
UNET_ALIASES: Renames = ((r"^add_embedding\.", "class_embedding."),)

# Everything but the decoder's levels, which names.vae_levels renames.
VAE_DIFFUSERS: Renames = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.attn\.", r".down_blocks.\1.attentions."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
# The decoder of a video, whose residual blocks have one over time beside them. Applied before
# VAE_DIFFUSERS.
VAE_VIDEO: Renames = (
    (
        r"^(decoder\..*block[._]\d+)\.(?=(norm|conv)[12]\.|nin_shortcut\.)",
        r"\1.spatial_res_block.",
    ),
    (r"\.time_stack\.", ".temporal_res_block."),
    *RES_BLOCK,
    (r"\.mix_factor$", ".time_mixer.mix_factor"),
    (r"\.conv_out\.time_mix_conv\.", ".time_conv_out."),
)
# Names of diffusers before version 0.12, which sd-vae-ft-mse still has.
VAE_ALIASES: Renames = (
    (r"\.to_q\.", ".query."),
    (r"\.to_k\.", ".key."),
    (r"\.to_v\.", ".value."),
    (r"\.to_out\.0\.", ".proj_attn."),
)

_OPEN_LAYERS: Renames = (
    (r"^encoder\.layers\.(\d+)\.", r"transformer.resblocks.\1."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.self_attn\.[qkv]_proj\.(weight|bias)$", r".attn.in_proj_\1"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
)
TEXT_OPEN: Renames = (
    *_OPEN_LAYERS,
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
)
VISION_OPEN: Renames = (
    *_OPEN_LAYERS,
    (r"^embeddings\.class_embedding$", "class_embedding"),
    (r"^embeddings\.patch_embedding\.", "conv1."),
    (r"^pre_layrnorm\.", "ln_pre."),
    (r"^post_layernorm\.", "ln_post."),
    (r"^visual_projection\.weight$", "proj"),
)

# Buffers at the root of whole checkpoints, which are computed: schedules, scale, counters.
BUFFERS = (
    r"betas$|alphas_cumprod(_prev)?$|sqrt_(one_minus_)?alphas_cumprod$|log_one_minus_alphas_cumprod$",
    r"sqrt_recip(m1)?_alphas_cumprod$|posterior_(variance|log_variance_clipped|mean_coef[12])$",
    r"lvlb_weights$|logvar$|scale_factor$|cond_ids$|denoiser\.|model_ema\.",
)
