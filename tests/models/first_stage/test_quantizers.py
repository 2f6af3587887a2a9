"""Codebooks: nearest codes by brute force, losses and gradients from the formulas, averages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.first_stage.quantizers import (
    EMAVectorQuantizer,
    GumbelQuantizer,
    VectorQuantizer,
    measure_usage,
)

N, D = 7, 3
Z = np.random.RandomState(0).standard_normal((2, 4, 5, D)).astype(np.float32)
CODEBOOK = np.random.RandomState(1).standard_normal((N, D)).astype(np.float32)


def by_hand(z, codebook):
    """Indices, codes and the sizes of the two terms, in float64 NumPy."""
    difference = z[..., None, :].astype(np.float64) - codebook
    indices = np.square(difference).sum(-1).argmin(-1)
    return indices, codebook[indices], np.square(z - codebook[indices]).mean()


@pytest.mark.parametrize("legacy", [False, True])
def test_nearest_code_its_loss_and_gradients(legacy):
    module = VectorQuantizer(N, D, beta=0.25, legacy=legacy)
    indices, codes, distance = by_hand(Z, CODEBOOK)
    cotangent = jnp.asarray(np.random.RandomState(2).standard_normal(Z.shape), jnp.float32)

    def total(embedding, z):
        quantized = module.apply({"params": {"embedding": embedding}}, z)
        return jnp.sum(quantized.z * cotangent) + quantized.loss, quantized

    gradient = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    (embedding_grad, z_grad), quantized = gradient(jnp.asarray(CODEBOOK), jnp.asarray(Z))
    np.testing.assert_array_equal(quantized.indices, indices)
    np.testing.assert_allclose(quantized.z, codes, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(quantized.loss, 1.25 * distance, rtol=1e-5)
    # d/dz of the mean square is 2 (z - e) / size; the codebook sees the other side of each pair.
    pull = 2.0 * (Z - codes) / Z.size
    to_z, to_codes = (1.0, 0.25) if legacy else (0.25, 1.0)
    np.testing.assert_allclose(z_grad, cotangent + to_z * pull, rtol=1e-4, atol=1e-6)
    expected = np.zeros_like(CODEBOOK)
    np.add.at(expected, indices, -to_codes * pull)
    np.testing.assert_allclose(embedding_grad, expected, rtol=1e-4, atol=1e-6)


def test_a_new_codebook_is_uniform_and_finds_its_own_codes():
    module = VectorQuantizer(64, D)
    variables = module.init(jax.random.key(0), jnp.asarray(Z))
    embedding = variables["params"]["embedding"]
    assert embedding.shape == (64, D) and float(jnp.abs(embedding).max()) < 1 / 64
    np.testing.assert_allclose(embedding.std(), 1 / 64 / np.sqrt(3.0), rtol=0.1)
    indices = jnp.arange(12).reshape(2, 3, 2)
    quantized = module.apply(variables, embedding[indices])
    np.testing.assert_array_equal(quantized.indices, indices)
    assert float(quantized.loss) < 1e-12


def test_usage():
    indices = jnp.array([[[0, 1], [2, 3]]])
    perplexity, used = measure_usage(indices, 10)
    np.testing.assert_allclose(perplexity, 4.0, rtol=1e-5)
    assert int(used) == 4
    perplexity, used = measure_usage(jnp.zeros((1, 2, 2), jnp.int32), 10)
    np.testing.assert_allclose(perplexity, 1.0, rtol=1e-5)
    assert int(used) == 1


def test_averages_follow_the_assigned_vectors():
    module = EMAVectorQuantizer(N, D, beta=0.5, decay=0.9, eps=1e-2)
    variables = module.init(jax.random.key(0), jnp.asarray(Z))
    assert "params" not in variables
    book = variables["codebook"]
    np.testing.assert_array_equal(book["embedding"], book["embed_avg"])
    assert not book["cluster_size"].any()

    @jax.jit
    def step(book, z):
        return module.apply({"codebook": book}, z, train=True, mutable=["codebook"])

    embedding, average, size = (
        np.asarray(book[k], np.float64) for k in ("embedding", "embed_avg", "cluster_size")
    )
    for shift in (0.0, 1.0):
        z = Z + np.float32(shift)
        quantized, updated = step(book, jnp.asarray(z))
        book = updated["codebook"]
        indices, codes, distance = by_hand(z, embedding)
        np.testing.assert_array_equal(quantized.indices, indices)
        np.testing.assert_allclose(quantized.z, codes, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(quantized.loss, 0.5 * distance, rtol=1e-5)
        onehot = np.eye(N)[indices.reshape(-1)]
        size = 0.9 * size + 0.1 * onehot.sum(0)
        average = 0.9 * average + 0.1 * onehot.T @ z.reshape(-1, D)
        smoothed = (size + 1e-2) / (size.sum() + N * 1e-2) * size.sum()
        embedding = average / smoothed[:, None]
        np.testing.assert_allclose(book["cluster_size"], size, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(book["embed_avg"], average, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(book["embedding"], embedding, rtol=1e-4, atol=1e-5)
    # Without train, or with the collection fixed, nothing moves.
    _, still = module.apply({"codebook": book}, jnp.asarray(Z), mutable=["codebook"])
    np.testing.assert_array_equal(still["codebook"]["embedding"], book["embedding"])
    module.apply({"codebook": book}, jnp.asarray(Z), train=True)


def test_averages_pull_the_encoder_only_by_the_commitment():
    module = EMAVectorQuantizer(N, D, beta=0.5)
    variables = module.init(jax.random.key(0), jnp.asarray(Z))
    codes = by_hand(Z, np.asarray(variables["codebook"]["embedding"]))[1]

    def total(z):
        quantized = module.apply(variables, z)
        return jnp.sum(quantized.z) + quantized.loss

    expected = 1.0 + 0.5 * 2.0 * (Z - codes) / Z.size
    np.testing.assert_allclose(jax.grad(total)(jnp.asarray(Z)), expected, rtol=1e-5)


def gumbel():
    module = GumbelQuantizer(D, 2, N, kl_weight=0.1)
    kernel = 2.0 * np.random.RandomState(3).standard_normal((1, 1, D, N)).astype(np.float32)
    embedding = np.random.RandomState(4).standard_normal((N, 2)).astype(np.float32)
    params = {"proj": {"kernel": kernel, "bias": np.zeros(N, np.float32)}, "embedding": embedding}
    return module, {"params": jax.tree.map(jnp.asarray, params)}, Z @ kernel[0, 0], embedding


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_gumbel_takes_the_likeliest_code_and_pulls_to_the_uniform_distribution():
    module, variables, logits, embedding = gumbel()
    quantized = module.apply(variables, jnp.asarray(Z))
    np.testing.assert_array_equal(quantized.indices, logits.argmax(-1))
    np.testing.assert_allclose(quantized.z, embedding[logits.argmax(-1)], rtol=1e-5, atol=1e-6)
    p = softmax(logits)
    expected = 0.1 * (p * np.log(p * N)).sum(-1).mean()
    np.testing.assert_allclose(quantized.loss, expected, rtol=1e-4)


def test_gumbel_noise_chooses_codes_with_the_softmaxs_frequencies():
    module, variables, logits, _ = gumbel()
    z = jnp.broadcast_to(jnp.asarray(Z[:1, :1, :1]), (2, 100, 100, D))
    keys = jax.random.split(jax.random.key(0), 2)
    quantized = module.apply(variables, z, keys)
    assert not jnp.array_equal(quantized.indices[0], quantized.indices[1])
    shares = np.bincount(quantized.indices.reshape(-1), minlength=N) / quantized.indices.size
    np.testing.assert_allclose(shares, softmax(logits[0, 0, 0]), atol=0.015)


def test_gumbel_mixes_codes_in_training_without_straight_through():
    module, variables, logits, embedding = gumbel()
    keys = jax.random.split(jax.random.key(1), 2)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    again = jax.random.split(jax.random.key(1), 2)
    mixed = module.clone(straight_through=False)
    quantized = mixed.apply(variables, jnp.asarray(Z), again, temperature=0.7, train=True)
    expected = softmax((logits + np.asarray(noise)) / 0.7)
    np.testing.assert_allclose(quantized.z, expected @ embedding, rtol=1e-4, atol=1e-5)

    def gradient(module, seed):
        def total(z):
            keys = jax.random.split(jax.random.key(seed), 2)
            return jnp.sum(module.apply(variables, z, keys, temperature=0.7, train=True).z)

        return jax.grad(total)(jnp.asarray(Z))

    # Straight through: the value of one code with the gradient of the mixture.
    np.testing.assert_allclose(gradient(module, 1), gradient(mixed, 1), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="keys is missing"):
        module.apply(variables, jnp.asarray(Z), train=True)


def test_other_channels_are_named():
    with pytest.raises(ValueError, match="z has 3 channels and e_dim = 4"):
        jax.eval_shape(VectorQuantizer(N, 4).init, jax.random.key(0), jnp.asarray(Z))
