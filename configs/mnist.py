"""Class-conditional digits at 28 px, on 4,500 of 5,000 real MNIST images inside a package.

python launch.py --config=configs/mnist.py              # or `make demo`
python launch.py --config=configs/mnist.py:flow         # the same network, by flow matching
python launch.py --config=configs/mnist.py:meanflow     # to draw in one step, by MeanFlow
python launch.py --config=configs/mnist.py:consistency  # to draw in one step or two
python launch.py --config=configs/mnist.py:tiny         # the same code in seconds, for tests

Hardware: two CPU cores. Time: 3 minutes. Result: a classifier of real digits reads 98 or 99 of 100
samples as the digit that was asked for (`make demo`).

v-prediction on a cosine schedule; the UNet works at 14 and 7 px after a 2x2 space-to-depth.
"""

import ml_collections

VARIANTS = ("tiny", "flow", "meanflow", "meanflow_tiny", "consistency", "consistency_tiny")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    d = ml_collections.ConfigDict
    config = d()
    config.seed = 0

    config.data = d(
        dict(
            source=dict(name="mnist_subset"),
            splits=dict(train="train", validation="validation", test="test"),
            batches=dict(image_size=28, channels=1, cache=True),
        )
    )
    config.model = d(
        dict(
            name="unet",
            patch_size=2,
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            num_groups=8,
            num_heads=4,  # of the one attention block, at 7 px
            conv_resample=False,
            use_scale_shift_norm=True,
        )
    )
    config.conditioning = d(
        dict(
            key="adm",
            embedders=dict(label=dict(name="class_label", num_classes=10, ucg_rate=0.1)),
        )
    )
    config.schedule = d(dict(name="squaredcos_cap_v2", num_timesteps=1000, parameterization="v"))
    config.loss = d(dict(name="ddpm", loss_type="l2"))
    config.sampler = d(dict(name="ddim", num_steps=25, discretize="trailing", clip_denoised=True))
    config.guidance = d(dict(name="cfg", scale=2.0))

    config.optimizer = d(
        dict(
            name="adamw",
            learning_rate=2e-3,
            b2=0.99,
            weight_decay=0.01,
            gradient_clip_norm=1.0,
            ema_decay=0.998,
        )
    )
    config.train = d(dict(num_steps=1500, batch_size=32))
    config.lr_schedule = d(
        dict(
            name="cosine_decay",
            warmup_steps=100,
            decay_steps=config.train.get_oneway_ref("num_steps"),
        )
    )
    config.hooks = d(
        dict(
            scalars=dict(every=50),
            images=dict(batch_frequency=500, max_images=8),
            validation=dict(every=500),
        )
    )
    config.checkpoint = d(
        dict(every=500, keep_last=1, keep_best=1, monitor="val/loss_simple_ema", mode="min")
    )

    if variant == "flow" or variant.startswith("meanflow"):
        config.denoiser = d(dict(name="continuous", scaling=dict(name="flow")))
        config.discretization = d(dict(name="flow", shift=1.0))
        config.loss = d(dict(name="denoiser", stratified=True))
        config.sigma_sampling = d(dict(name="logit_normal", mean=0.0, std=1.0, shift=1.0))
        config.weighting = d(dict(name="flow"))
        config.sampler = d(dict(name="euler", num_steps=25))
        config.checkpoint.monitor = "val/loss_ema"
    if variant.startswith("meanflow"):
        config.model.embeds_duration = True
        config.denoiser.scaling.time_scale = 10.0
        config.loss = d(dict(name="mean_flow", guidance_scale=2.0, kappa=0.5, stratified=True))
        del config.weighting
        config.sampler = d(dict(name="mean_flow", num_steps=1))
        config.train.num_steps = 2000
        del config.guidance  # the network learns what guidance would do
        # Its loss rises while it learns the guidance, and so names no best checkpoint.
        config.checkpoint = d(dict(every=500, keep_last=1))
    if variant.startswith("consistency"):
        config.denoiser = d(dict(name="continuous", scaling=dict(name="consistency")))
        config.sigma_sampling = d(dict(name="lognormal", p_mean=-1.1, p_std=2.0))
        config.loss = d(
            dict(
                name="consistency",
                total_steps=config.train.get_oneway_ref("num_steps"),
                num_levels=(10, 160),
                stratified=True,
            )
        )
        config.sampler = d(dict(name="consistency", num_steps=2))
        del config.guidance
        config.checkpoint.monitor = "val/loss_ema"
    if variant.endswith("tiny"):
        config.model.model_channels = 32
        config.model.channel_mult = (1,)
        config.train.num_steps = 8
        config.train.batch_size = 8
        config.lr_schedule.warmup_steps = 2
        config.sampler.num_steps = 4
        config.hooks.scalars.every = 2
        config.hooks.images.batch_frequency = 4
        config.hooks.validation.every = 4
        config.checkpoint.every = 4
    return config
