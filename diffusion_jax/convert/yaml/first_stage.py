"""Configs that train a first stage (AutoencoderKL, VQModel, AutoencodingEngine) -> sections of
ours."""

from typing import Any

from diffusion_jax.convert.yaml import first_stage_tables as tables
from diffusion_jax.convert.yaml.lightning_tables import OPTIMIZERS
from diffusion_jax.convert.yaml.parts import Sections, convert_scheduler
from diffusion_jax.convert.yaml.reading import NUMBER, Node
from diffusion_jax.convert.yaml.rows import convert_class, convert_options
from diffusion_jax.convert.yaml.tables import DDCONFIG, GAUSSIAN_STAGES, QUANTISED_STAGES
from diffusion_jax.convert.yaml.training import (
    Picture,
    Trainer,
    convert_data,
    convert_loop,
    convert_trainer,
)

ENGINE = "AutoencodingEngine"
FIRST_STAGE_MODELS = (*GAUSSIAN_STAGES, *QUANTISED_STAGES, ENGINE)


def convert_first_stage_model(root: Node) -> tuple[Sections, list[str]]:
    """Convert the config of an autoencoder; returns what was chosen, too."""
    model = root.child("model")
    kind, params = model.target(), model.child("params")
    is_ldm = not model.peek("target").startswith("sgm.")
    network = _network(params, kind)
    regularizer = _regularizer(params, kind, network)
    sections, chosen = _losses(params, kind, is_ldm)
    sections |= {"model": network, "regularizer": regularizer}
    trainer = convert_trainer(root)
    if trainer.half_precision:
        network["dtype"] = "bfloat16"
    channels = network["in_channels"] if "in_channels" in network else 3
    side = network["resolution"] if "resolution" in network else None
    sections["data"], more = convert_data(root.child("data"), Picture(side, channels, False, False))
    chosen += [] if more is None else [more]
    sections |= _optimizers(model, params, is_ldm)
    sections["lr_schedule"] = convert_scheduler(params.child("scheduler_config"))
    decay = sections["optimizer"]["ema_decay"]
    monitor = _monitor(params, trainer, decay is not None)
    loop, more = convert_loop(root, trainer, monitor, None)
    # The weight of the adversary is one number for a batch, which therefore stays in one piece.
    if loop["train"].pop("accumulate", 1) > 1:
        options = root.child("lightning").child("trainer")
        options.note("accumulate_grad_batches", "a batch of the same size is taken in one piece")
    if is_ldm and trainer.batch_size is not None:
        loop["train"]["scale_lr"] = True
    loop["train"]["ckpt_path"] = params.take("ckpt_path", None)
    return {"seed": 0} | sections | loop, chosen + more


def _network(params: Node, kind: str) -> Sections:
    network: Sections = {"name": "autoencoder"} | convert_options(params, tables.MODEL)
    table = {key: row for key, row in DDCONFIG.items() if key != "double_z"}
    if kind != ENGINE:
        own = params.child("ddconfig")
        return network | convert_options(own, table) | {"double_z": own.take("double_z", True)}
    encoder, decoder = (params.child(f"{part}_config") for part in ("encoder", "decoder"))
    for part, wanted in ((encoder, "Encoder"), (decoder, "Decoder")):
        if part.target(wanted) != wanted:
            part.note("target", f"it is read as {wanted}")
    own, others = encoder.child("params"), decoder.child("params")
    found = convert_options(own, table)
    for key in others.values:
        others.take(key)
        if others.peek(key) != own.peek(key):
            others.note(key, "encoder and decoder have the same options here")
    embed_dim = found["z_channels"] if "z_channels" in found else 4
    double_z = own.take("double_z", True)
    return network | {
        "embed_dim": embed_dim,
        **found,
        "double_z": double_z,
        "use_quant_conv": False,
    }


def _regularizer(params: Node, kind: str, network: Sections) -> Sections:
    if kind in QUANTISED_STAGES:
        # latent-diffusion has beta on the codebook's side (`legacy`), as its released weights do.
        legacy = {"legacy": True} if kind != "AutoencoderLegacyVQ" else {}
        codes = params.take("n_embed", kind=int)
        return {"name": "vq", "num_codes": codes, "beta": 0.25, **legacy}
    if kind != ENGINE:
        if not network["double_z"]:
            raise ValueError(f"{params.at('ddconfig.double_z')} = False should be True for {kind}")
        return {"name": "kl"}
    node = params.child("regularizer_config")
    if not node.values:
        return {"name": "kl"}
    return convert_class(node, tables.REGULARIZERS, "regularizer") or {"name": "kl"}


def _losses(params: Node, kind: str, is_ldm: bool) -> tuple[Sections, list[str]]:
    """Convert the loss to `loss`, `discriminator` and `perceptual`."""
    at = "lossconfig" if params.has("lossconfig") else "loss_config"
    node = params.child(at)
    schedule = {"schedule": "both" if is_ldm else "alternate"}
    perceptual = {"name": "lpips", "net": "vgg16", "weights": None}
    discriminator: Sections = {"name": "patchgan"}
    if not node.values or node.target() in ("Identity", "DummyLoss"):
        loss: Sections = {"name": "autoencoder", "disc_start": 50_001, "disc_weight": 0.5}
        weights = {"loss/vq": 1.0} if kind in QUANTISED_STAGES else {"kl_loss": 1e-6}
        loss |= {"regularization_weights": weights}
        chosen = ["the loss is latent-diffusion's: L1, LPIPS and, from step 50,001, an adversary"]
        sections = {"loss": loss | schedule, "discriminator": discriminator}
        return sections | {"perceptual": perceptual}, chosen
    options = node.child("params")
    found = convert_class(node, tables.LOSSES, "loss") or {"name": "autoencoder", "disc_start": 0}
    if "regularization_weights" in found:
        found["regularization_weights"] = dict(found["regularization_weights"])
    if node.target() == "LPIPSWithDiscriminator":
        weight = options.take("kl_weight", 1.0, NUMBER)
        found["regularization_weights"] = {"kl_loss": weight}
    elif node.target() == "VQLPIPSWithDiscriminator":
        weight = options.take("codebook_weight", 1.0, NUMBER)
        found |= {"reduction": "mean", "regularization_weights": {"loss/vq": weight}}
    if params.take("learn_logvar", False):
        found["learn_logvar"] = True
    own = options.child("discriminator_config")
    if own.values:
        discriminator = convert_class(own, tables.DISCRIMINATORS, "discriminator") or discriminator
    discriminator |= convert_options(options, tables.DISC_OF_LOSS)
    sections = {"discriminator": discriminator, "perceptual": perceptual}
    return sections | {"loss": found | schedule}, []


def _optimizers(model: Node, params: Node, is_ldm: bool) -> dict[str, Any]:
    """Convert rates and decays: latent-diffusion has its own, generative-models takes torch's."""
    rate = model.take("base_learning_rate", 4.5e-6, NUMBER)
    factor = params.take("lr_g_factor", 1.0, NUMBER)
    decay = params.take("ema_decay", None, NUMBER)
    if params.take("use_ema", False):
        decay = 0.9999 if decay is None else decay
    optimizer: Sections = {"name": "adam"}
    optimizer |= {"b1": 0.5, "b2": 0.9} if is_ldm else {}
    node = params.child("optimizer_config")
    if node.values:
        optimizer = convert_class(node, OPTIMIZERS, "optimizer") or optimizer
        betas = node.child("params").take("betas", None, tuple)
        if betas is not None and len(betas) != 2:
            raise ValueError(f"{node.at('params.betas')} = {betas} should be two numbers")
        if betas is not None:
            optimizer |= {"b1": betas[0], "b2": betas[1]}
    own = {"name": optimizer.pop("name"), "learning_rate": rate * factor} | optimizer
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
