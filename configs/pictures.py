"""Your own pictures: any folder as it is, by class, from captions, or neither, at 32 px or 64 px.

python launch.py --config=configs/pictures.py --config.data.source.folder=~/pictures
python launch.py --config=configs/pictures.py:tiny --config.data.source.folder=~/pictures

The folder is looked at first, and one line says what it holds: sub-folders are classes, captions
come from .txt files, metadata.jsonl or metadata.csv (docs/data.md), and so do the numbers repeats
and weight. Hardware: on a CPU 32 px and
5 M parameters (14 M with captions), on a GPU or TPU 64 px and 20 M (34 M); every value can be
overridden. Time: not measured; 5,000 steps of 16 on a CPU are 1.5e14 FLOP, half an hour on one core
at 100 GFLOP/s; 20,000 steps of 64 on a GPU are 4e16, minutes on an H100 at 40 % of its peak.
Result: not measured. A few dozen pictures are learned by heart; a thousand or more make new ones.

EDM (Karras et al. 2022), as in configs/emoji.py.
"""

import ml_collections

from diffusion_jax.experiment.config.looking import hold_out, is_given, look_at, on_accelerator

VARIANTS = ("tiny",)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    large = on_accelerator() and variant != "tiny"
    d = ml_collections.ConfigDict
    config = d()
    config.seed = 0

    config.data = d(
        dict(
            source=dict(name="image_folder", folder="set me"),
            splits=dict(train="train", validation="validation"),
            batches=dict(image_size=64 if large else 32, channels=3),
        )
    )
    config.model = d(
        dict(
            name="unet",
            patch_size=2,
            model_channels=128 if large else 64,
            channel_mult=(1, 2, 2),
            num_res_blocks=1,
            attention_resolutions=(2, 4),
            num_head_channels=32,
            use_scale_shift_norm=True,
        )
    )
    config.schedule = d(dict(name="linear"))  # of the pictures of the forward process only
    config.denoiser = d(dict(name="continuous", scaling=dict(name="edm", sigma_data=0.5)))
    config.discretization = d(dict(name="edm", sigma_min=0.002, sigma_max=80.0, rho=7.0))
    config.loss = d(dict(name="denoiser", stratified=True))
    config.sigma_sampling = d(dict(name="lognormal", p_mean=-1.2, p_std=1.2))
    config.weighting = d(dict(name="edm", sigma_data=0.5))
    config.sampler = d(dict(name="dpmpp_2m", num_steps=25))
    config.guidance = d(dict(name="none"))

    config.optimizer = d(
        dict(
            name="adamw",
            learning_rate=5e-4 if large else 1e-3,
            b2=0.99,
            weight_decay=0.01,
            gradient_clip_norm=1.0,
            ema_decay=0.999,
        )
    )
    config.train = d(dict(num_steps=20_000 if large else 5_000, batch_size=64 if large else 16))
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
            images=dict(batch_frequency=500, max_images=8),
            validation=dict(every=500),
        )
    )
    config.checkpoint = d(dict(every=500, keep_last=1))

    if variant == "tiny":
        config.model.update(dict(model_channels=32, channel_mult=(1,), attention_resolutions=(1,)))
        config.train.update(dict(num_steps=4, batch_size=8))
        config.lr_schedule.warmup_steps = 2
        config.sampler.num_steps = 4
        config.hooks.scalars.every = 2
        config.hooks.images.batch_frequency = 4
        config.hooks.validation.every = 4
        config.checkpoint.every = 4
    return config


def finish(config: ml_collections.ConfigDict, given: list[str]) -> None:
    """Use the conditions and numbers that the folder holds, unless the command line says others."""
    found = look_at(config.data.source.to_dict())
    if found is None:
        return
    hold_out(config, given)
    for name in found.numbers:
        if not is_given(f"data.batches.{name}_key", given):
            config.data.batches[f"{name}_key"] = name
    if any(key.startswith("conditioning") for key in given):
        return
    tiny = config.model.model_channels == 32
    if found.has_captions:
        text = dict(name="transformer_text", num_layers=2, max_length=77, ucg_rate=0.1)
        size = dict(width=32, num_heads=1) if tiny else dict(width=128, num_heads=4, head_dim=32)
        config.conditioning = dict(key="crossattn", embedders=dict(text=text | size))
        config.model.update(dict(use_spatial_transformer=True, use_linear_in_transformer=True))
    elif found.classes:
        label = dict(name="class_label", num_classes=len(found.classes), ucg_rate=0.1)
        config.conditioning = dict(key="adm", embedders=dict(label=label))
    if (found.has_captions or found.classes) and not any(k.startswith("guidance") for k in given):
        config.guidance = dict(name="cfg", scale=2.0)
