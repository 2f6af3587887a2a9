"""From a network to the denoiser D(x, sigma), and between all that a network may predict.

Coordinates are variance-exploding: x = x_0 + sigma eps, whatever the network was trained with. A
variance-preserving x_t of a Schedule is x sqrt(abar), with sigma = sqrt(1 / abar - 1). sigma is
float [b], positive; x is [b ...] of any rank; results are float32 at least.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diffusion_jax.diffusion.ddpm import expand
from diffusion_jax.diffusion.guidance import Apply
from diffusion_jax.types import Conditioning, PerSample

Sample = Float[Array, "b *shape"]


class Preconditioning(NamedTuple):
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise): the four numbers of a sample, each [b].

    Source: Karras et al. 2022 (EDM), equation 7.
    """

    c_skip: Array
    c_out: Array
    c_in: Array
    c_noise: Array


# sigma [b] -> Preconditioning
Scaling: TypeAlias = Callable[[Array], Preconditioning]


def eps() -> Scaling:
    """F predicts the noise: D = x - sigma F, c_in = 1 / sqrt(sigma^2 + 1), c_noise = sigma.

    Source: sgm, EpsScaling; Karras et al. 2022, table 1 (VP).
    """
    return lambda sigma: Preconditioning(jnp.ones_like(sigma), -sigma, _inverse_root(sigma), sigma)


def v() -> Scaling:
    """F predicts v = (eps - sigma x_0) / sqrt(sigma^2 + 1): D = c_in^2 x - sigma c_in F.

    c_in = 1 / sqrt(sigma^2 + 1), c_noise = sigma. Source: sgm, VScaling; Salimans and Ho 2022.
    """

    def scaling(sigma: Array) -> Preconditioning:
        c_in = _inverse_root(sigma)
        return Preconditioning(c_in**2, -sigma * c_in, c_in, sigma)

    return scaling


def x0() -> Scaling:
    """F predicts the data: D = F, c_in = 1 / sqrt(sigma^2 + 1), c_noise = sigma."""
    return lambda sigma: Preconditioning(
        jnp.zeros_like(sigma), jnp.ones_like(sigma), _inverse_root(sigma), sigma
    )


def edm(*, sigma_data: float = 0.5) -> Scaling:
    """Keep input and target of F at variance 1 for data of standard deviation sigma_data.

    With s^2 = sigma^2 + sigma_data^2: c_skip = sigma_data^2 / s^2, c_out = sigma sigma_data / s,
    c_in = 1 / s, c_noise = ln(sigma) / 4. Raises ValueError for a sigma_data that is not positive.
    Source: Karras et al. 2022, table 1 (ours); sgm, EDMScaling.
    """
    if not sigma_data > 0.0:
        raise ValueError(f"sigma_data = {sigma_data!r} should be positive")

    def scaling(sigma: Array) -> Preconditioning:
        c_in = _inverse_root(sigma, sigma_data)
        return Preconditioning(
            (sigma_data * c_in) ** 2, sigma * sigma_data * c_in, c_in, _quarter_log(sigma)
        )

    return scaling


def v_edm() -> Scaling:
    """Scale as `v` does, with EDM's c_noise = ln(sigma) / 4 (sgm, VScalingWithEDMcNoise; SVD)."""
    scaling = v()
    return lambda sigma: scaling(sigma)._replace(c_noise=_quarter_log(sigma))


def flow(*, time_scale: float = 1000.0) -> Scaling:
    """F predicts the velocity eps - x_0 of flow matching, x_t = (1 - t) x_0 + t eps.

    With t = sigma / (1 + sigma): c_skip = c_in = 1 - t, c_out = -t, c_noise = time_scale t. So c_in
    x is x_t, and D = x_t - t F. Source: Lipman et al. 2023; Esser et al. 2024 (Stable Diffusion 3),
    section 2, for t that runs to 1000 in the network. A network that is differentiated by t
    (MeanFlow) needs a smaller time_scale: its features of t must not turn many times.
    """
    if not time_scale > 0.0:
        raise ValueError(f"time_scale = {time_scale!r} should be positive")

    def scaling(sigma: Array) -> Preconditioning:
        c_in = 1.0 / (1.0 + sigma)
        t = sigma * c_in
        return Preconditioning(c_in, -t, c_in, time_scale * t)

    return scaling


def consistency(*, sigma_data: float = 0.5, sigma_min: float = 0.002) -> Scaling:
    """Scale as `edm` does, but so that D(x, sigma_min) = x, whatever F is.

    D is then a consistency function, which maps every x of a path to the end of the path, at the
    noise level sigma_min. With s^2 = sigma^2 + sigma_data^2 and d = sigma - sigma_min:
    c_skip = sigma_data^2 / (d^2 + sigma_data^2), c_out = d sigma_data / s, c_in = 1 / s,
    c_noise = ln(sigma) / 4.

    Raises ValueError for numbers that are not positive.
    Source: Song et al. 2023, "Consistency Models", appendix C.
    """
    for name, value in (("sigma_data", sigma_data), ("sigma_min", sigma_min)):
        if not value > 0.0:
            raise ValueError(f"{name} = {value!r} should be positive")

    def scaling(sigma: Array) -> Preconditioning:
        c_in, above = _inverse_root(sigma, sigma_data), sigma - sigma_min
        c_skip = (sigma_data * _inverse_root(above, sigma_data)) ** 2
        return Preconditioning(c_skip, above * sigma_data * c_in, c_in, _quarter_log(sigma))

    return scaling


# name -> factory; the options of a config are the factory's keywords
SCALINGS: dict[str, Callable[..., Scaling]] = {
    "eps": eps,
    "v": v,
    "x0": x0,
    "edm": edm,
    "v_edm": v_edm,
    "flow": flow,
    "consistency": consistency,
}


def denoiser(
    apply: Apply,
    scaling: Scaling,
    sigmas: Float[Array, "N"] | None = None,
    *,
    quantize_c_noise: bool = True,
    around: str | None = None,
) -> Apply:
    """Make D(x, sigma) = c_skip x + c_out F(c_in x, c_noise) of a network F.

    apply: (x [b ...], c_noise [b], conditioning) -> F like x; c_noise is float32, or the int32
      index of a table.
    sigmas: float32 [N], strictly ascending, makes the discrete denoiser: sigma becomes the nearest
      entry, the scalings follow from that, and with quantize_c_noise the network is given the index
      of the entry nearest to c_noise. As upstream, c_noise is looked up in the table of sigmas also
      where it is ln(sigma) / 4. None is the continuous denoiser.
    around: name of an entry y of the conditioning, like x or, of clips, like one frame of x: what
      is denoised is the difference to it, D = y + c_skip (x - y) + c_out F(c_in (x - y), c_noise).
      A network that says 0 then holds y where the noise is strong, and need not learn to copy it.

    Returns: denoise(x, sigma [b], conditioning) -> x_0, float32 at least. It raises ValueError for
    a network whose output, or an entry `around`, does not fit x.
    Source: Karras et al. 2022, equation 7; sgm, Denoiser and DiscreteDenoiser.
    """

    def denoise(x: Array, sigma: Array, conditioning: Conditioning) -> Array:
        sigma = _float32(sigma)
        if sigmas is not None:
            sigma = sigmas[nearest(sigma, sigmas)]
        c_skip, c_out, c_in, c_noise = scaling(sigma)
        if sigmas is not None and quantize_c_noise:
            c_noise = nearest(c_noise, sigmas)
        output = apply(expand(c_in, x) * x, c_noise, conditioning)
        if output.shape != x.shape:
            raise ValueError(
                f"the network's output has the shape {output.shape}; it should be {x.shape}, "
                "the shape of x"
            )
        return expand(c_skip, x) * x + expand(c_out, x) * output

    return denoise if around is None else _denoise_around(denoise, around)


def _denoise_around(denoise: Apply, name: str) -> Apply:
    """Denoise the difference to an entry of the conditioning."""

    def denoise_difference(x: Array, sigma: Array, conditioning: Conditioning) -> Array:
        centre = _centre(conditioning[name], x)
        return centre + denoise(x - centre, sigma, conditioning)

    return denoise_difference


def _centre(entry: Array, x: Array) -> Array:
    """Shape an entry of the conditioning like x: the frame of a clip is every frame of it."""
    if entry.shape not in (x.shape, (x.shape[0], *x.shape[2:])):
        raise ValueError(
            f"the conditioning that is denoised around has the shape {entry.shape}; it should be "
            f"like x, {x.shape}, or like a frame of it"
        )
    return _float32(entry if entry.ndim == x.ndim else entry[:, None])


def nearest(values: PerSample, table: Float[Array, "N"]) -> Int[Array, "b"]:
    """Find argmin_i |value - table_i| of a strictly ascending table, the first of two: int32 [b].

    Only the two neighbours are compared, so that a value far outside, whose float32 differences are
    all equal, still finds the end that is nearer.
    """
    # Counting the smaller entries is one fused pass; a binary search would be a loop of ten steps.
    above = jnp.searchsorted(table, values, method="compare_all").astype(jnp.int32)
    above = jnp.minimum(jnp.maximum(above, 1), table.shape[0] - 1)
    below = jnp.maximum(above - 1, 0)
    return jnp.where(values - table[below] <= table[above] - values, below, above)


def start_from_output(scaling: Scaling, output: Sample, x: Sample, sigma: PerSample) -> Array:
    """Compute x_0 = c_skip x + c_out F from the network output F of a scaling."""
    c = scaling(_float32(sigma))
    return expand(c.c_skip, x) * x + expand(c.c_out, x) * output


def output_from_start(scaling: Scaling, x_start: Sample, x: Sample, sigma: PerSample) -> Array:
    """Solve for F = (x_0 - c_skip x) / c_out, which is what a network of a scaling should predict.

    Source: Karras et al. 2022, equation 8.
    """
    c = scaling(_float32(sigma))
    return (x_start - expand(c.c_skip, x) * x) / expand(c.c_out, x)


def _inverse_root(sigma: Array, sigma_data: float = 1.0) -> Array:
    """Compute 1 / sqrt(sigma^2 + sigma_data^2), also where the square would overflow."""
    return 1.0 / jnp.hypot(sigma, jnp.asarray(sigma_data, sigma.dtype))


def _quarter_log(sigma: Array) -> Array:
    return 0.25 * jnp.log(sigma)


def _float32(values: Array) -> Array:
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))
