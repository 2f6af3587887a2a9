"""What each option of the training of a first stage is here: losses, discriminators, quantizers."""

from diffusion_jax.convert.yaml.rows import As, Class, Drop, Only, Table, drop, keep
from diffusion_jax.convert.yaml.tables import ALL_CODES, DDCONFIG, INPUT_IS_IMAGE

LOGGED = "not needed: everything is logged"
THREE_CHANNELS = Only((3,), "it judges images of as many channels as they have")

# Options of the model itself; NETWORK has the options of encoder and decoder.
MODEL: Table = {
    **keep("embed_dim"),
    "ignore_keys": Only(((),), "train.ignore_keys takes regular expressions"),
    "image_key": INPUT_IS_IMAGE,
    "input_key": INPUT_IS_IMAGE,
    "colorize_nlabels": Only((), "images have colours already"),
    "max_batch_size": Drop("a batch is encoded as a whole"),
    "batch_resize_range": Only((), "data.batches.buckets gives several sizes"),
    "remap": Only((), ALL_CODES),
    "sane_index_shape": Drop("not needed: codes are [b h w]"),
    "disc_start_iter": Only((0,), "loss.disc_start says when the discriminator begins"),
    "diff_boost_factor": Drop("hooks.images shows differences as they are"),
    "trainable_ae_params": Only((), "the whole autoencoder is trained"),
    "ae_optimizer_args": Only((), "one optimizer has one set of options"),
    "trainable_disc_params": Only((), "the whole discriminator is trained"),
    "disc_optimizer_args": Only((), "disc_optimizer has one set of options"),
    "additional_decode_keys": Only((), "the decoder reads latents alone"),
    "ckpt_engine": Only((), "set train.ckpt_path"),
}
NETWORK: Table = {k: row for k, row in DDCONFIG.items() if k != "double_z"} | keep(double_z=True)
_COMMON: Table = {
    **keep(disc_start=0),
    **keep("disc_factor disc_weight perceptual_weight disc_loss logvar_init"),
    "disc_in_channels": THREE_CHANNELS,
    "disc_conditional": Only((False,), "the discriminator sees images alone"),
    "pixelloss_weight": Only((1, 1.0), "not needed: unused there, too"),
}
LOSSES = {
    "LPIPSWithDiscriminator": Class("autoencoder", _COMMON),
    "VQLPIPSWithDiscriminator": Class(
        "autoencoder",
        {
            **{key: row for key, row in _COMMON.items() if key != "logvar_init"},
            **keep("pixel_loss"),
            "perceptual_loss": Only(("lpips",), "the perceptual distance is LPIPS"),
            "n_classes": Only((), "usage is logged for every code"),
        },
    ),
    "GeneralLPIPSWithDiscriminator": Class(
        "autoencoder",
        {
            **_COMMON,
            **keep("learn_logvar regularization_weights"),
            "scale_input_to_tgt_size": Only((False,), "images are compared at their own size"),
            "dims": Only((2,), "images have two dimensions"),
            "additional_log_keys": Drop(LOGGED),
        },
    ),
}
# Options of a loss that belong to the section `discriminator` here.
DISC_OF_LOSS: Table = {
    "disc_num_layers": As("n_layers"),
    "disc_ndf": As("ndf"),
    **keep("use_actnorm"),
}
DISCRIMINATORS = {
    "NLayerDiscriminator": Class(
        "patchgan", {**keep("ndf n_layers use_actnorm"), "input_nc": THREE_CHANNELS}
    )
}
_CODES: Table = {
    "remap": Only((), ALL_CODES),
    "unknown_index": Drop(ALL_CODES),
    "sane_index_shape": Drop("not needed: codes are [b h w]"),
    "log_perplexity": Drop(LOGGED),
    "embedding_weight_norm": Only((False,), "codes are not normalised"),
    "loss_key": Only(("loss/vq",), "its loss is named loss/vq"),
    **drop("e_dim embedding_dim num_hiddens", "not needed: codes have model.embed_dim channels"),
}
REGULARIZERS = {
    "DiagonalGaussianRegularizer": Class(
        "kl", {"sample": Only((True,), "latents are samples in training, modes in evaluation")}
    ),
    "IdentityRegularizer": Class("identity"),
    "VectorQuantizer": Class("vq", {**_CODES, "n_e": As("num_codes"), **keep("beta")}),
    "EMAVectorQuantizer": Class(
        "ema_vq", {**_CODES, "n_embed": As("num_codes"), **keep(beta=0.25), **keep("decay eps")}
    ),
    "GumbelQuantizer": Class(
        "gumbel",
        {
            **_CODES,
            "n_embed": As("num_codes"),
            **keep("straight_through kl_weight"),
            "temp_init": Only((1, 1.0), "set regularizer.temperature"),
        },
    ),
}
MONITORS = {"val/rec_loss": "val/loss/rec", "val/total_loss": "val/loss/total"}
