"""The UNet against PyTorch: diffusers where it has the option, the formulas where it has not.

Outputs and the gradients of the input and all weights are compared. Every weight is
random and none is zero, so that the layers that start at zero count too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import unet_fixtures as fixtures

from diffusion_jax.models.unet.unet import UNet

pytestmark = pytest.mark.parity


def run_ours(fields, drawn):
    """Output and gradients of our network by released name, arrays in the released layout."""
    module = UNet(**fields)
    drawn = jax.tree.map(jnp.asarray, drawn)
    arguments = drawn["t"], drawn["context"], drawn["y"]
    shapes = jax.eval_shape(module.init, jax.random.key(0), drawn["x"], *arguments)["params"]

    def draw(path, leaf):
        name, shape = fixtures.released_name(path, leaf.shape)
        return jnp.asarray(fixtures.to_ours(fixtures.numbers(name, shape), path[-1].key))

    def loss(params, x):
        output = module.apply({"params": params}, x, *arguments)
        return jnp.sum(output * drawn["cotangent"]), output

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    (grads, x_grad), output = gradient(params, drawn["x"])
    results = {"output": np.asarray(output), "x": np.asarray(x_grad)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name, _ = fixtures.released_name(path, leaf.shape)
        leaf = np.asarray(leaf)
        if path[-1].key == "kernel":
            leaf = np.moveaxis(np.moveaxis(leaf, -1, 0), -1, 1)
        results[name] = leaf
    return results


def assert_agree(ours, theirs, tolerance=3e-5):
    """Compare relative to the largest entry of each array, or to 1 % of the largest gradient.

    Some gradients are zero but for rounding: that of the keys' bias in qkv, say.
    """
    assert set(ours) == set(theirs)
    floor = 0.01 * max(np.abs(array).max() for name, array in theirs.items() if name != "output")
    errors = {
        name: np.abs(ours[name].reshape(array.shape) - array).max()
        / max(np.abs(array).max(), floor)
        for name, array in theirs.items()
    }
    worst = max(errors, key=errors.get)
    print(f"output {errors['output']:.1e}, x {errors['x']:.1e}, worst {worst} {errors[worst]:.1e}")
    assert errors[worst] < tolerance, (worst, errors[worst])


@pytest.mark.parametrize("name", fixtures.CASES)
def test_agrees_with_diffusers(name):
    pytest.importorskip("diffusers")
    case = fixtures.CASES[name]
    assert_agree(run_ours(case.fields, fixtures.inputs(case)), fixtures.run_diffusers(case))


def test_the_embedded_scale_of_guidance_agrees_with_diffusers():
    """The scales are embedded as the pipeline of latent consistency models does it."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    case = fixtures.Case(
        fixtures.TRANSFORMER | {"time_cond_proj_dim": 12},
        "condition",
        fixtures.CROSS | {"attention_head_dim": 4, "time_cond_proj_dim": 12},
    )
    theirs, drawn = diffusers.UNet2DConditionModel(**case.config), fixtures.inputs(case)
    weights = fixtures.drawn_weights(theirs, case)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
    embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    module, x = UNet(**case.fields), jnp.asarray(drawn["x"])
    arguments = [jnp.asarray(drawn[name]) for name in ("t", "context")]
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, *arguments)["params"]

    def draw(path, leaf):
        name, shape = fixtures.released_name(path, leaf.shape)
        return jnp.asarray(fixtures.to_ours(fixtures.numbers(name, shape), path[-1].key))

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    found = {}
    for scales in ((8.0, 1.5), (1.0, 1.0)):
        features = embed(None, torch.tensor(scales) - 1.0, embedding_dim=12)
        want = theirs(
            torch.from_numpy(drawn["x"]).permute(0, 3, 1, 2),
            torch.from_numpy(drawn["t"]),
            encoder_hidden_states=torch.from_numpy(drawn["context"]),
            timestep_cond=features,
        ).sample.permute(0, 2, 3, 1)
        given = jnp.asarray(scales)
        found[scales] = module.apply({"params": params}, x, *arguments, guidance=given)
        error = np.abs(found[scales] - want.detach().numpy()).max()
        assert error < 1e-4 * np.abs(found[scales]).max()
    without = module.apply({"params": params}, x, *arguments)  # which is a scale of 1
    np.testing.assert_array_equal(without, found[1.0, 1.0])
    assert np.abs(found[8.0, 1.5] - without).max() > 1e-2


class TorchUNet:
    """The UNet as one function of its released parameters, written from the formulas."""

    def __init__(self, fields, weights):
        import torch

        self.torch, self.F = torch, torch.nn.functional
        self.weights, self.fields = weights, fields

    def has(self, name):
        return f"{name}.weight" in self.weights

    def layer(self, name, h, **kwargs):
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        functions = {2: self.F.linear, 3: self.F.conv1d, 4: self.F.conv2d}
        if weight.ndim > 2:
            kwargs.setdefault("padding", weight.shape[-1] // 2)
        return functions[weight.ndim](h, weight, bias, **kwargs)

    def norm(self, name, h, eps=1e-5):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return self.F.group_norm(h, self.fields["num_groups"], weight, bias, eps)

    def layer_norm(self, name, h):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return self.F.layer_norm(h, (h.shape[-1],), weight, bias)

    def sinusoids(self, t):
        torch, half = self.torch, self.fields["model_channels"] // 2
        angles = t.double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
        return torch.cat([angles.cos(), angles.sin()], -1).float()

    def mlp(self, name, h):
        return self.layer(f"{name}.2", self.F.silu(self.layer(f"{name}.0", h)))

    def label(self, y):
        if self.has("label_emb"):
            weight = self.weights["label_emb.weight"]
            return self.layer("label_emb", y[:, None]) if weight.shape[1] == 1 else weight[y]
        if self.has("label_emb.1.0"):
            return self.mlp("label_emb.1", self.sinusoids(y))
        return self.mlp("label_emb.0", y)

    def res_block(self, name, x, emb, resample):
        h = resample(self.F.silu(self.norm(f"{name}.in_layers.0", x)))
        h, x = self.layer(f"{name}.in_layers.2", h), resample(x)
        emb = self.layer(f"{name}.emb_layers.1", self.F.silu(emb))[:, :, None, None]
        if self.fields.get("use_scale_shift_norm"):
            scale, shift = emb.chunk(2, 1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + emb)
        h = self.layer(f"{name}.out_layers.3", self.F.silu(h))
        skip = f"{name}.skip_connection"
        return h + (self.layer(skip, x) if self.has(skip) else x)

    def attention(self, q, k, v, heads):
        b, length, width = q.shape
        q, k, v = (a.reshape(b, a.shape[1], heads, -1).transpose(1, 2) for a in (q, k, v))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(b, length, width)

    def heads(self, channels):
        per_head = self.fields.get("num_head_channels", -1)
        return channels // per_head if per_head != -1 else self.fields["num_heads"]

    def attention_block(self, name, x):
        b, c, _, _ = x.shape
        heads = self.heads(c)
        h = self.norm(f"{name}.norm", x.reshape(b, c, -1))
        qkv = self.layer(f"{name}.qkv", h)
        if self.fields.get("use_new_attention_order"):
            q, k, v = (part.transpose(1, 2) for part in qkv.chunk(3, 1))
        else:
            split = qkv.reshape(b, heads, 3, c // heads, -1)
            q, k, v = (split[:, :, i].reshape(b, c, -1).transpose(1, 2) for i in range(3))
        h = self.attention(q, k, v, heads).transpose(1, 2)
        return x + self.layer(f"{name}.proj_out", h).reshape(x.shape)

    def cross_attention(self, name, x, context, heads):
        context = x if context is None else context
        q = self.layer(f"{name}.to_q", x)
        k, v = self.layer(f"{name}.to_k", context), self.layer(f"{name}.to_v", context)
        return self.layer(f"{name}.to_out.0", self.attention(q, k, v, heads))

    def transformer(self, name, x, context, alone):
        b, c, height, width = x.shape
        heads = self.heads(c)
        linear = self.fields.get("use_linear_in_transformer")
        h = self.norm(f"{name}.norm", x, eps=1e-6)
        h = h if linear else self.layer(f"{name}.proj_in", h)
        h = h.flatten(2).transpose(1, 2)
        h = self.layer(f"{name}.proj_in", h) if linear else h
        depth = 0
        while self.has(f"{name}.transformer_blocks.{depth}.norm1"):
            block = f"{name}.transformer_blocks.{depth}"
            seen = context[depth] if isinstance(context, tuple) else context
            first = seen if alone else None
            h = h + self.cross_attention(
                f"{block}.attn1", self.layer_norm(f"{block}.norm1", h), first, heads
            )
            h = h + self.cross_attention(
                f"{block}.attn2", self.layer_norm(f"{block}.norm2", h), seen, heads
            )
            inner = self.layer(f"{block}.ff.net.0.proj", self.layer_norm(f"{block}.norm3", h))
            value, gate = inner.chunk(2, -1)
            h = h + self.layer(f"{block}.ff.net.2", value * self.F.gelu(gate))
            depth += 1
        h = self.layer(f"{name}.proj_out", h) if linear else h
        h = h.transpose(1, 2).unflatten(2, (height, width))
        return x + (h if linear else self.layer(f"{name}.proj_out", h))

    def attend(self, name, h, context, alone):
        if self.has(f"{name}.qkv"):
            return self.attention_block(name, h)
        if self.has(f"{name}.proj_in"):
            return self.transformer(name, h, context, alone)
        return h

    def __call__(self, x, t, context, y):
        """Run the blocks in the order of their names; what a block holds says what it is."""
        torch, F, fields = self.torch, self.F, self.fields
        emb = self.mlp("time_embed", self.sinusoids(t))
        emb = emb if y is None else emb + self.label(y)
        blocks, last = fields["num_res_blocks"] + 1, len(fields["channel_mult"]) - 1
        alone = fields.get("disable_self_attentions", (False,) * (last + 1))
        same, pooled = lambda h: h, lambda h: F.avg_pool2d(h, 2)
        nearest = lambda h: F.interpolate(h, scale_factor=2, mode="nearest")
        h = self.layer("input_blocks.0.0", x)
        skips = [h]
        for n in range(1, (last + 1) * blocks):
            name = f"input_blocks.{n}"
            if self.has(f"{name}.0.op"):
                h = self.layer(f"{name}.0.op", h, stride=2)
            elif n % blocks:
                h = self.res_block(f"{name}.0", h, emb, same)
                h = self.attend(f"{name}.1", h, context, alone[n // blocks])
            else:
                down = self.has(f"{name}.0.in_layers.0")
                h = self.res_block(f"{name}.0", h, emb, pooled) if down else pooled(h)
            skips.append(h)
        h = self.res_block("middle_block.0", h, emb, same)
        h = self.attend("middle_block.1", h, context, fields.get("disable_middle_self_attn", False))
        h = self.res_block("middle_block.2", h, emb, same)
        for n in range((last + 1) * blocks):
            name, level = f"output_blocks.{n}", last - n // blocks
            h = self.res_block(f"{name}.0", torch.cat([h, skips.pop()], 1), emb, same)
            h = self.attend(f"{name}.1", h, context, alone[level])
            if level and n % blocks == blocks - 1:
                ups = [i for i in (1, 2) if self.has(f"{name}.{i}.in_layers.0")]
                convs = [i for i in (1, 2) if self.has(f"{name}.{i}.conv")]
                h = self.res_block(f"{name}.{ups[0]}", h, emb, nearest) if ups else nearest(h)
                h = self.layer(f"{name}.{convs[0]}.conv", h) if convs else h
        if self.has("id_predictor.0"):
            return self.layer("id_predictor.1", self.norm("id_predictor.0", h))
        return self.layer("out.2", F.silu(self.norm("out.0", h)))


def run_torch(fields, drawn, names):
    """The same results by TorchUNet; names: {released name: shape} of the parameters."""
    torch = pytest.importorskip("torch")
    weights = {
        name: torch.from_numpy(fixtures.numbers(name, shape)).requires_grad_()
        for name, shape in names.items()
    }
    tensors = jax.tree.map(torch.from_numpy, drawn)
    x = tensors["x"].permute(0, 3, 1, 2).requires_grad_()
    output = TorchUNet(fields, weights)(x, tensors["t"], tensors["context"], tensors["y"])
    output = output.permute(0, 2, 3, 1)
    (output * tensors["cotangent"]).sum().backward()
    results = {"output": output.detach().numpy(), "x": x.grad.permute(0, 2, 3, 1).numpy()}
    return results | {name: weight.grad.numpy() for name, weight in weights.items()}


PLAIN = fixtures.COMMON | {"attention_resolutions": (1, 2), "num_heads": 4}
TRANSFORMER = fixtures.TRANSFORMER | {"attention_resolutions": (1, 2)}
FORMULAS = {
    "average_pooling": (PLAIN | {"conv_resample": False}, {}),
    "new_attention_order": (PLAIN | {"use_new_attention_order": True}, {}),
    "resblock_updown_with_attention": (
        PLAIN | {"resblock_updown": True, "use_scale_shift_norm": True},
        {},
    ),
    "no_middle_attention": (PLAIN | {"disable_middle_transformer": True}, {}),
    "codebook_logits": (PLAIN | {"n_embed": 3}, {}),
    "transformer_without_context": (TRANSFORMER | {"context_dim": None}, {"context": None}),
    "a_context_per_block": (
        TRANSFORMER | {"transformer_depth": 2, "context_dim": (24, 16)},
        {
            "context": tuple(
                fixtures.numbers(f"context{d}", (fixtures.BATCH, 3 + d, d)) for d in (24, 16)
            )
        },
    ),
    "self_attention_off": (
        TRANSFORMER | {"disable_self_attentions": (False, True), "disable_middle_self_attn": True},
        {},
    ),
    "labels_and_linear_projections": (
        TRANSFORMER | {"num_classes": 10, "use_linear_in_transformer": True},
        {"y": np.array([0, 9], np.int32)},
    ),
    "continuous_class": (
        PLAIN | {"num_classes": "continuous"},
        {"y": np.array([-1.5, 2.0], np.float32)},
    ),
    "timestep_class": (
        PLAIN | {"num_classes": "timestep"},
        {"y": np.array([0.5, 900.0], np.float32)},
    ),
    "sequential_class": (
        PLAIN | {"num_classes": "sequential", "adm_in_channels": 7},
        {"y": fixtures.numbers("y", (2, 7))},
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_agrees_with_the_formulas(name):
    fields, changed = FORMULAS[name]
    kind = "condition" if fields.get("context_dim") else "plain"
    drawn = fixtures.inputs(fixtures.Case(fields, kind, {})) | changed
    ours = run_ours(fields, drawn)
    names = {k: v.shape for k, v in ours.items() if k not in ("output", "x")}
    assert_agree(ours, run_torch(fields, drawn, names))
