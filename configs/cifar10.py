"""Class-conditional CIFAR-10 at 32 px with an ADM-style UNet of 44.2 M parameters.

python launch.py --config=configs/cifar10.py --config.data.source.download=True
python launch.py --config=configs/cifar10.py:tiny       # the same code on digits, in seconds

Hardware: one GPU or more. Time: not measured; 500,000 steps of 128 images are 2.6e18 FLOP, which
take 1.8 hours on an H100 at 40 % of its peak. Result: not measured.
"""

import ml_collections

VARIANTS = ("tiny",)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    d = ml_collections.ConfigDict
    config = d()
    config.seed = 0

    config.data = d(
        dict(
            source=dict(name="cifar10", download=False),
            splits=dict(train="train", validation="test[:2000]", test="test"),
            batches=dict(image_size=32, channels=3, random_flip=True, cache=True),
        )
    )
    config.model = d(
        dict(
            name="unet",
            model_channels=128,
            channel_mult=(1, 2, 2, 2),
            num_res_blocks=2,
            attention_resolutions=(2, 4),
            num_head_channels=64,
            use_scale_shift_norm=True,
            resblock_updown=True,
            dropout=0.1,
            dtype="bfloat16",
        )
    )
    config.conditioning = d(
        dict(
            key="adm",
            embedders=dict(label=dict(name="class_label", num_classes=10, ucg_rate=0.1)),
        )
    )
    config.schedule = d(dict(name="squaredcos_cap_v2", num_timesteps=1000, parameterization="v"))
    config.loss = d(dict(name="ddpm", loss_type="l2", min_snr_gamma=5.0))
    config.sampler = d(dict(name="ddim", num_steps=50, discretize="trailing", clip_denoised=True))
    config.guidance = d(dict(name="cfg", scale=1.5))

    config.optimizer = d(
        dict(
            name="adamw",
            learning_rate=2e-4,
            weight_decay=0.01,
            gradient_clip_norm=1.0,
            ema_decay=0.9999,
        )
    )
    config.lr_schedule = d(dict(name="constant", warmup_steps=5000))
    config.train = d(dict(num_steps=500_000, batch_size=128))
    config.hooks = d(
        dict(
            scalars=dict(every=100),
            images=dict(batch_frequency=5000, max_images=16),
            validation=dict(every=5000),
        )
    )
    config.checkpoint = d(
        dict(every=5000, keep_last=2, keep_best=2, monitor="val/loss_simple_ema", mode="min")
    )

    if variant == "tiny":
        config.data.source = d(dict(name="mnist_subset"))
        config.data.splits = d(dict(train="train", validation="validation[:16]", test="test[:16]"))
        config.data.batches.image_size = 16
        config.model.model_channels = 32
        config.model.channel_mult = (1, 2)
        config.model.num_res_blocks = 1
        config.model.num_head_channels = 32
        config.model.dtype = "float32"  # XLA's CPU compiler takes a minute over bf16 convolutions
        config.train.num_steps = 8
        config.train.batch_size = 8
        config.sampler.num_steps = 4
        config.lr_schedule.warmup_steps = 2
        config.hooks.scalars.every = 2
        config.hooks.images.batch_frequency = 4
        config.hooks.validation.every = 4
        config.checkpoint.every = 4
    return config
