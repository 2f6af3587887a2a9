"""Configs that train a first stage -> the sections of ours that there are for it."""

from diffusion_jax.convert.yaml_parts import Sections, convert_first_stage
from diffusion_jax.convert.yaml_reading import NUMBER, Node
from diffusion_jax.convert.yaml_tables import (
    GAUSSIAN_STAGES,
    OF_TRAINING,
    QUANTISED_STAGES,
    TRAINING,
)
from diffusion_jax.convert.yaml_training import (
    Picture,
    convert_data,
    convert_loop,
    convert_trainer,
)

FIRST_STAGE_MODELS = (*GAUSSIAN_STAGES, *QUANTISED_STAGES, "AutoencodingEngine")


def convert_first_stage_model(root: Node) -> tuple[Sections, list[str]]:
    """Convert the config of an autoencoder: its network, data, optimizer and loop.

    There is no section for its loss; the whole of it is listed as without a counterpart.
    """
    model = root.child("model")
    kind, params = model.target(), model.child("params")
    stage = convert_first_stage(model)
    assert stage is not None  # IdentityFirstStage is no model
    for key in OF_TRAINING:
        params.note(key, TRAINING)
    trainer = convert_trainer(root)
    channels = stage["in_channels"] if "in_channels" in stage else 3
    side = stage["resolution"] if "resolution" in stage else None
    data, chosen = convert_data(root.child("data"), Picture(side, channels, False, False))
    rate = model.take("base_learning_rate", 4.5e-6, NUMBER)
    # latent-diffusion sets its own decay rates, generative-models takes torch's.
    betas = {} if kind == "AutoencodingEngine" else {"b1": 0.5, "b2": 0.9}
    optimizer = {"name": "adam", "learning_rate": rate, **betas, "ema_decay": None}
    loop, more = convert_loop(root, trainer, None, None)
    if kind != "AutoencodingEngine" and trainer.batch_size is not None:
        loop["train"]["scale_lr"] = True
    sections: Sections = {
        "seed": 0,
        "data": data,
        "first_stage": stage,
        "optimizer": optimizer,
        "lr_schedule": {"name": "constant"},
    }
    model.note("target", f"{kind}: {TRAINING}")
    return sections | loop, ([] if chosen is None else [chosen]) + more
