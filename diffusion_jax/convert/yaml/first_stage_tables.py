"""What each option of the training of a first stage is here: losses, discriminators, quantizers."""

from diffusion_jax.convert.yaml.rows import Class, Drop, Key, Only, Table

UNUSED = "not needed: unused there, too"
LOGGED = "not needed: everything is logged"

# Options of the model itself, beside those of its network.
MODEL: Table = {
    "embed_dim": Key("embed_dim"),
    "ignore_keys": Only(((),), "train.ignore_keys takes regular expressions"),
    "image_key": Only(("image", "jpg"), "the input is `image`; see data.batches.image_key"),
    "input_key": Only(("image", "jpg"), "the input is `image`; see data.batches.image_key"),
    "colorize_nlabels": Only((), "images have colours already"),
    "max_batch_size": Drop("a batch is encoded as a whole"),
    "batch_resize_range": Only((), "data.batches.buckets gives several sizes"),
    "remap": Only((), "all codes are kept"),
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
_COMMON: Table = {
    "disc_start": Key("disc_start", 0),
    "disc_factor": Key("disc_factor"),
    "disc_weight": Key("disc_weight"),
    "perceptual_weight": Key("perceptual_weight"),
    "disc_loss": Key("disc_loss"),
    "logvar_init": Key("logvar_init"),
    "disc_in_channels": Only((3,), "it judges images of as many channels as they have"),
    "disc_conditional": Only((False,), "the discriminator sees images alone"),
    "pixelloss_weight": Only((1, 1.0), UNUSED),
}
LOSSES = {
    "LPIPSWithDiscriminator": Class("autoencoder", _COMMON),
    "VQLPIPSWithDiscriminator": Class(
        "autoencoder",
        {
            **{key: row for key, row in _COMMON.items() if key != "logvar_init"},
            "pixel_loss": Key("pixel_loss"),
            "perceptual_loss": Only(("lpips",), "the perceptual distance is LPIPS"),
            "n_classes": Only((), "usage is logged for every code"),
        },
    ),
    "GeneralLPIPSWithDiscriminator": Class(
        "autoencoder",
        {
            **_COMMON,
            "learn_logvar": Key("learn_logvar"),
            "regularization_weights": Key("regularization_weights"),
            "scale_input_to_tgt_size": Only((False,), "images are compared at their own size"),
            "dims": Only((2,), "images have two dimensions"),
            "additional_log_keys": Drop(LOGGED),
        },
    ),
}
# Options of a loss that are the discriminator's here.
DISC_OF_LOSS: Table = {
    "disc_num_layers": Key("n_layers"),
    "disc_ndf": Key("ndf"),
    "use_actnorm": Key("use_actnorm"),
}
DISCRIMINATORS = {
    "NLayerDiscriminator": Class(
        "patchgan",
        {
            "ndf": Key("ndf"),
            "n_layers": Key("n_layers"),
            "use_actnorm": Key("use_actnorm"),
            "input_nc": Only((3,), "it judges images of as many channels as they have"),
        },
    )
}
_CODES: Table = {
    "remap": Only((), "all codes are kept"),
    "unknown_index": Drop("all codes are kept"),
    "sane_index_shape": Drop("not needed: codes are [b h w]"),
    "log_perplexity": Drop(LOGGED),
    "embedding_weight_norm": Only((False,), "codes are not normalised"),
    "loss_key": Only(("loss/vq",), "its loss is named loss/vq"),
    "e_dim": Drop("not needed: codes have model.embed_dim channels"),
    "embedding_dim": Drop("not needed: codes have model.embed_dim channels"),
    "num_hiddens": Drop("not needed: codes have model.embed_dim channels"),
}
REGULARIZERS = {
    "DiagonalGaussianRegularizer": Class(
        "kl", {"sample": Only((True,), "latents are samples in training, modes in evaluation")}
    ),
    "IdentityRegularizer": Class("identity"),
    "VectorQuantizer": Class("vq", {**_CODES, "n_e": Key("num_codes"), "beta": Key("beta")}),
    "EMAVectorQuantizer": Class(
        "ema_vq",
        {
            **_CODES,
            "n_embed": Key("num_codes"),
            "beta": Key("beta", 0.25),
            "decay": Key("decay"),
            "eps": Key("eps"),
        },
    ),
    "GumbelQuantizer": Class(
        "gumbel",
        {
            **_CODES,
            "n_embed": Key("num_codes"),
            "straight_through": Key("straight_through"),
            "kl_weight": Key("kl_weight"),
            "temp_init": Only((1, 1.0), "set regularizer.temperature"),
        },
    ),
}
MONITORS = {"val/rec_loss": "val/loss/rec", "val/total_loss": "val/loss/total"}
