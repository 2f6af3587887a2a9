"""A first stage's training checkpoint: released names and shapes exactly, both ways, mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import autoencoder_fixtures as fixtures

from diffusion_jax.convert.weights.first_stage import (
    TRAINING,
    import_first_stage,
    import_lpips,
    join_parts,
    save_first_stage,
    split_parts,
)
from diffusion_jax.convert.weights.names import file_tensors
from diffusion_jax.convert.weights.reading import open_weights
from diffusion_jax.models.first_stage.autoencoder import Autoencoder
from diffusion_jax.models.first_stage.lpips import param_shapes
from diffusion_jax.models.first_stage.patchgan import NLayerDiscriminator
from diffusion_jax.models.first_stage.quantizers import (
    EMAVectorQuantizer,
    GumbelQuantizer,
    VectorQuantizer,
)

KL_F8 = dict(embed_dim=4, z_channels=4)
VQ_F4 = dict(embed_dim=3, z_channels=3, ch_mult=(1, 2, 4), double_z=False)
TINY = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, resolution=16)
IMAGE = jnp.zeros((1, 64, 64, 3))
# Of taming-transformers' LPIPS: torchvision's VGG16 in five slices, and a linear layer for each.
VGG = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}


def parts(fields, quantizer=None, *, learn_logvar=False, **disc):
    """Shapes of (params, mutable) of a first stage."""
    key, z = jax.random.key(0), jnp.zeros((1, 1, 1, fields["embed_dim"]))
    shapes = jax.eval_shape(Autoencoder(**fields).init, key, IMAGE)["params"]
    judged = jax.eval_shape(NLayerDiscriminator(**disc).init, key, IMAGE)
    codes = {} if quantizer is None else jax.eval_shape(quantizer.init, key, z)
    if "params" in codes:
        shapes = {**shapes, "quantize": codes["params"]}
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    params = {
        "autoencoder": shapes,
        "loss": {"logvar": scalar} if learn_logvar else {},
        "discriminator": judged["params"],
    }
    return params, {
        "regularizer": {k: v for k, v in codes.items() if k != "params"},
        "discriminator": {k: v for k, v in judged.items() if k != "params"},
    }


def lpips_shapes(net):
    of = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.tree.map(of, param_shapes(net), is_leaf=lambda node: isinstance(node, tuple))


def names_of(tree):
    return {tensor.name: tensor.shape for tensor in file_tensors(tree, TRAINING)}


def released_lpips():
    """Names and shapes that latent-diffusion's LPIPS has, but for its constants."""
    widths = {1: 64, 2: 128, 3: 256, 4: 512, 5: 512}
    found = {f"lin{i - 1}.model.1.weight": (1, width, 1, 1) for i, width in widths.items()}
    inputs = 3
    for part, places in VGG.items():
        for place in places:
            found[f"net.slice{part}.{place}.weight"] = (widths[part], inputs, 3, 3)
            found[f"net.slice{part}.{place}.bias"] = (widths[part],)
            inputs = widths[part]
    return found


@pytest.mark.parametrize("fields", [KL_F8, VQ_F4], ids=["kl-f8", "vq-f4"])
def test_every_name_and_shape_is_the_released_one(fields):
    quantizer = None if fields == KL_F8 else VectorQuantizer(8192, 3)
    params, mutable = parts(fields, quantizer)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    found = names_of(join_parts(params, mutable, logvar=scalar, lpips=lpips_shapes("vgg16")))
    disc = {
        f"loss.discriminator.{name}": shape
        for name, shape in fixtures.read_names()["disc_nlayer3"].items()
        if not name.endswith("num_batches_tracked")
    }
    lpips = {f"loss.perceptual_loss.{name}": shape for name, shape in released_lpips().items()}
    z, e = (8, 8) if fields == KL_F8 else (3, 3)
    wanted = disc | lpips | {"loss.logvar": ()}
    wanted |= {"quant_conv.weight": (e, z, 1, 1), "quant_conv.bias": (e,)}
    z = fields["z_channels"]
    wanted |= {"post_quant_conv.weight": (z, z, 1, 1), "post_quant_conv.bias": (z,)}
    wanted |= {} if fields == KL_F8 else {"quantize.embedding.weight": (8192, 3)}
    networks = {n: s for n, s in found.items() if n.startswith(("encoder.", "decoder."))}
    assert {n: s for n, s in found.items() if n not in networks} == wanted
    if fields == KL_F8:
        released = fixtures.read_names()
        for part in ("encoder", "decoder"):
            theirs = {f"{part}.{n}": s for n, s in released[f"vae_klf8_{part}"].items()}
            assert {n: s for n, s in networks.items() if n.startswith(part)} == theirs
    else:
        assert sum(map(np.prod, networks.values())) == 22_337_411 + 32_960_771


def test_names_of_other_codebooks_norms_and_nets():
    fields = TINY | dict(embed_dim=4, double_z=False)
    act = dict(ndf=4, n_layers=1, use_actnorm=True)
    gumbel = names_of(join_parts(*parts(fields, GumbelQuantizer(4, 4, 7), **act)))
    assert gumbel["quantize.embed.weight"] == (7, 4)
    assert gumbel["quantize.proj.weight"] == (7, 4, 1, 1)
    assert gumbel["loss.discriminator.main.3.loc"] == (1, 8, 1, 1)
    assert gumbel["loss.discriminator.main.3.scale"] == (1, 8, 1, 1)
    tree = join_parts(*parts(fields, EMAVectorQuantizer(7, 4)), lpips=lpips_shapes("alexnet"))
    averaged = names_of(tree)
    assert averaged["quantize.embedding.weight"] == averaged["quantize.embedding.embed_avg"]
    assert averaged["quantize.embedding.cluster_size"] == (7,)
    convs = {n for n in averaged if n.startswith("loss.perceptual_loss.net.") and "weight" in n}
    places = ("slice1.0", "slice2.3", "slice3.6", "slice4.8", "slice5.10")
    assert convs == {f"loss.perceptual_loss.net.{place}.weight" for place in places}


CASES = {
    "kl": (dict(embed_dim=4), None, dict(learn_logvar=True)),
    "vq": (dict(embed_dim=3, z_channels=3, double_z=False), VectorQuantizer(7, 3), {}),
    "ema_vq": (dict(embed_dim=4, double_z=False), EMAVectorQuantizer(7, 4), {}),
    "gumbel": (dict(embed_dim=4, double_z=False), GumbelQuantizer(4, 4, 7), dict(use_actnorm=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_was_written_is_read_back_whole(name, draw, same, tmp_path):
    fields, quantizer, options = CASES[name]
    shapes = parts(TINY | fields, quantizer, ndf=4, n_layers=2, **options)
    params, mutable = draw(shapes)
    lpips = draw(lpips_shapes("alexnet"))
    logvar = None if "logvar" in params["loss"] else np.float32(0.25)
    tree = join_parts(params, mutable, logvar=logvar, lpips=lpips)
    assert same(split_parts(tree, params, mutable), (params, mutable))
    path = tmp_path / "last.safetensors"
    save_first_stage(path, tree)
    weights = open_weights(path)
    assert weights.tensors["loss.logvar"].shape == ()
    zeros = jax.tree.map(jnp.zeros_like, (params, mutable))
    found = import_first_stage(*zeros, weights)
    assert same((found.params, found.mutable), (params, mutable)) and not found.not_loaded
    assert same(import_lpips(weights, "alexnet"), lpips)


@pytest.fixture
def tiny(draw):
    return draw(parts(TINY | dict(embed_dim=4), ndf=4, n_layers=1))


def test_a_file_without_an_adversary_leaves_it_as_it_was(tiny, same, tmp_path):
    from diffusion_jax.convert.weights.exporting import export_params, save_weights

    params, mutable = tiny
    path = tmp_path / "vae.safetensors"
    save_weights(path, [export_params(params["autoencoder"], "vae_ldm", "first_stage_model.")])
    start = jax.tree.map(lambda leaf: jnp.asarray(leaf) + 1.0, tiny)
    found = import_first_stage(*start, open_weights(path))
    assert same(found.params["autoencoder"], params["autoencoder"])
    assert same(found.params["discriminator"], start[0]["discriminator"])
    assert same(found.mutable, start[1]) and found.not_loaded == ["loss.discriminator"]
    with pytest.raises(ValueError, match="holds no weights of LPIPS"):
        import_lpips(open_weights(path), "vgg16")


def test_what_does_not_fit_is_named(tiny, draw, tmp_path):
    params, mutable = tiny
    path = tmp_path / "last.safetensors"
    save_first_stage(path, join_parts(params, mutable, lpips=draw(lpips_shapes("alexnet"))))
    weights = open_weights(path)
    wider = draw(parts(TINY | dict(embed_dim=4), ndf=8, n_layers=1))
    with pytest.raises(ValueError, match=r"of another shape: loss\.discriminator\.main\.0"):
        import_first_stage(*wider, weights)
    kept = import_first_stage(*wider, weights, ignore_keys=(r"loss\.discriminator",))
    assert kept.params["discriminator"] is not None
    np.testing.assert_array_equal(
        kept.params["discriminator"]["main_0"]["kernel"],
        wider[0]["discriminator"]["main_0"]["kernel"],
    )
    vq = draw(
        parts(TINY | dict(embed_dim=4, double_z=False), VectorQuantizer(7, 4), ndf=4, n_layers=1)
    )
    with pytest.raises(ValueError, match=r"missing: quantize\.embedding\.weight"):
        import_first_stage(*vq, weights)
    with pytest.raises(
        ValueError, match="holds LPIPS over alexnet, and config.perceptual.net is 'vgg16'"
    ):
        import_lpips(weights, "vgg16")
