"""SV4D: a moving object from eight more sides, 5 times of 8 views of 576 x 576 px a window.

python launch.py sample --checkpoint=sv4d.safetensors --config=configs/sv4d.py \\
    --image=object.mp4 --orbit=sv3d_u.safetensors
python launch.py sample --checkpoint=sv4d2.safetensors --config=configs/sv4d.py:2 --image=object.mp4
python launch.py --config=configs/sv4d.py --config.data.source.folder=~/objects \\
    --config.train.ckpt_path=sv4d.safetensors                  # fine-tune the released weights
python launch.py --config=configs/sv4d.py:2_tiny               # the same code in seconds
python launch.py plan --config=configs/sv4d.py:2               # memory and time of a step

21 frames of an object on white, or with an opacity, become as many from all other sides. The
default goes on from an orbit of SV3D around the first frame; variant "2" is SV4D 2 with 12 times of
4 views, "2_8views" with 5 times of 8. 2.00 B parameters.

Training takes a folder of objects, each with a video from every side and the angles of the cameras
(docs/video.md). The first view is the one that is given, the others at the first time are known;
their pictures are lost together, and SV4D 2 also learns to begin without the other views.

Hardware: to draw a GPU with 80 GB, to train a GPU or TPU pod. Time: not measured. Result: not
measured.
"""

import ml_collections

VARIANTS = ("2", "2_8views", "tiny", "2_tiny")
# Times and views of a window.
WINDOWS = {"": (5, 8), "2": (12, 4), "2_8views": (5, 8), "tiny": (2, 2), "2_tiny": (3, 2)}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    d = ml_collections.ConfigDict
    config = d()
    config.seed = 0

    times, views = WINDOWS[variant]
    is_second = variant.startswith("2")
    frames = times * views
    config.data = d(
        dict(
            source=dict(name="view_folder", folder="set me", num_frames=2 * times),
            splits=dict(train="train"),
            batches=dict(image_size=576, channels=3, num_frames=frames),
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
    angle = dict(name="numbers", size=1, outdim=512, frames=frames)
    # Guidance needs clips that have lost all of this.
    lost = dict(ucg_rate=0.1, ucg_group="video")
    encoder = dict(name="encoded_frames", weights=None)
    config.conditioning = d(
        dict(
            key="hybrid-adm",
            frame_noise=(-11.5, 0.0),  # almost none, as the released weights expect
            object_share=0.9 if is_second else 0.917,
            first_views="drawn" if is_second else "orbit",
            # The released weights expect the features in this order.
            order=("clip", "frame", "polar", "azimuth", "view", "motion"),
            embedders=dict(
                clip=dict(
                    name="open_clip_image",
                    input_key="cond_frames_without_noise",
                    tower="ViT-H-14",
                    frames=times,
                    weights=None,
                    **lost,
                ),
                frame=dict(
                    input_key="cond_frames",
                    frames=times,
                    copies=views,
                    level_dim=256,
                    **encoder,
                    **lost,
                ),
                polar=dict(input_key="polar_rad", **angle),
                azimuth=dict(input_key="azimuth_rad", **angle),
                view=dict(
                    input_key="cond_view",
                    frames=views,
                    entry="cond_view",
                    # SV4D 2 draws its first window without them, and the others with them.
                    **(lost | dict(ucg_rate=0.5 if is_second else 0.1)),
                    **encoder,
                ),
                motion=dict(
                    input_key="cond_motion",
                    frames=times,
                    entry="cond_motion",
                    **encoder,
                    **lost,
                ),
            ),
        )
    )
    config.model = d(
        dict(
            name="multiview_unet",
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
            adm_in_channels=1280,
            motion_context_dim=4,
            extra_ff_mix_layer=True,
            time_block_merge_strategy="learned_with_images",
            time_block_merge_factor=0.0,
            time_kernel_size=(3, 1, 1),
            use_camera_emb=is_second,
            use_3d_attention=variant in ("2", "2_tiny"),
            separate_motion_merge_factor=is_second,
            dtype="bfloat16",
            remat="full",
        )
    )
    config.denoiser = d(dict(name="continuous", scaling=dict(name="v_edm")))
    config.loss = d(dict(name="denoiser"))
    config.sigma_sampling = d(dict(name="lognormal", p_mean=0.7, p_std=1.6))
    config.discretization = d(dict(name="edm", sigma_min=0.002, sigma_max=700.0))
    config.sampler = d(dict(name="euler", num_steps=50 if is_second else 20))
    if variant in ("2", "2_tiny"):
        config.guidance = d(dict(name="linear", scale=2.0, min_scale=1.0))
    else:
        scales = dict(scale=2.5, min_scale=1.5) if variant == "2_8views" else dict(scale=2.0)
        config.guidance = d(dict(name="spatiotemporal", num_views=views, **scales))

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
        blocks = dict(num_frames=2 * times, num_views=1 + views, num_examples=32)
        config.data.source = d(dict(name="coloured_blocks", **blocks))
        config.data.splits = d(dict(train="train", validation="validation", test="test"))
        config.data.batches.update(dict(image_size=32, num_frames=frames))
        small = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1)
        config.first_stage.update(small | dict(weights="random"))
        embedders = config.conditioning.embedders
        tower = dict(width=32, num_layers=1, num_heads=2, mlp_dim=64, projection_dim=32)
        embedders.clip.update(tower | dict(weights="random"))
        for name in ("frame", "view", "motion"):
            embedders[name].update(small | dict(weights="random"))
        embedders.frame.level_dim = 16
        embedders.polar.outdim = embedders.azimuth.outdim = 16
        config.model.update(
            dict(
                model_channels=32,
                channel_mult=(1, 2),
                num_res_blocks=1,
                attention_resolutions=(2,),
                num_head_channels=16,
                context_dim=32,
                adm_in_channels=3 * 16,
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
