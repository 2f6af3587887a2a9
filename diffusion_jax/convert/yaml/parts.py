"""Networks, noise levels, losses and samplers of a YAML config -> sections of ours."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusion_jax.convert.yaml import tables, video_tables
from diffusion_jax.convert.yaml.reading import Node
from diffusion_jax.convert.yaml.rows import Table, convert_class, convert_options

Sections = dict[str, Any]
# Transformers of this depth are scanned: they compile in a third of the time (docs/performance.md).
DEEP = 4


class NoiseLevels(NamedTuple):
    """The sections `schedule` and `denoiser`, and the table of noise levels behind them, if any."""

    sections: Sections
    levels: Mapping[str, Any] | None = None
    num_idx: int | None = None


def convert_unet(node: Node, *, ldm: bool) -> Sections:
    """Convert a network_config or unet_config, without in_channels, to the section `model`."""
    params = node.child("params")
    if node.class_name() in video_tables.NETWORKS:
        name, options = video_tables.NETWORKS[node.target()]
        model = {"name": name} | convert_options(params, options)
    else:
        node.expect("UNetModel", "{} is no network of ours; its options are read as a UNet's")
        model = {"name": "unet"} | convert_options(params, tables.UNET)
        if params.take("use_spatial_transformer", False) if ldm else True:
            model["use_spatial_transformer"] = True
    _keep_levels(model, params)
    context_dim = params.take("context_dim", None, (int, tuple))
    if context_dim is not None:
        widths = set(context_dim) if isinstance(context_dim, tuple) else {context_dim}
        model["context_dim"] = widths.pop() if len(widths) == 1 else context_dim
    # `legacy` changes something only where num_head_channels is given.
    matters = params.has("num_head_channels") and "use_spatial_transformer" in model
    if ldm and (params.has("legacy") or matters):
        model["legacy"] = params.take("legacy", True)
    if params.take("use_checkpoint", False):
        model["remat"] = "full"
    depth = params.take("transformer_depth", 1, (int, tuple))
    if "video" in model["name"] or "view" in model["name"]:
        model["transformer_depth"] = depth
    depths = depth if isinstance(depth, tuple) else (depth,)
    if not all(isinstance(one, int) for one in depths):
        raise ValueError(f"{params.at('transformer_depth')} = {depth!r} should be whole numbers")
    if max(depths, default=1) >= DEEP:
        model["scan"] = True
    if params.take("use_fp16", None):
        params.note("use_fp16", "bfloat16 stands in its place: it needs no scaling of the loss")
    if params.take("use_bf16", False) or params.peek("use_fp16"):
        model["dtype"] = "bfloat16"
    return model


def _keep_levels(model: Sections, params: Node) -> None:
    """Leave out resolutions of attention that the network does not have, as the originals do.

    They are refused in a config of ours, where they are a mistake.
    """
    levels, wanted = model.get("channel_mult", ()), model.get("attention_resolutions", ())
    if wanted and not {*wanted} & {2**level for level in range(len(levels))}:
        model["attention_resolutions"] = ()
        params.note(
            "attention_resolutions",
            f"{list(wanted)} names no level of this network, so none but the middle has attention",
        )


def convert_first_stage(node: Node) -> Sections | None:
    """Convert a first_stage_config to `first_stage`; None where the network works on pixels."""
    name, params = node.target("IdentityFirstStage"), node.child("params")
    if name == "IdentityFirstStage":
        return None
    stage: Sections = {"name": "autoencoder_kl"}
    if name == "AutoencodingEngine":
        return stage | _engine_stage(params) | {"weights": params.take("ckpt_path", None)}
    codes, single_z = {}, {}
    if name in tables.QUANTISED_STAGES:
        stage["name"] = "autoencoder_vq"
        codes, single_z = tables.CODES, tables.SINGLE_Z
    stage |= convert_options(params, {**tables.AUTOENCODER, **codes})
    stage |= convert_options(params.child("ddconfig"), {**tables.DDCONFIG, **single_z})
    if name == "AutoencoderLegacyVQ":
        node.note("target", "latents are those before quantisation here; decoding quantises them")
    elif name == "AutoencoderKLModeOnly":
        node.note("target", "latents are samples here, not modes")
    elif name not in (*tables.GAUSSIAN_STAGES, *tables.QUANTISED_STAGES):
        node.note("target", f"{name} is no first stage of ours; it is read as AutoencoderKL")
    for key in ("lossconfig", "loss_config"):
        if params.has(key) and params.child(key).target() not in ("Identity", "DummyLoss"):
            params.note(key, tables.FROZEN)
    return stage | {"weights": stage.get("weights")}


def convert_coders(params: Node, table: Table) -> Sections:
    """Convert the encoder and the decoder of an AutoencodingEngine, which has no quant_conv."""
    encoder, decoder = (params.child(f"{part}_config") for part in ("encoder", "decoder"))
    own, others = encoder.child("params"), decoder.child("params")
    if encoder.class_name() == "Identity":
        encoder.target()
        found = convert_options(others, table) | {"decoder_only": True}
    else:
        encoder.expect("Encoder", "it is read as Encoder")
        found = convert_options(own, table)
    if decoder.class_name() == "VideoDecoder":
        decoder.target()
        video = {"name": "autoencoder_video"}
        found |= video | convert_options(others, video_tables.VIDEO_DECODER)
    else:
        decoder.expect("Decoder", "it is read as Decoder")
        width = {"embed_dim": found.get("z_channels", 4)}
        found = {**width, **found, "use_quant_conv": False}
    for key in others.values:
        if "decoder_only" not in found and key not in video_tables.VIDEO_DECODER:
            if others.take(key, None) != own.peek(key):
                others.note(key, "encoder and decoder have the same options here")
    return found


def _engine_stage(params: Node) -> Sections:
    regularizer = params.child("regularizer_config")
    is_gaussian = regularizer.expect(
        "DiagonalGaussianRegularizer",
        "without quant_conv first stages have a Gaussian posterior here",
    )
    if is_gaussian and not regularizer.child("params").take("sample", True):
        regularizer.child("params").note("sample", "latents are samples here, not modes")
    for key in ("loss_config", "optimizer_config", "monitor", "input_key", "ema_decay"):
        if key != "loss_config" or params.child(key).target("Identity") != "Identity":
            params.note(key, tables.FROZEN)
    return convert_coders(params, tables.DDCONFIG)


def convert_denoiser(node: Node) -> NoiseLevels:
    """Convert a denoiser_config; levels of a linear schedule become the section `schedule`."""
    params = node.child("params")
    denoiser = convert_class(node, tables.DENOISERS, "denoiser") or {"name": "discrete"}
    scaling = convert_class(params.child("scaling_config"), tables.SCALINGS, "scaling")
    scaling = scaling or {"name": "eps"}
    if denoiser["name"] == "continuous":
        return NoiseLevels({"denoiser": {"name": "continuous", "scaling": scaling}})
    levels = _levels(params)
    num_idx = denoiser.pop("num_idx", 1000)
    denoiser["scaling"] = scaling
    # A zero_snr table of eps says nothing of x_0 at its end, which a schedule refuses.
    is_zero = levels["name"] == "zero_snr" and scaling["name"] == "v"
    if not (is_zero or levels["name"] == "legacy_ddpm") or levels["num_timesteps"] != num_idx:
        denoiser["discretization"] = {**levels, "num_idx": num_idx}
        return NoiseLevels({"denoiser": denoiser}, levels, num_idx)
    schedule: Sections = {
        "name": "linear",
        "num_timesteps": num_idx,
        "linear_start": levels["linear_start"],
        "linear_end": levels["linear_end"],
    }
    if is_zero:
        schedule["rescale_zero_snr"] = True
    if denoiser.get("quantize_c_noise", True) and scaling["name"] in ("eps", "v"):
        schedule["parameterization"] = scaling["name"]
        return NoiseLevels({"schedule": schedule}, levels, num_idx)
    if is_zero:  # the schedule itself predicts v, for which there is this table
        schedule["parameterization"] = "v"
    return NoiseLevels({"schedule": schedule, "denoiser": denoiser}, levels, num_idx)


def convert_loss(node: Node, noise: NoiseLevels) -> Sections:
    """Convert a loss_fn_config to `loss`, `sigma_sampling` and `weighting` (None if unknown)."""
    params = node.child("params")
    loss = convert_class(node, tables.LOSSES, "loss") or {"name": "denoiser"}
    kind = params.take("loss_type", "l2")
    if kind not in ("l2", "l1"):
        params.note("loss_type", f"{kind}: choose l2, l1 or huber")
        kind = "l2"
    sampler = params.child("sigma_sampler_config")
    sampling = convert_class(sampler, tables.SIGMA_SAMPLINGS, "sigma sampling")
    if sampling is not None and sampling["name"] == "discrete":
        levels = _levels(sampler.child("params"))
        if (levels, sampling["num_idx"]) == (noise.levels, noise.num_idx):
            sampling = {"name": "discrete"}
        else:
            sampling["discretization"] = levels
    weighting = params.child("loss_weighting_config")
    return {
        "loss": {"name": "denoiser", "loss_type": kind} | loss,
        "sigma_sampling": sampling,
        "weighting": convert_class(weighting, tables.WEIGHTINGS, "weighting"),
    }


def convert_sampler(node: Node, noise: NoiseLevels) -> Sections:
    """Convert a sampler_config to `sampler`, `discretization` and `guidance`, as far as it says."""
    params = node.child("params")
    sections: Sections = {}
    sampler = convert_class(node, tables.SAMPLERS, "sampler")
    if sampler is not None:
        sections = {"sampler": sampler, "guidance": {"name": "none"}}
    if params.has("discretization_config"):
        levels = _levels(params)
        if levels != noise.levels or "schedule" not in noise.sections:
            sections["discretization"] = levels
    if params.has("guider_config"):
        guiders = tables.GUIDERS | video_tables.GUIDERS
        guider = convert_class(params.child("guider_config"), guiders, "guider")
        sections["guidance"] = guider or {"name": "none"}
    return sections


def _levels(params: Node) -> dict[str, Any]:
    node = params.child("discretization_config")
    found = convert_class(node, tables.DISCRETIZATIONS, "discretization")
    return found or {"name": "legacy_ddpm", **tables.LEGACY_LEVELS}
