"""The decoder of Stable Video Diffusion: an image autoencoder f8 whose decoder learns to see time.

python launch.py --config=configs/svd_decoder.py --config.data.source.folder=~/videos \
    --config.train.ckpt_path=vae.safetensors           # from an autoencoder of images
python launch.py --config=configs/svd_decoder.py --config.data.source.folder=~/videos \
    --config.train.ckpt_path=svd.safetensors           # go on from the released decoder
python launch.py --config=configs/svd_decoder.py:tiny  # the same code in seconds

Hardware: a GPU or more. Time: not measured; 50,000 steps of 8 clips are 1.8e19 FLOP, which take 13
hours on an H100 at 40 % of its peak. Result: not measured.

The encoder stays as it is, so that its latents, and all models that make them, stay valid; only the
decoder is trained (config.train.trainable chooses otherwise). A decoder of images starts with
layers over time that change nothing. The loss is the one of configs/vae_kl_f8.py for every frame,
and the discriminator judges frames. configs/svd.py reads the run with config.first_stage.weights.
"""

import ml_collections

VARIANTS = ("tiny",)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    d = ml_collections.ConfigDict
    config = d()
    config.seed = 0

    config.data = d(
        dict(
            source=dict(name="video_folder", folder="set me", num_frames=16, images="stills"),
            splits=dict(train="train[:99%]", validation="train[99%:]"),
            batches=dict(image_size=256, channels=3, num_frames=8, crop="random", random_flip=True),
        )
    )
    config.model = d(
        dict(
            name="autoencoder_video",
            z_channels=4,
            ch=128,
            ch_mult=(1, 2, 4, 4),
            num_res_blocks=2,
            resolution=256,
            video_kernel_size=(3, 1, 1),
            dtype="bfloat16",  # losses, norms and the last layers are float32
            remat="full",
        )
    )
    config.regularizer = d(dict(name="kl"))
    config.discriminator = d(dict(name="patchgan", ndf=64, n_layers=3))
    config.perceptual = d(dict(name="lpips", net="vgg16", weights=None))
    config.loss = d(
        dict(
            name="autoencoder",
            disc_start=5001,
            disc_weight=0.5,
            perceptual_weight=1.0,
            schedule="both",
        )
    )
    config.optimizer = d(dict(name="adam", learning_rate=1e-5, b1=0.5, b2=0.9, ema_decay=0.999))
    config.train = d(dict(num_steps=50_000, batch_size=8, ckpt_path=None))
    config.lr_schedule = d(dict(name="constant", warmup_steps=1000))
    config.hooks = d(
        dict(
            scalars=dict(every=50),
            images=dict(batch_frequency=1000, max_images=2),
            validation=dict(every=1000),
        )
    )
    config.checkpoint = d(
        dict(every=1000, keep_last=1, keep_best=1, monitor="val/loss/rec_ema", mode="min")
    )

    if variant == "tiny":
        config.data.source = d(dict(name="moving_digits", num_examples=64))
        config.data.splits = d(dict(train="train", validation="validation", test="test"))
        config.data.batches = d(dict(image_size=32, channels=3, num_frames=4))
        config.model.update(
            dict(
                ch=8,
                ch_mult=(1, 2),
                num_res_blocks=1,
                num_groups=4,
                resolution=32,
                dtype="float32",
                remat="none",
            )
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
