"""SV3D: an object on white from all sides, 21 frames of 576 x 576 px, 1.52 B parameters.

python launch.py sample --checkpoint=sv3d_u.safetensors --config=configs/sv3d.py --image=object.png
python launch.py sample --checkpoint=sv3d_p.safetensors --config=configs/sv3d.py:p \
    --image=object.png --elevation=20
python launch.py --config=configs/sv3d.py --config.data.source.folder=~/orbits \
    --config.train.ckpt_path=sv3d_u.safetensors                # fine-tune the released weights
python launch.py --config=configs/sv3d.py:p --config.data.source.folder=~/orbits \
    --config.train.ckpt_path=sv3d_p.safetensors                # with the angles of the cameras
python launch.py --config=configs/sv3d.py:p_tiny               # the same code in seconds

Hardware: a GPU or TPU pod, as configs/svd.py. Time: not measured. Result: not measured.

The default goes once around at the picture's height; variant p has the angles of the camera as
an input, and its folder says in metadata.jsonl where the camera of each frame is (docs/video.md).
What is opaque in the picture is the object, and the last frame is the picture, also in training.
"""

import ml_collections

VARIANTS = ("p", "tiny", "p_tiny")
FRAMES = 21


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    d = ml_collections.ConfigDict
    config = d()
    config.seed = 0

    has_angles = variant.startswith("p")
    config.data = d(
        dict(
            source=dict(
                name="video_folder", folder="set me", num_frames=FRAMES, cameras=has_angles
            ),
            splits=dict(train="train"),
            batches=dict(image_size=576, channels=3, num_frames=FRAMES),
        )
    )
    config.first_stage = d(
        dict(
            name="autoencoder_kl",
            embed_dim=4,
            ch=128,
            ch_mult=(1, 2, 4, 4),
            num_res_blocks=2,
            use_quant_conv=False,
            scale_factor=0.18215,
            samples_at_a_time=1,
            weights=None,  # from train.ckpt_path
        )
    )
    number = dict(name="numbers", size=1)
    config.conditioning = d(
        dict(
            key="hybrid-adm",
            # The released weights expect the features in this order.
            order=("clip", "frame", "noise"),
            frame_fit="object",
            frame_noise=(-11.5, 0.0),  # almost none, which is how it was trained
            embedders=dict(
                clip=dict(
                    name="open_clip_image",
                    input_key="cond_frames_without_noise",
                    tower="ViT-H-14",
                    unsqueeze_dim=True,
                    ucg_rate=0.1,
                    ucg_group="picture",  # 5 % of the clips lose this alone
                    weights=None,
                ),
                frame=dict(
                    name="encoded_frames",
                    input_key="cond_frames",
                    ucg_rate=0.1,
                    ucg_group="picture",
                    ucg_from=0.05,  # 5 % lose both, and 5 % this alone
                    weights=None,
                ),
                noise=dict(input_key="cond_aug", default=(1e-5,), **number),
            ),
        )
    )
    if has_angles:
        angle = dict(name="numbers", size=1, outdim=512, frames=FRAMES)
        for name in ("polars_rad", "azimuths_rad"):
            config.conditioning.embedders[name] = d(dict(input_key=name, **angle))
            config.conditioning.order += (name,)
    config.model = d(
        dict(
            name="video_unet",
            out_channels=4,
            model_channels=320,
            channel_mult=(1, 2, 4, 4),
            num_res_blocks=2,
            attention_resolutions=(4, 2, 1),
            num_head_channels=64,
            transformer_depth=1,
            use_linear_in_transformer=True,
            context_dim=1024,
            num_classes="sequential",
            adm_in_channels=1280 if has_angles else 256,
            use_spatial_context=True,
            extra_ff_mix_layer=True,
            merge_strategy="learned_with_images",
            video_kernel_size=(3, 1, 1),
            dtype="bfloat16",
            remat="full",
        )
    )
    config.denoiser = d(dict(name="continuous", scaling=dict(name="v_edm")))
    config.loss = d(dict(name="denoiser"))
    config.sigma_sampling = d(dict(name="lognormal", p_mean=0.7, p_std=1.6))
    config.discretization = d(dict(name="edm", sigma_min=0.002, sigma_max=700.0))
    config.sampler = d(dict(name="euler", num_steps=50))
    config.guidance = d(dict(name="triangle", scale=2.5, min_scale=1.0))

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
    config.train = d(dict(num_steps=50_000, batch_size=16, ckpt_path=None))
    config.hooks = d(dict(scalars=dict(every=50), images=dict(batch_frequency=1000, max_images=2)))
    config.checkpoint = d(dict(every=1000, keep_last=2))

    if variant.endswith("tiny"):
        config.data.source = d(dict(name="coloured_blocks", num_frames=4, num_examples=32))
        config.data.splits = d(dict(train="train", validation="validation", test="test"))
        config.data.batches.update(dict(image_size=32, num_frames=4))
        small = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1)
        config.first_stage.update(small | dict(weights="random"))
        embedders = config.conditioning.embedders
        tower = dict(width=32, num_layers=1, num_heads=2, mlp_dim=64, projection_dim=32)
        embedders.clip.update(tower | dict(weights="random"))
        embedders.frame.update(small | dict(weights="random"))
        embedders.noise.outdim = 16
        if has_angles:
            for name in ("polars_rad", "azimuths_rad"):
                embedders[name].update(dict(outdim=16, frames=4))
        config.model.update(
            dict(
                model_channels=32,
                channel_mult=(1, 2),
                num_res_blocks=1,
                attention_resolutions=(2,),
                num_head_channels=16,
                context_dim=32,
                adm_in_channels=3 * 16 if has_angles else 16,
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
