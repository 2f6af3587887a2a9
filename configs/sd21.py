"""Stable Diffusion 2.1: text to image with an OpenCLIP text encoder, 866 M parameters.

python launch.py --config=configs/sd21.py --config.data.source.folder=~/pictures \
    --config.train.ckpt_path=v2-1_512-ema-pruned.safetensors   # fine-tune the 512 px model
python launch.py sample --checkpoint=v2-1_768-ema-pruned.safetensors \
    --config=configs/sd21.py:768v --prompt="a red fox"         # the 768 px model, v-prediction
python launch.py sample --checkpoint=512-inpainting-ema.safetensors \
    --config=configs/sd21.py:inpaint --prompt="a red fox" --image=photo.png --mask=keep.png
python launch.py --config=configs/sd21.py:tiny                 # the same code in seconds

Hardware: one large GPU or more. Time: not measured; 100,000 steps of 16 images at 512 px are
5.6e18 FLOP, which take 4 hours on an H100 at 40 % of its peak. Result: not measured.
"""

import ml_collections

VARIANTS = ("768v", "inpaint", "tiny")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    d = ml_collections.ConfigDict
    config = d()
    config.seed = 0

    config.data = d(
        dict(
            source=dict(name="image_folder", folder="set me", caption="txt"),
            splits=dict(train="train"),
            batches=dict(image_size=512, channels=3, random_flip=True),
        )
    )
    config.first_stage = d(
        dict(
            name="autoencoder_kl",
            embed_dim=4,
            ch=128,
            ch_mult=(1, 2, 4, 4),
            num_res_blocks=2,
            scale_factor=0.18215,
            weights=None,  # taken from train.ckpt_path
        )
    )
    config.conditioning = d(
        dict(
            key="crossattn",
            embedders=dict(
                text=dict(
                    name="open_clip_text",
                    tower="ViT-H-14",
                    layer="penultimate",
                    legacy=True,
                    ucg_rate=0.1,
                    legacy_ucg_value="",  # a dropped caption is the empty one
                    weights=None,
                )
            ),
        )
    )
    config.model = d(
        dict(
            name="unet",
            out_channels=4,
            model_channels=320,
            channel_mult=(1, 2, 4, 4),
            num_res_blocks=2,
            attention_resolutions=(4, 2, 1),
            num_head_channels=64,
            use_spatial_transformer=True,
            use_linear_in_transformer=True,
            transformer_depth=1,
            context_dim=1024,
            dtype="bfloat16",
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
    config.loss = d(dict(name="ddpm", loss_type="l2"))
    config.sampler = d(dict(name="ddim", num_steps=50))
    config.guidance = d(dict(name="cfg", scale=9.0))

    config.optimizer = d(
        dict(name="adamw", learning_rate=1e-5, weight_decay=0.01, ema_decay=0.9999)
    )
    config.lr_schedule = d(dict(name="constant", warmup_steps=1000))
    config.train = d(dict(num_steps=100_000, batch_size=16, ckpt_path=None))
    config.hooks = d(dict(scalars=dict(every=50), images=dict(batch_frequency=1000, max_images=4)))
    config.checkpoint = d(dict(every=1000, keep_last=2))

    if variant == "768v":
        config.data.batches.image_size = 768
        config.schedule.parameterization = "v"
    elif variant == "inpaint":
        config.data.batches.masks = ("boxes", "strokes", "strokes", "everything")
        config.conditioning.key = "hybrid"
        config.conditioning.order = ("mask", "masked_image", "text")
        config.conditioning.embedders.mask = dict(name="inpainting_mask")
        image = dict(name="image_latents", input_key="masked_image")
        config.conditioning.embedders.masked_image = image
        config.train.keep_dims = 4
    elif variant == "tiny":
        config.data.source = d(dict(name="openmoji", size=64, max_examples=48))
        config.data.splits = d(dict(train="train", validation="validation", test="test"))
        config.data.batches.image_size = 32
        config.first_stage.update(dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, weights="random"))
        config.conditioning.embedders.text.update(
            dict(
                width=32, num_layers=2, num_heads=2, mlp_dim=64, projection_dim=32, weights="random"
            )
        )
        config.model.update(
            dict(
                model_channels=32,
                channel_mult=(1, 2),
                num_res_blocks=1,
                attention_resolutions=(2,),
                num_head_channels=16,
                context_dim=32,
                dtype="float32",  # XLA's CPU compiler takes a minute over bf16 convolutions
            )
        )
        config.schedule.parameterization = "v"
        config.train.update(dict(num_steps=4, batch_size=8))
        config.lr_schedule.warmup_steps = 2
        config.sampler.num_steps = 4
        config.hooks.scalars.every = 2
        config.hooks.images.batch_frequency = 4
        config.checkpoint.every = 4
    return config
