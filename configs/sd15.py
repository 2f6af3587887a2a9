"""Stable Diffusion 1.5: text to image at 512 px in latents of an autoencoder, 860 M parameters.

python launch.py --config=configs/sd15.py --config.data.source.folder=~/pictures \
    --config.train.ckpt_path=v1-5-pruned.safetensors           # fine-tune the released weights
python launch.py sample --checkpoint=v1-5-pruned.safetensors --config=configs/sd15.py \
    --prompt="a red fox"
python launch.py --config=configs/sd15.py:tiny                 # the same code in seconds
python launch.py --config=configs/sd15.py:control --config.data.source.folder=~/pictures \
    --config.train.ckpt_path=v1-5-pruned.safetensors           # a ControlNet for edges

Hardware: one 80 GB GPU holds a batch of 16. Time: not measured; 100,000 steps of 16 images are
5.5e18 FLOP, which take 4 hours on an H100 at 40 % of its peak. Result: not measured.

The variant `control` trains a ControlNet of 361 M parameters that sees the edges of an image, and
leaves the released weights as they are; `control_tiny` does so in seconds (docs/fine_tuning.md).

The released file holds the autoencoder and the text encoder, too. The folder holds images beside
.txt files with their captions (docs/data.md).

Two variants read images besides, and are trained from the same weights: sd15.py:inpaint completes
images, with random masks, and sd15.py:edit edits them by an instruction, from pairs of images
(InstructPix2Pix); inpaint_tiny and edit_tiny are the same in seconds. See docs/fine_tuning.md.
"""

import ml_collections

VARIANTS = (
    *("tiny", "control", "control_tiny"),
    *("inpaint", "inpaint_tiny", "edit", "edit_tiny"),
)


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
                    name="clip_text",
                    tower="ViT-L-14",
                    layer="last",
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
            num_heads=8,
            use_spatial_transformer=True,
            transformer_depth=1,
            context_dim=768,
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
    config.guidance = d(dict(name="cfg", scale=7.5))

    config.optimizer = d(
        dict(name="adamw", learning_rate=1e-5, weight_decay=0.01, ema_decay=0.9999)
    )
    config.lr_schedule = d(dict(name="constant", warmup_steps=1000))
    config.train = d(dict(num_steps=100_000, batch_size=16, ckpt_path=None))
    config.hooks = d(dict(scalars=dict(every=50), images=dict(batch_frequency=1000, max_images=4)))
    config.checkpoint = d(dict(every=1000, keep_last=2))

    if variant.startswith("inpaint"):
        make_inpainting(config)
    if variant.startswith("edit"):
        make_editing(config)
    if variant.startswith("control"):
        config.control = d(dict(edges=dict(hint="canny", weights=None)))
        # Without its caption a network has to look at the hint (Zhang et al. 2023, section 3.3).
        config.conditioning.embedders.text.ucg_rate = 0.5

    if variant.endswith("tiny"):
        config.data.source = d(dict(name="openmoji", size=64, max_examples=48))
        config.data.splits = d(dict(train="train", validation="validation", test="test"))
        config.data.batches.image_size = 32
        if variant == "edit_tiny":
            config.data.source.originals = True  # grey emoji, to be coloured
        config.first_stage.update(dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, weights="random"))
        config.conditioning.embedders.text.update(
            dict(width=32, num_layers=2, num_heads=2, mlp_dim=64, weights="random")
        )
        config.model.update(
            dict(
                model_channels=32,
                channel_mult=(1, 2),
                num_res_blocks=1,
                attention_resolutions=(2,),
                num_heads=2,
                context_dim=32,
                dtype="float32",  # XLA's CPU compiler takes a minute over bf16 convolutions
            )
        )
        config.train.update(dict(num_steps=4, batch_size=8))
        config.lr_schedule.warmup_steps = 2
        config.sampler.num_steps = 4
        config.hooks.scalars.every = 2
        config.hooks.images.batch_frequency = 4
        config.checkpoint.every = 4
    return config


def make_inpainting(config: ml_collections.ConfigDict) -> None:
    """Read a mask and the masked image: 9 channels; 5 are new and begin as zeros."""
    config.data.batches.masks = ("boxes", "strokes", "strokes", "everything")
    config.conditioning.key = "hybrid"
    config.conditioning.order = ("mask", "masked_image", "text")
    config.conditioning.embedders.mask = dict(name="inpainting_mask")
    image = dict(name="image_latents", input_key="masked_image")
    config.conditioning.embedders.masked_image = image
    config.train.keep_dims = 4


def make_editing(config: ml_collections.ConfigDict) -> None:
    """Read the image before an edit: 8 channels; 4 are new and begin as zeros."""
    config.data.source.caption = "metadata"  # which names the image before the edit, too
    config.conditioning.key = "hybrid"
    # 5 % of the samples lose the text alone, 5 % both, and 5 % the image alone.
    config.conditioning.embedders.text.update(dict(ucg_rate=0.1, ucg_group="both"))
    config.conditioning.embedders.original = dict(
        name="image_latents",
        input_key="original_image",
        scaled=False,
        ucg_rate=0.1,
        ucg_group="both",
        ucg_from=0.05,
    )
    config.guidance = dict(name="instruct_pix2pix", scale=7.5, image_scale=1.5)
    config.train.keep_dims = 4
