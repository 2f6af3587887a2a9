"""The discriminator against the same layers of PyTorch: logits, gradients, running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.first_stage.patchgan import NLayerDiscriminator

pytestmark = pytest.mark.parity


def torch_discriminator(torch, ndf):
    """The layers in the order of the published network with n_layers = 3."""
    nn = torch.nn

    def block(inputs, outputs, stride):
        conv = nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False)
        return conv, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)

    return nn.Sequential(
        nn.Conv2d(3, ndf, 4, 2, 1),
        nn.LeakyReLU(0.2),
        *block(ndf, 2 * ndf, 2),
        *block(2 * ndf, 4 * ndf, 2),
        *block(4 * ndf, 8 * ndf, 1),
        nn.Conv2d(8 * ndf, 1, 4, 1, 1),
    )


def to_variables(arrays):
    """Our variables from {"3.weight": array}."""
    variables = {"params": {}, "batch_stats": {}}
    for name, array in arrays.items():
        index, leaf = name.split(".")
        if leaf == "num_batches_tracked":
            continue
        collection = "batch_stats" if leaf.startswith("running") else "params"
        if leaf == "weight":
            leaf = "kernel" if array.ndim == 4 else "scale"
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
        variables[collection].setdefault(f"main_{index}", {})[leaf] = jnp.asarray(array)
    return variables


def largest_error(ours, theirs):
    errors = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), ours, theirs)
    return max(jax.tree.leaves(errors))


def test_two_steps_of_training_and_an_evaluation():
    torch = pytest.importorskip("torch")
    theirs = torch_discriminator(torch, 8)
    rng = np.random.RandomState(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            scale = np.prod(parameter.shape[1:]) ** -0.5 if parameter.ndim > 1 else 0.3
            drawn = scale * rng.standard_normal(parameter.shape) + (parameter.ndim == 1)
            parameter.copy_(torch.from_numpy(drawn.astype(np.float32)))
    copy = lambda: {k: v.detach().numpy().copy() for k, v in theirs.state_dict().items()}
    variables, module = to_variables(copy()), NLayerDiscriminator(ndf=8)

    @jax.jit
    def step(variables, image, cotangent):
        def loss(params, image):
            logits, updated = module.apply(
                variables | {"params": params}, image, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(logits * cotangent), (logits, updated)

        grads, (logits, updated) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
            variables["params"], image
        )
        return grads, logits, updated

    first = lambda a: torch.from_numpy(a.transpose(0, 3, 1, 2).copy())
    for _ in range(2):
        image = rng.standard_normal((2, 40, 32, 3)).astype(np.float32)
        cotangent = rng.standard_normal((2, 3, 2, 1)).astype(np.float32)
        (grads, image_grad), logits, updated = step(variables, image, cotangent)
        x = first(image).requires_grad_()
        theirs.zero_grad()
        output = theirs(x)
        (output * first(cotangent)).sum().backward()
        last = lambda a: a.detach().numpy().transpose(0, 2, 3, 1)
        their_grads = to_variables({k: p.grad.numpy() for k, p in theirs.named_parameters()})
        errors = {
            "logits": largest_error(logits, last(output)),
            "image": largest_error(image_grad, last(x.grad)),
            "parameters": largest_error(grads, their_grads["params"]),
            "statistics": largest_error(
                updated["batch_stats"], to_variables(copy())["batch_stats"]
            ),
        }
        print({k: f"{v:.1e}" for k, v in errors.items()})
        assert max(errors.values()) < 1e-4
        variables = variables | updated
    theirs.eval()
    logits = jax.jit(module.apply)(variables, image)
    assert largest_error(logits, last(theirs(first(image)))) < 1e-4
