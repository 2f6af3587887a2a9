"""Text to image on emoji at 32 px, from words alone: 4,000 captioned pictures inside a package.

python launch.py --config=configs/emoji.py
python launch.py sample --workdir=runs/emoji --prompt="red heart" --n=4
python launch.py --config=configs/emoji.py:tiny                # the same code in seconds

Hardware: one GPU or a CPU. Time: 93 minutes on one CPU core. Result: people, hearts and flags are
recognisable for captions of the training split; held-out ones mostly are not (docs/results.md).

EDM (Karras et al. 2022): a continuous denoiser, log-normal noise levels, and a small transformer
over the caption's tokens that learns together with the network. The emoji are OpenMoji's, CC BY-SA
4.0.
"""

import ml_collections

VARIANTS = ("tiny",)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    d = ml_collections.ConfigDict
    config = d()
    config.seed = 0

    config.data = d(
        dict(
            source=dict(name="openmoji", size=32),
            splits=dict(train="train", validation="validation", test="test"),
            batches=dict(image_size=32, channels=3, cache=True),
        )
    )
    config.conditioning = d(
        dict(
            key="crossattn",
            embedders=dict(
                text=dict(
                    name="transformer_text",
                    width=128,
                    num_layers=2,
                    num_heads=4,
                    head_dim=32,
                    max_length=24,
                    ucg_rate=0.1,
                )
            ),
        )
    )
    config.model = d(
        dict(
            name="unet",
            patch_size=2,
            model_channels=64,
            channel_mult=(1, 2, 2),
            num_res_blocks=1,
            attention_resolutions=(2, 4),
            num_head_channels=32,
            use_scale_shift_norm=True,
            use_spatial_transformer=True,
            use_linear_in_transformer=True,
        )
    )
    config.schedule = d(dict(name="linear"))  # of the pictures of the forward process only
    config.denoiser = d(dict(name="continuous", scaling=dict(name="edm", sigma_data=0.5)))
    config.discretization = d(dict(name="edm", sigma_min=0.002, sigma_max=80.0, rho=7.0))
    config.loss = d(dict(name="denoiser", stratified=True))
    config.sigma_sampling = d(dict(name="lognormal", p_mean=-1.2, p_std=1.2))
    config.weighting = d(dict(name="edm", sigma_data=0.5))
    config.sampler = d(dict(name="dpmpp_2m", num_steps=25))
    config.guidance = d(dict(name="cfg", scale=2.0))

    config.optimizer = d(
        dict(
            name="adamw",
            learning_rate=1e-3,
            b2=0.99,
            weight_decay=0.01,
            gradient_clip_norm=1.0,
            ema_decay=0.999,
        )
    )
    config.train = d(dict(num_steps=5_000, batch_size=32))
    config.lr_schedule = d(
        dict(
            name="cosine_decay",
            warmup_steps=200,
            decay_steps=config.train.get_oneway_ref("num_steps"),
        )
    )
    config.hooks = d(
        dict(
            scalars=dict(every=50),
            images=dict(batch_frequency=1000, max_images=8),
            validation=dict(every=1000),
        )
    )
    config.checkpoint = d(dict(every=1000, keep_last=1))

    if variant == "tiny":
        config.data.source.max_examples = 48
        config.conditioning.embedders.text.update(dict(width=32, num_layers=1, num_heads=1))
        config.model.update(
            dict(
                model_channels=32,
                channel_mult=(1,),
                num_res_blocks=1,
                attention_resolutions=(1,),
            )
        )
        config.train.update(dict(num_steps=4, batch_size=8))
        config.lr_schedule.warmup_steps = 2
        config.sampler.num_steps = 4
        config.hooks.scalars.every = 2
        config.hooks.images.batch_frequency = 4
        config.hooks.validation.every = 4
        config.checkpoint.every = 4
    return config
