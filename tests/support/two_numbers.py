"""A Gaussian of two numbers, and a small network that learns it with a loss of the package."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

MEAN = np.array([0.5, -0.3], np.float32)
MIX = np.array([[0.6, 0.3], [0.0, 0.4]], np.float32)
SHAPE = (1, 1, 2)


def draw(rows, key):
    """Draw correlated Gaussian data, [rows 1 1 2]."""
    return (MEAN[None] + jax.random.normal(key, (rows, 2)) @ MIX).reshape(rows, *SHAPE)


def perceptron(key, inputs, width=64):
    sizes = [(inputs, width), (width, width), (width, 2)]
    keys = jax.random.split(key, 3)
    pairs = zip(keys, sizes, strict=True)
    return [(s[0] ** -0.5 * jax.random.normal(k, s), jnp.zeros(s[1])) for k, s in pairs]


def evaluate(params, *inputs):
    h = jnp.concatenate([x.reshape(len(x), -1) for x in inputs], axis=1)
    for weights, bias in params[:-1]:
        h = jax.nn.silu(h @ weights + bias[None])
    weights, bias = params[-1]
    return (h @ weights + bias[None]).reshape(-1, *SHAPE)


def train(loss_fn, params, steps, rows=256):
    tx = optax.adam(optax.cosine_decay_schedule(4e-3, steps))

    def update(carry, step):
        params, state = carry
        key, data = jax.random.split(jax.random.fold_in(jax.random.key(3), step))
        batch = {"image": draw(rows, data), "position": jnp.arange(rows, dtype=jnp.int32)}
        batch["step"] = jnp.full((rows,), step, jnp.int32)
        keys = jax.random.split(key, rows)
        gradient = jax.grad(lambda p: loss_fn(p, {}, {}, batch, keys, train=True)[0])(params)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda params: jax.lax.scan(update, (params, tx.init(params)), jnp.arange(steps)))
    return run(params)[0][0]


def check_moments(x):
    x = np.asarray(x).reshape(-1, 2)
    np.testing.assert_allclose(x.mean(0), MEAN, atol=0.06)
    np.testing.assert_allclose(np.cov(x.T), MIX.T @ MIX, atol=0.06)
