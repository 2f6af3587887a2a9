"""SDXL refiner 1.0: improves what SDXL base left at low noise, 2.26 B parameters.

python launch.py --config=configs/sdxl_refiner.py --config.data.source.folder=~/pictures \
    --config.train.ckpt_path=sd_xl_refiner_1.0.safetensors     # fine-tune the released weights
python launch.py --config=configs/sdxl_refiner.py:tiny         # the same code in seconds

Hardware: a TPU or GPU pod. Time: not measured; 100,000 steps of 16 images are 4.3e19 FLOP, which
take 30 hours on an H100 at 40 % of its peak. Result: not measured.

The base hands over when a fifth of the steps is left:

    x = base(["a red fox"], denoising_end=0.8, output="latents")
    images = refiner(["a red fox"], latents=x, denoising_start=0.8,
                     negative={"caption": "", "aesthetic_score": 2.5})

Training draws noise levels from that fifth only (Podell et al. 2023, section 2.5).
"""

import ml_collections

VARIANTS = ("tiny",)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    d = ml_collections.ConfigDict
    config = d()
    config.seed = 0

    config.data = d(
        dict(
            source=dict(name="image_folder", folder="set me", caption="txt"),
            splits=dict(train="train"),
            batches=dict(image_size=1024, channels=3, crop="random", buckets=True),
        )
    )
    config.first_stage = d(
        dict(
            name="autoencoder_kl",
            embed_dim=4,
            ch=128,
            ch_mult=(1, 2, 4, 4),
            num_res_blocks=2,
            scale_factor=0.13025,
            weights=None,  # from train.ckpt_path; its float16 overflows, so float32
        )
    )
    config.conditioning = d(
        dict(
            key="crossattn-adm",
            # The released weights expect the features in this order.
            order=("open_clip", "original_size", "crop_top_left", "aesthetic_score"),
            embedders=dict(
                open_clip=dict(
                    name="open_clip_text",
                    tower="ViT-bigG-14",
                    layer="penultimate",
                    legacy=False,
                    always_return_pooled=True,
                    ucg_rate=0.1,
                    legacy_ucg_value="",  # a dropped caption is the empty one
                    weights=None,
                ),
                original_size=dict(name="numbers", input_key="original_size", default="size"),
                crop_top_left=dict(name="numbers", input_key="crop_top_left", default=(0, 0)),
                aesthetic_score=dict(
                    name="numbers", input_key="aesthetic_score", size=1, default=(6.0,)
                ),
            ),
        )
    )
    config.model = d(
        dict(
            name="unet",
            out_channels=4,
            model_channels=384,
            channel_mult=(1, 2, 4, 4),
            num_res_blocks=2,
            attention_resolutions=(4, 2),
            num_head_channels=64,
            use_spatial_transformer=True,
            use_linear_in_transformer=True,
            transformer_depth=4,
            context_dim=1280,
            num_classes="sequential",
            adm_in_channels=2560,
            dtype="bfloat16",
            remat="full",
            scan=True,  # compiles in a third of the time, docs/performance.md
        )
    )
    config.schedule = d(
        dict(
            name="linear",
            num_timesteps=1000,
            linear_start=0.00085,
            linear_end=0.012,
            parameterization="eps",
        )
    )
    config.loss = d(dict(name="denoiser", loss_type="l2", offset_noise_level=0.05))
    # The levels of the last fifth of the schedule: timestep 200 has sigma 0.57.
    config.sigma_sampling = d(dict(name="uniform", sigma_min=0.03, sigma_max=0.57, space="log"))
    config.weighting = d(dict(name="eps"))
    config.sampler = d(dict(name="euler", num_steps=30))
    config.guidance = d(dict(name="cfg", scale=5.0))

    config.optimizer = d(
        dict(
            name="adamw",
            learning_rate=1e-5,
            weight_decay=0.01,
            gradient_clip_norm=1.0,
            ema_decay=0.9999,
        )
    )
    config.lr_schedule = d(dict(name="constant", warmup_steps=1000))
    config.train = d(dict(num_steps=100_000, batch_size=16, ckpt_path=None))
    config.hooks = d(dict(scalars=dict(every=50), images=dict(batch_frequency=1000, max_images=4)))
    config.checkpoint = d(dict(every=1000, keep_last=2))

    if variant == "tiny":
        config.data.source = d(dict(name="openmoji", size=96, max_examples=48))
        config.data.splits = d(dict(train="train", validation="validation", test="test"))
        config.data.batches.update(dict(image_size=32, bucket_divisor=16))
        config.first_stage.update(dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, weights="random"))
        small = dict(width=32, num_layers=2, num_heads=2, mlp_dim=64, weights="random")
        config.conditioning.embedders.open_clip.update(small | dict(projection_dim=32))
        for name in ("original_size", "crop_top_left", "aesthetic_score"):
            config.conditioning.embedders[name].outdim = 16
        config.model.update(
            dict(
                model_channels=32,
                channel_mult=(1, 2),
                num_res_blocks=1,
                attention_resolutions=(2,),
                num_head_channels=16,
                transformer_depth=2,
                context_dim=32,
                adm_in_channels=32 + 2 * 2 * 16 + 16,
                dtype="float32",  # XLA's CPU compiler takes a minute over bf16 convolutions
                remat="none",
            )
        )
        config.train.update(dict(num_steps=4, batch_size=8))
        config.lr_schedule.warmup_steps = 2
        config.sampler.num_steps = 4
        config.hooks.scalars.every = 2
        config.hooks.images.batch_frequency = 4
        config.checkpoint.every = 4
    return config
