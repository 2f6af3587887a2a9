"""Text to image on emoji at 32 px with a transformer (DiT) trained by flow matching.

python launch.py --config=configs/dit_emoji.py
python launch.py sample --workdir=runs/dit_emoji --prompt="red heart" --n=4
python launch.py --config=configs/dit_emoji.py:tiny            # the same code in seconds

Hardware: one GPU; a CPU takes hours. Time: not measured; 10,000 steps of 32 images are 4.2e15 FLOP,
which take 12 hours on one CPU core at 100 GFLOP/s. Result: not measured.

256 patches of 2 x 2 pixels, normed queries and keys, rotary positions, and cross-attention to a
small transformer over the caption's tokens that learns together with the network. 11.3 M
parameters, the same data and batch as configs/emoji.py. The emoji are OpenMoji's, CC BY-SA 4.0.
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
            name="dit",
            patch_size=2,
            hidden_size=256,
            depth=8,
            num_heads=4,
            position="rope",
            qk_norm=True,
            scan=True,
        )
    )
    config.schedule = d(dict(name="linear"))  # of the pictures of the forward process only
    config.denoiser = d(dict(name="continuous", scaling=dict(name="flow")))
    config.discretization = d(dict(name="flow", shift=1.0))
    config.loss = d(dict(name="denoiser", stratified=True))
    config.sigma_sampling = d(dict(name="logit_normal", mean=0.0, std=1.0, shift=1.0))
    config.weighting = d(dict(name="flow"))
    config.sampler = d(dict(name="euler", num_steps=25))
    config.guidance = d(dict(name="cfg", scale=2.0))

    config.optimizer = d(
        dict(
            name="adamw",
            learning_rate=5e-4,
            b2=0.99,
            weight_decay=0.01,
            gradient_clip_norm=1.0,
            ema_decay=0.999,
        )
    )
    config.train = d(dict(num_steps=10_000, batch_size=32))
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
        config.model.update(dict(hidden_size=32, depth=2, num_heads=2))
        config.train.update(dict(num_steps=4, batch_size=8))
        config.lr_schedule.warmup_steps = 2
        config.sampler.num_steps = 4
        config.hooks.scalars.every = 2
        config.hooks.images.batch_frequency = 4
        config.hooks.validation.every = 4
        config.checkpoint.every = 4
    return config
