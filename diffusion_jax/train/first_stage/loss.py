"""The loss of a first stage: reconstruction, perceptual distance, regularization, discriminator.

Gradients are taken in pieces. The networks run forward once. The gradients of the two losses nll
and g with respect to the reconstruction go back through the last layer alone, which gives the
adaptive weight; their weighted sum then goes back once through the whole autoencoder.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from diffusion_jax.diffusion.ddpm import expand
from diffusion_jax.diffusion.losses import elementwise_loss, sample_means, weighted_mean
from diffusion_jax.diffusion.schedule import check_choice
from diffusion_jax.train.first_stage.gan_loss import (
    DISC_LOSSES,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    leaf_at,
    mean_logit,
)
from diffusion_jax.train.state import strengthen
from diffusion_jax.types import Batch, Keys, PerSample, PyTree

REDUCTIONS = ("sum", "mean")


class Networks(NamedTuple):
    """The networks of a first stage as functions.

    encode: (params, image [b h w c], dropout_key or None) -> moments.
    regularize: (params, mutable, moments, keys [b], *, train, step) -> (z, log, mutable). log holds
        scalars or [b] by name (kl_loss), which the loss may weigh; mutable is {} for none. step is
        the training step, None in evaluation.
    decode: (params, z, dropout_key or None) -> image. The params of these three are all parameters
        of the autoencoder, codebooks included. A decoder that sees the frames of a clip also takes
        stills [b], which is 1 for frames that are independent images; see with_stills.
    discriminate: (disc_params, mutable, image, *, train) -> (logits [b ...], mutable).
    lpips: (params, x, y) -> [b], each sample on its own; not called with perceptual_weight 0.
    last_layer: the path of the decoder's last kernel in the autoencoder's parameters.
    prepare: (disc_params, image) -> disc_params, before each step; only a discriminator that the
        first batch sets up has one (patchgan.fit_actnorm).
    """

    encode: Callable[..., Array]
    regularize: Callable[..., tuple[Array, Mapping[str, Array], PyTree]]
    decode: Callable[..., Array]
    discriminate: Callable[..., tuple[Array, PyTree]]
    lpips: Callable[..., Array]
    last_layer: tuple[str, ...]
    prepare: Callable[[PyTree, Array], PyTree] | None = None


class AutoencoderLoss(NamedTuple):
    """The options of the loss; the defaults are generative-models'.

    nll = rec / exp(logvar) + logvar, rec = |x - x'| + perceptual_weight lpips(x, x'), and
    total = nll + d_weight disc_factor g + sum_k regularization_weights[k] log[k].

    disc_start: the first value of state.step with a discriminator; before it d_weight and g are 0,
        and the discriminator does not change: it is run for the logged logits only.
    disc_factor: factor of the discriminator in both losses.
    disc_weight: factor of the adaptive weight.
    disc_loss: "hinge" or "vanilla".
    perceptual_weight: factor of LPIPS in rec.
    perceptual_start: the first value of state.step with LPIPS, which is not computed before it.
        Evaluation always has it.
    pixel_loss: "l1", "l2" or "huber".
    reduction: nll over a sample's elements, "sum" (KL) or "mean" (VQ); samples are averaged.
    regularization_weights: by the names of the regularizer's log; others are only logged.

    Latent-diffusion's KL loss has regularization_weights = {"kl_loss": kl_weight}, its VQ loss
    reduction = "mean" and {"loss/vq": codebook_weight}. (It also computes and logs d_weight before
    disc_start, with disc_factor 0; this changes no parameter.)
    Source: generative-models, GeneralLPIPSWithDiscriminator; latent-diffusion,
    LPIPSWithDiscriminator and VQLPIPSWithDiscriminator.
    """

    disc_start: int
    disc_factor: float = 1.0
    disc_weight: float = 1.0
    disc_loss: Literal["hinge", "vanilla"] = "hinge"
    perceptual_weight: float = 1.0
    perceptual_start: int = 0
    pixel_loss: Literal["l1", "l2", "huber"] = "l1"
    reduction: Literal["sum", "mean"] = "sum"
    regularization_weights: Mapping[str, float] | None = None


class GeneratorPass(NamedTuple):
    """What one forward pass over a batch gives the autoencoder.

    gradients() -> d total / d {"autoencoder", "loss"}, computed when it is called.
    mutable: the new collections of both networks.
    """

    reconstruction: Float[Array, "b h w c"]
    loss: Float[Array, ""]
    metrics: dict[str, Array]
    mutable: dict[str, PyTree]
    gradients: Callable[[], dict[str, PyTree]]


class _Nll(NamedTuple):
    """Losses, and the gradients of nll and weighted nll by the reconstruction and logvar."""

    nll: Array
    weighted: Array
    rec: Array
    d_nll: Array
    d_weighted: Array
    d_logvar: Array


def check_loss(loss: AutoencoderLoss) -> None:
    """Raise ValueError for an option that is unknown or out of range."""
    check_choice("disc_loss", loss.disc_loss, DISC_LOSSES)
    check_choice("pixel_loss", loss.pixel_loss, ("l1", "l2", "huber"))
    check_choice("reduction", loss.reduction, REDUCTIONS)
    for name in (
        "disc_start",
        "perceptual_start",
        "disc_factor",
        "disc_weight",
        "perceptual_weight",
    ):
        if not getattr(loss, name) >= 0.0:
            raise ValueError(f"{name} = {getattr(loss, name)!r} should be at least 0")


def with_stills(networks: Networks, batch: Batch) -> Networks:
    """Tell the decoder which frames of a batch are independent images, if batch["stills"] does."""
    if "stills" not in batch:
        return networks
    decode = functools.partial(networks.decode, stills=batch["stills"])
    return networks._replace(decode=decode)


def reconstruct(
    networks: Networks,
    params: PyTree,
    mutable: PyTree,
    image: Float[Array, "b h w c"],
    keys: Keys,
    *,
    train: bool,
    step: Array | None = None,
) -> tuple[Float[Array, "b h w c"], Mapping[str, Array], PyTree]:
    """Encode, regularize and decode: image -> (reconstruction, log, the regularizer's mutable).

    params are the autoencoder's. Sample i draws its latent from keys[i]; dropout has one key.
    """
    keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    moments = networks.encode(params, image, keys[0, 1] if train else None)
    z, log, mutable = networks.regularize(
        params, mutable, moments, keys[:, 0], train=train, step=step
    )
    return networks.decode(params, z, keys[0, 2] if train else None), log, mutable


def generator_pass(
    networks: Networks,
    loss: AutoencoderLoss,
    params: PyTree,
    mutable: PyTree,
    frozen: PyTree,
    batch: Batch,
    keys: Keys,
    *,
    active: Bool[Array, ""] | bool,
    train: bool,
    step: Array | None = None,
) -> GeneratorPass:
    """Compute the autoencoder's loss and gradients: total = nll + d_weight disc_factor g + reg.

    d_weight = disc_weight |d nll/d L| / (|d g/d L| + 1e-4), where L is the last layer's kernel. No
    gradient goes through it; it costs two gradients of that layer and one of the discriminator.
    Losses are float32 whatever the networks compute in. Metrics: loss/total, nll, rec (mean over
    elements) and g, scalars/logvar and d_weight, and all that the regularizer logs.

    params: {"autoencoder", "loss": {"logvar"} or {}, "discriminator"}; without a logvar there,
        frozen["logvar"] is used and fixed.
    mutable: {"regularizer", "discriminator"}. frozen: {"lpips", "logvar"}.
    batch: "image" [b h w c] in [-1, 1]; "weight" [b] weighs samples in every mean (0 for
        padding); "nll_weight", [b] or [b h w c or 1], multiplies nll in the total only.
    active: whether the discriminator takes part. train: False evaluates: d_weight is 1.
    step: the training step, None in evaluation.
    Source: generative-models, GeneralLPIPSWithDiscriminator.
    """
    image = batch["image"].astype(jnp.float32)
    weight = batch["weight"] if "weight" in batch else None
    forward = _forward(networks, loss, mutable, image, weight, keys, train, step)
    (out, reg), pull_back, (log, regularizer) = jax.vjp(
        forward, params["autoencoder"], has_aux=True
    )
    learned = "logvar" in params["loss"]
    logvar = params["loss"]["logvar"] if learned else frozen["logvar"]
    nll = _nll(networks, loss, image, out.astype(jnp.float32), logvar, frozen, batch, step)
    g, d_g, discriminator = _adversary(networks, params, mutable, out, weight, active, train)

    def last_layer(cotangent: Array) -> Array:
        cotangents = (cotangent.astype(out.dtype), jnp.zeros_like(reg))
        return leaf_at(pull_back(cotangents)[0], networks.last_layer)

    d_weight = jnp.where(active, 1.0, 0.0)
    if train:
        balance = adaptive_weight(last_layer(nll.d_nll), last_layer(d_g))
        d_weight = d_weight * loss.disc_weight * balance
    g_weight = d_weight * loss.disc_factor

    def gradients() -> dict[str, PyTree]:
        cotangent = nll.d_weighted + g_weight * d_g
        (autoencoder,) = pull_back((cotangent.astype(out.dtype), jnp.ones_like(reg)))
        return {
            "autoencoder": autoencoder,
            "loss": {"logvar": nll.d_logvar} if learned else {},
        }

    total = nll.weighted + g_weight * g + reg
    metrics = {
        "loss/total": total,
        "loss/nll": nll.nll,
        "loss/rec": nll.rec,
        "loss/g": g,
        "scalars/logvar": logvar,
        "scalars/d_weight": d_weight,
        **log,
    }
    after = {"regularizer": regularizer, "discriminator": discriminator}
    return GeneratorPass(out, total, metrics, after, gradients)


def discriminator_pass(
    networks: Networks,
    loss: AutoencoderLoss,
    params: PyTree,
    mutable: PyTree,
    image: Float[Array, "b h w c"],
    reconstruction: Float[Array, "b h w c"],
    weight: PerSample | None = None,
    *,
    train: bool,
) -> tuple[Float[Array, ""], tuple[dict[str, Array], PyTree]]:
    """Compute the discriminator's loss, disc_factor times gan_loss.discriminator_loss.

    params and mutable are the discriminator's. It sees the images first, then the reconstructions,
    each with its own batch statistics. No gradient reaches the reconstruction.
    Returns: loss, (metrics loss/disc, logits/real and logits/fake, mutable).
    """
    fake_image = jax.lax.stop_gradient(reconstruction).astype(jnp.float32)
    real_image = image.astype(jnp.float32)
    real, mutable = networks.discriminate(params, mutable, real_image, train=train)
    fake, mutable = networks.discriminate(params, mutable, fake_image, train=train)
    value = loss.disc_factor * discriminator_loss(real, fake, weight, disc_loss=loss.disc_loss)
    metrics = {
        "loss/disc": value,
        "logits/real": mean_logit(real, weight),
        "logits/fake": mean_logit(fake, weight),
    }
    return value, (metrics, mutable)


def _forward(
    networks: Networks,
    loss: AutoencoderLoss,
    mutable: PyTree,
    image: Array,
    weight: PerSample | None,
    keys: Keys,
    train: bool,
    step: Array | None,
) -> Callable[[PyTree], Any]:
    """Make params -> (reconstruction, weighted regularization), (log, mutable)."""

    def forward(autoencoder: PyTree) -> Any:
        out, log, after = reconstruct(
            networks, autoencoder, mutable["regularizer"], image, keys, train=train, step=step
        )
        log = {name: _mean(value, weight) for name, value in log.items()}
        return (out, _weigh(log, loss.regularization_weights)), (log, after)

    return forward


def _adversary(
    networks: Networks,
    params: PyTree,
    mutable: PyTree,
    out: Array,
    weight: PerSample | None,
    active: Any,
    train: bool,
) -> tuple[Array, Array, PyTree]:
    """Compute g, d g / d out and the discriminator's mutable; zeros before its start."""
    out, before = out.astype(jnp.float32), mutable["discriminator"]

    def g_of(out: Array) -> tuple[Array, PyTree]:
        logits, after = networks.discriminate(params["discriminator"], before, out, train=train)
        return generator_loss(logits, weight), strengthen(after, before)

    def run() -> tuple[Array, Array, PyTree]:
        (g, after), d_g = jax.value_and_grad(g_of, has_aux=True)(out)
        return g, d_g, after

    def idle() -> tuple[Array, Array, PyTree]:
        return jnp.zeros((), jnp.float32), jnp.zeros_like(out), before

    return jax.lax.cond(active, run, idle)


def _nll(
    networks: Networks,
    loss: AutoencoderLoss,
    image: Array,
    out: Array,
    logvar: Array,
    frozen: PyTree,
    batch: Batch,
    step: Array | None,
) -> _Nll:
    """Compute nll = rec / exp(logvar) + logvar and gradients; LPIPS runs forward and back once."""
    weight = batch["weight"] if "weight" in batch else None
    distance, d_distance = _perceptual(networks, loss, image, out, frozen, step)

    def values(out: Array, distance: Array, logvar: Array) -> Any:
        rec = elementwise_loss(out, image, loss.pixel_loss)
        rec = rec + loss.perceptual_weight * expand(distance, rec)
        elements = rec / jnp.exp(logvar) + logvar
        reduce = _sums if loss.reduction == "sum" else sample_means
        nll = weighted = weighted_mean(reduce(elements), weight)
        if "nll_weight" in batch:
            of_nll = batch["nll_weight"]
            of_nll = expand(of_nll, rec) if of_nll.ndim == 1 else of_nll
            weighted = weighted_mean(reduce(of_nll * elements), weight)
        return (nll, weighted), weighted_mean(sample_means(rec), weight)

    (nll, weighted), pull_back, rec = jax.vjp(values, out, distance, logvar, has_aux=True)

    def cotangents(of_nll: float, of_weighted: float) -> tuple[Array, Array]:
        given = jnp.float32(of_nll), jnp.float32(of_weighted)
        d_out, d_scale, d_logvar = pull_back(given)
        return d_out + expand(d_scale, out) * d_distance, d_logvar

    d_nll, _ = cotangents(1.0, 0.0)
    d_weighted, d_logvar = cotangents(0.0, 1.0)
    return _Nll(nll, weighted, rec, d_nll, d_weighted, d_logvar)


def _perceptual(
    networks: Networks,
    loss: AutoencoderLoss,
    image: Array,
    out: Array,
    frozen: PyTree,
    step: Array | None,
) -> tuple[PerSample, Array]:
    """Compute LPIPS [b] and its gradient by out; zeros before its start."""

    def run() -> tuple[Array, Array]:
        compare = lambda out: networks.lpips(frozen["lpips"], image, out).astype(jnp.float32)
        distance, pull_distance = jax.vjp(compare, out)
        # Samples do not mix, so that any weights of them may multiply this gradient afterwards.
        return distance, pull_distance(jnp.ones_like(distance))[0]

    def idle() -> tuple[Array, Array]:
        return jnp.zeros(len(out)), jnp.zeros_like(out)

    if loss.perceptual_weight == 0.0:
        return idle()
    if step is None or loss.perceptual_start == 0:
        return run()
    return jax.lax.cond(step >= loss.perceptual_start, run, idle)


def _weigh(log: Mapping[str, Array], weights: Mapping[str, float] | None) -> Array:
    """Compute sum_k weights[k] log[k], float32."""
    total = jnp.zeros((), jnp.float32)
    for name, factor in (weights or {}).items():
        if name not in log:
            raise ValueError(
                f"regularization_weights[{name!r}] = {factor!r} weighs nothing: the regularizer "
                f"logs {', '.join(log) or 'nothing'}"
            )
        total = total + factor * log[name]
    return total


def _mean(value: Array, weight: PerSample | None) -> Array:
    """Make a logged value a float32 scalar: [b] is averaged with the weight of samples."""
    value = jnp.asarray(value).astype(jnp.float32)
    return weighted_mean(value, weight) if value.ndim else value


def _sums(values: Array) -> Array:
    return jnp.sum(values.reshape(values.shape[0], -1), axis=1)
