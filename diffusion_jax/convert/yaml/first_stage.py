"""Configs that train a first stage (AutoencoderKL, VQModel, AutoencodingEngine) -> our sections."""

from diffusion_jax.convert.yaml import first_stage_tables as tables
from diffusion_jax.convert.yaml.parts import Sections, convert_coders
from diffusion_jax.convert.yaml.reading import NUMBER, Node
from diffusion_jax.convert.yaml.rows import convert_class, convert_options
from diffusion_jax.convert.yaml.tables import GAUSSIAN_STAGES, QUANTISED_STAGES
from diffusion_jax.convert.yaml.training import (
    Picture,
    Trainer,
    convert_data,
    convert_loop,
    convert_optimizer,
    convert_scheduler,
    convert_trainer,
)

ENGINE = "AutoencodingEngine"
FIRST_STAGE_MODELS = (*GAUSSIAN_STAGES, *QUANTISED_STAGES, ENGINE)


def convert_first_stage_model(root: Node) -> Sections:
    """Convert the config of an autoencoder."""
    model = root.child("model")
    kind, params = model.target(), model.child("params")
    is_ldm = not model.peek("target").startswith("sgm.")
    network = _network(params, kind)
    regularizer = _regularizer(params, kind, network)
    losses = _losses(params, kind, is_ldm)
    trainer = convert_trainer(root)
    picture = Picture(network.get("resolution"), network.get("in_channels", 3))
    data = convert_data(root.child("data"), picture)
    optimizers = _optimizers(model, params, is_ldm)
    schedule = convert_scheduler(params.child("scheduler_config"))
    monitor = _monitor(params, trainer, optimizers["optimizer"]["ema_decay"] is not None)
    loop = convert_loop(root, trainer, monitor, is_ldm=is_ldm)
    # The weight of the adversary is one number for a batch, which therefore stays in one piece.
    if loop["train"].pop("accumulate", 1) > 1:
        options = root.child("lightning").child("trainer")
        options.note("accumulate_grad_batches", "a batch of the same size is taken in one piece")
    return {
        "data": data,
        "model": network | trainer.dtype,
        "regularizer": regularizer,
        **losses,
        **optimizers,
        "lr_schedule": schedule,
        **loop,
    }


def _network(params: Node, kind: str) -> Sections:
    network: Sections = {"name": "autoencoder"} | convert_options(params, tables.MODEL)
    for part, bad in (("encoder", "Identity"), ("decoder", "VideoDecoder")):
        node = params.child(f"{part}_config")
        if node.class_name() == bad:
            raise ValueError(
                f"{node.at('target')} = {node.peek('target')!r} should be the {part} of images: "
                "for a first stage of videos start from configs/svd_decoder.py"
            )
    if kind == ENGINE:
        return network | convert_coders(params, tables.NETWORK)
    return network | convert_options(params.child("ddconfig"), tables.NETWORK)


def _regularizer(params: Node, kind: str, network: Sections) -> Sections:
    if kind in QUANTISED_STAGES:
        # latent-diffusion has beta on the codebook's side (`legacy`), as its released weights do.
        legacy = {"legacy": True} if kind != "AutoencoderLegacyVQ" else {}
        codes = params.take("n_embed", kind=int)
        return {"name": "vq", "num_codes": codes, "beta": 0.25, **legacy}
    if kind == ENGINE:
        node = params.child("regularizer_config")
        return convert_class(node, tables.REGULARIZERS, "regularizer") or {"name": "kl"}
    if not network["double_z"]:
        raise ValueError(f"{params.at('ddconfig.double_z')} = False should be True for {kind}")
    return {"name": "kl"}


def _losses(params: Node, kind: str, is_ldm: bool) -> Sections:
    """Convert the loss to `loss`, `discriminator` and `perceptual`."""
    node = params.child("lossconfig" if params.has("lossconfig") else "loss_config")
    options = node.child("params")
    schedule = {"schedule": "both" if is_ldm else "alternate"}
    discriminator: Sections = {"name": "patchgan"}
    if not node.values or node.target() in ("Identity", "DummyLoss"):
        loss: Sections = {"name": "autoencoder", "disc_start": 50_001, "disc_weight": 0.5}
        weights = {"loss/vq": 1.0} if kind in QUANTISED_STAGES else {"kl_loss": 1e-6}
        loss["regularization_weights"] = weights
        params.chosen.append(
            "the loss is latent-diffusion's: L1, LPIPS and, from step 50,001, an adversary"
        )
    else:
        loss = convert_class(node, tables.LOSSES, "loss") or {
            "name": "autoencoder",
            "disc_start": 0,
        }
        if "regularization_weights" in loss:
            loss["regularization_weights"] = dict(options.child("regularization_weights").values)
        if node.target() == "LPIPSWithDiscriminator":
            weight = options.take("kl_weight", 1.0, NUMBER)
            loss["regularization_weights"] = {"kl_loss": weight}
        elif node.target() == "VQLPIPSWithDiscriminator":
            weight = options.take("codebook_weight", 1.0, NUMBER)
            loss |= {"reduction": "mean", "regularization_weights": {"loss/vq": weight}}
        if params.take("learn_logvar", False):
            loss["learn_logvar"] = True
        own = options.child("discriminator_config")
        found = convert_class(own, tables.DISCRIMINATORS, "discriminator") or discriminator
        discriminator = found | convert_options(options, tables.DISC_OF_LOSS)
    return {
        "loss": loss | schedule,
        "discriminator": discriminator,
        "perceptual": {"name": "lpips", "net": "vgg16", "weights": None},
    }


def _optimizers(model: Node, params: Node, is_ldm: bool) -> Sections:
    """Convert rates and decays: latent-diffusion has its own, generative-models takes torch's."""
    rate = model.take("base_learning_rate", 4.5e-6, NUMBER)
    factor = params.take("lr_g_factor", 1.0, NUMBER)
    decay = params.take("ema_decay", None, NUMBER)
    if params.take("use_ema", False) and decay is None:
        decay = 0.9999
    otherwise = {"name": "adam"} | ({"b1": 0.5, "b2": 0.9} if is_ldm else {})
    own = convert_optimizer(params.child("optimizer_config"), rate * factor, otherwise)
    sections = {"optimizer": own | {"ema_decay": decay}}
    if factor != 1.0:
        sections["disc_optimizer"] = own | {"learning_rate": rate}
    return sections


def _monitor(params: Node, trainer: Trainer, has_ema: bool) -> str | None:
    monitor = params.take("monitor", None, str)
    if monitor is None:
        return None
    if not trainer.is_validated:
        params.note("monitor", "there is no validation: set data.splits.validation first")
        return None
    name = tables.MONITORS[monitor] if monitor in tables.MONITORS else monitor
    return f"{name}_ema" if has_ema and not name.endswith("_ema") else name
