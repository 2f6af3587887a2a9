"""What nn.Conv calls to convolve: XLA's convolution, with a backward pass of its own for a CPU.

There the gradient of a kernel takes three to eight times as long as the convolution. So
- a 1 x 1 convolution is a matrix product, backwards as well: its kernel's gradient takes a quarter;
- the gradient of a 3 x 3 kernel is summed over parts of the batch that fit into a core's cache: it
  takes a third to a half. Where XLA_FLAGS leave convolutions to Eigen, it is computed at once;
- both gradients are written as convolutions of transposed arrays. XLA's CPU compiler does so itself
  in a program's main computation, and not in a branch or the body of a loop, where it would run
  naive loops instead, twenty times slower.
Forward and backward of a 28 px network of widths 32/64/64 take 1.4 s of one core instead of 2.0.
Other devices run what they would have run.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from diffusion_jax.devices.xla_flags import eigen_convolves
from diffusion_jax.models.layers.derivatives import Arrays, with_derivatives

# Size of a part in numbers: 1 MiB of float32, the second-level cache of current cores or less.
PART_SIZE = 2**18
MAX_PARTS = 32
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
DEEP_DIMENSIONS = ("NDHWC", "DHWIO", "NDHWC")
Padding: TypeAlias = tuple[tuple[int, int], tuple[int, int]]
# Set while for_onednn traces.
_onednn: contextvars.ContextVar[bool] = contextvars.ContextVar("onednn", default=False)


@contextlib.contextmanager
def for_onednn() -> Iterator[None]:
    """Write the gradients of kernels as oneDNN computes them best, while this is open.

    The numbers are the same. Without oneDNN a CPU takes four times as long for them.
    """
    token = _onednn.set(True)
    try:
        yield
    finally:
        _onednn.reset(token)


def convolve(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> Array:
    """Convolve x [b ... c] with a kernel [... c o], in the place of lax.conv_general_dilated.

    Made for nn.Conv without groups or dilation. x [b t h w c] is convolved in two dimensions, see
    convolve_video.
    """
    plain = all(stride == 1 for stride in strides)
    if plain and all(size == 1 for size in kernel.shape[:-2]):
        flat = x.reshape(-1, x.shape[-1]) @ kernel.reshape(kernel.shape[-2:])
        return flat.reshape(*x.shape[:-1], kernel.shape[-1])
    if plain and x.ndim == 5:
        return convolve_video(x, kernel, padding)
    if x.ndim != 4:
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)
    (top, bottom), (left, right) = padding
    vertical, horizontal = strides
    around = ((top, bottom), (left, right))
    convolution = _convolution((vertical, horizontal), around, deep=_onednn.get())
    return convolution(x, kernel)


def convolve_video(x: Array, kernel: Array, padding: Sequence[tuple[int, int]]) -> Array:
    """Convolve x [b t h w c] with a kernel [kt kh kw c o] without a three-dimensional convolution.

    Those are up to 90 times slower on XLA's GPU backend. A kernel over time alone convolves
    [b t (h w) c]; any other one convolves each frame, beside its neighbours as further channels.
    """
    batch, frames, height, width, channels = x.shape
    times, rows, columns, _, features = kernel.shape
    around, *within = padding
    if rows == columns == 1 and not any(map(any, within)):
        flat = x.reshape(batch, frames, height * width, channels)
        flat = convolve(
            flat, kernel.reshape(times, 1, channels, features), (1, 1), (around, (0, 0))
        )
        return flat.reshape(batch, -1, height, width, features)
    low, high = around
    count = frames + low + high - times + 1
    padded = jnp.pad(x, ((0, 0), (low, high), (0, 0), (0, 0), (0, 0)))
    stacked = jnp.concatenate([padded[:, i : i + count] for i in range(times)], axis=-1)
    stacked = stacked.reshape(batch * count, height, width, times * channels)
    kernel = jnp.moveaxis(kernel, 0, 2).reshape(rows, columns, times * channels, features)
    h = convolve(stacked, kernel, (1, 1), within)
    return h.reshape(batch, count, *h.shape[1:])


@cache
def _convolution(strides: tuple[int, int], padding: Padding, *, deep: bool) -> Callable[..., Array]:
    """Make (x, kernel) -> their convolution, which is linear in each of them.

    deep: see _kernel_gradient. It is known here, and not looked up by the backward pass, whose
    trace is kept for the next layer of the same shape.
    """
    run = partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        dimension_numbers=DIMENSIONS,
    )

    def tangent(saved: Arrays, dx: Array, dkernel: Array) -> Array:
        x, kernel = saved
        return run(dx, kernel) + run(x, dkernel)

    return with_derivatives(
        lambda x, kernel: (run(x, kernel), (x, kernel)),
        tangent,
        partial(_gradients, run=run, strides=strides, padding=padding, deep=deep),
    )


def _gradients(
    saved: Arrays,
    dy: Array,
    *,
    run: Callable[[Array, Array], Array],
    strides: tuple[int, int],
    padding: Padding,
    deep: bool,
) -> tuple[Array, Array]:
    x, kernel = saved

    def input_gradient(kernel: Array, dy: Array) -> Array:
        return jax.linear_transpose(lambda x: run(x, kernel), x)(dy)[0]

    def kernel_gradient(x: Array, dy: Array) -> Array:
        return jax.linear_transpose(lambda kernel: run(x, kernel), kernel)(dy)[0]

    dx = lax.platform_dependent(
        kernel,
        dy,
        cpu=partial(_input_gradient, size=x.shape[1:3], strides=strides, padding=padding),
        default=input_gradient,
    )
    dkernel = lax.platform_dependent(
        x,
        dy,
        cpu=partial(
            _kernel_gradient, size=kernel.shape[:2], strides=strides, padding=padding, deep=deep
        ),
        default=kernel_gradient,
    )
    return dx, dkernel


def _input_gradient(
    kernel: Array, dy: Array, *, size: Sequence[int], strides: tuple[int, int], padding: Padding
) -> Array:
    """Convolve the output's gradient, spread by the strides, with the turned kernel.

    size: of the input, without batch and channels.
    """
    turned = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    around = [
        (k - 1 - low, n - 1 - (m - 1) * stride + low)
        for k, n, m, stride, (low, _) in zip(
            kernel.shape[:2], size, dy.shape[1:3], strides, padding, strict=True
        )
    ]
    return lax.conv_general_dilated(
        dy, turned, (1, 1), around, lhs_dilation=strides, dimension_numbers=DIMENSIONS
    )


def _kernel_gradient(
    x: Array,
    dy: Array,
    *,
    size: Sequence[int],
    strides: tuple[int, int],
    padding: Padding,
    deep: bool,
) -> Array:
    """Convolve the input with the output's gradient, channels and batch in each other's place.

    size: of the kernel, without channels. deep: as oneDNN computes it best.
    """
    around = [
        (low, k - n - low + (m - 1) * stride)
        for k, n, m, stride, (low, _) in zip(
            size, x.shape[1:3], dy.shape[1:3], strides, padding, strict=True
        )
    ]

    if deep and dy.dtype == jnp.float32:
        return _deep_kernel_gradient(x, dy, strides, around)

    def whole(x: Array, dy: Array) -> Array:
        gradient = lax.conv_general_dilated(
            jnp.swapaxes(x, 0, 3),
            jnp.moveaxis(dy, 0, 2),
            (1, 1),
            around,
            rhs_dilation=strides,
            dimension_numbers=DIMENSIONS,
        )
        return jnp.moveaxis(gradient, 0, 2)

    count = number_of_parts(dy.shape, dy.dtype) if tuple(size) == (3, 3) else 1
    if count == 1:
        return whole(x, dy)
    # Part i holds samples i, i + count, ...: every part takes some of each device's samples.
    x, dy = (a.reshape(-1, count, *a.shape[1:]) for a in (x, dy))
    return sum((whole(x[:, i], dy[:, i]) for i in range(1, count)), whole(x[:, 0], dy[:, 0]))


def _deep_kernel_gradient(
    x: Array, dy: Array, strides: tuple[int, int], around: Sequence[tuple[int, int]]
) -> Array:
    """Convolve in three dimensions: height, width, and the input's channels as the innermost.

    oneDNN is fast where the innermost dimension of a result is long, as the channels are and the
    three columns of a kernel are not. The batch is summed over in the channels' place.
    """
    gradient = lax.conv_general_dilated(
        jnp.transpose(x, (1, 2, 3, 0))[None],
        jnp.transpose(dy, (1, 2, 0, 3))[:, :, None],
        (1, 1, 1),
        [*around, (0, 0)],
        rhs_dilation=(*strides, 1),
        dimension_numbers=DEEP_DIMENSIONS,
    )
    return gradient[0]


def number_of_parts(shape: tuple[int, ...], dtype: Any) -> int:
    """Find into how many parts to split an output of this shape: the fewest that fit the cache.

    They are a power of two that divides the batch. Only float32 is split: sums of rounded parts
    would not be the same. Eigen blocks its work for the cache by itself, and is slower in parts.
    """
    if eigen_convolves():
        return 1
    count = 1
    size = math.prod(shape)
    while size // count > PART_SIZE and count < MAX_PARTS and shape[0] % (2 * count) == 0:
        count *= 2
    return count if dtype == jnp.float32 else 1
