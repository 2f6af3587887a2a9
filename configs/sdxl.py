"""SDXL base 1.0: text to image at about 1024 x 1024 px, any aspect ratio, 2.57 B parameters.

python launch.py --config=configs/sdxl.py --config.data.source.folder=~/pictures \
    --config.train.ckpt_path=sd_xl_base_1.0.safetensors        # fine-tune the released weights
python launch.py --config=configs/sdxl.py --config.data.source.folder=~/pictures \
    --config.first_stage.weights=sdxl_vae.safetensors \
    --config.conditioning.embedders.clip.weights=text_encoder/model.safetensors \
    --config.conditioning.embedders.open_clip.weights=text_encoder_2/model.safetensors
python launch.py sample --checkpoint=sd_xl_base_1.0.safetensors --config=configs/sdxl.py \
    --prompt="a red fox"
python launch.py --config=configs/sdxl.py:tiny                 # the same code in seconds

Hardware: a TPU or GPU pod; weights, moments and average are 41 GB in float32, without gradients:
split them over the chips with --config.mesh.data=1 --config.mesh.fsdp=-1. Time: not measured;
100,000 steps of 16 images are 4.0e19 FLOP, which take 28 hours on an H100 at 40 % of its peak, and
the TPU compiler expects 0.21 s a step with 2 samples a chip on v5p:2x2x1 (docs/performance.md).
Result: not measured.

Images are sorted by their aspect ratio into buckets of one shape; the network reads the size of the
original, where the crop lies and the size of the target (Podell et al. 2023, section 2).
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
            order=("clip", "open_clip", "original_size", "crop_top_left", "target_size"),
            embedders=dict(
                clip=dict(
                    name="clip_text",
                    tower="ViT-L-14",
                    layer="hidden",
                    layer_idx=11,
                    ucg_rate=0.1,
                    ucg_group="caption",  # both encoders lose the caption together
                    weights=None,
                ),
                open_clip=dict(
                    name="open_clip_text",
                    tower="ViT-bigG-14",
                    layer="penultimate",
                    legacy=False,
                    always_return_pooled=True,
                    ucg_rate=0.1,
                    ucg_group="caption",
                    weights=None,
                ),
                original_size=dict(name="numbers", input_key="original_size", default="size"),
                crop_top_left=dict(name="numbers", input_key="crop_top_left", default=(0, 0)),
                target_size=dict(name="numbers", input_key="target_size", default="size"),
            ),
        )
    )
    config.model = d(
        dict(
            name="unet",
            out_channels=4,
            model_channels=320,
            channel_mult=(1, 2, 4),
            num_res_blocks=2,
            attention_resolutions=(4, 2),
            num_head_channels=64,
            use_spatial_transformer=True,
            use_linear_in_transformer=True,
            transformer_depth=(1, 2, 10),
            context_dim=2048,
            num_classes="sequential",
            adm_in_channels=2816,
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
    config.sigma_sampling = d(dict(name="discrete"))
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
        config.conditioning.embedders.clip.update(small | dict(layer_idx=1))
        config.conditioning.embedders.open_clip.update(small | dict(projection_dim=32))
        for name in ("original_size", "crop_top_left", "target_size"):
            config.conditioning.embedders[name].outdim = 16
        config.model.update(
            dict(
                model_channels=32,
                channel_mult=(1, 2),
                num_res_blocks=1,
                attention_resolutions=(2,),
                num_head_channels=16,
                transformer_depth=(1, 2),
                context_dim=64,
                adm_in_channels=32 + 3 * 2 * 16,
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
