"""Import: exact numbers, strictness, averages, shardings, and how much the host holds."""

import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support.released_unets import video_shapes

from diffusion_jax.convert.weights.exporting import Exported, export_params, save_weights
from diffusion_jax.convert.weights.importing import cyclic, import_network, import_params
from diffusion_jax.convert.weights.names import file_tensors, leaves_of
from diffusion_jax.convert.weights.reading import Weights, open_weights
from diffusion_jax.convert.weights.safetensors import LazyTensor
from diffusion_jax.models.layers.transformer import stack_blocks
from diffusion_jax.models.unet.video_unet import VideoUNet

PREFIX = "model.diffusion_model."
VIDEO = {
    "out_channels": 4,
    "channel_mult": (1,),
    "num_res_blocks": 0,
    "num_head_channels": 16,
    "use_linear_in_transformer": True,
}
SMALL = {"channel_mult": (1,), "attention_resolutions": (1,), "transformer_depth": 1}


def in_memory(arrays, name="x.safetensors"):
    """Weights that need no file."""

    def tensor(array):
        return LazyTensor(tuple(array.shape), np.dtype(array.dtype), lambda: array)

    return Weights(Path(name), {key: tensor(array) for key, array in arrays.items()})


@pytest.fixture(scope="module")
def small(unet, draw):
    """Shapes of a small UNet, its parameters, and them as a file of Stable Diffusion has them."""
    tree = unet(**SMALL)
    params = draw(tree)
    arrays = dict(export_params(params, "unet_ldm", PREFIX).tensors)
    return tree, params, arrays


@pytest.mark.parametrize("name_map", ["unet_ldm", "unet_diffusers"])
def test_a_unet_survives_and_its_stacked_twin(name_map, unet, draw, same, tmp_path):
    tree, stacked = unet(), unet(scan=True)
    params, path = draw(tree), tmp_path / "x.safetensors"
    save_weights(path, [export_params(params, name_map)])
    read = import_network(tree, path, "unet")
    assert same(read, params)
    scanned = import_network(stacked, path, "unet")
    assert same(scanned, stack_blocks(params))
    again = tmp_path / "again.safetensors"
    save_weights(again, [export_params(scanned, name_map)])
    assert same(import_network(tree, again, "unet"), params)


@pytest.mark.parametrize("name_map", ["unet_ldm", "unet_diffusers"])
def test_a_video_unet_survives_and_its_stacked_twin(name_map, draw, same):
    fields = VIDEO | {"transformer_depth": 2, "merge_strategy": "learned"}
    tree = video_shapes(VideoUNet(**fields))
    stacked = video_shapes(VideoUNet(**fields, scan=True))
    params = draw(tree)
    weights = in_memory(dict(export_params(params, name_map).tensors))
    assert same(import_network(tree, weights, "unet"), params)
    scanned = import_network(stacked, weights, "unet")
    assert same(scanned, stack_blocks(params))
    again = in_memory(dict(export_params(scanned, name_map).tensors))
    assert same(import_network(tree, again, "unet"), params)


def test_fixed_factors_of_a_video_unet_are_options(draw, same):
    """A file has them, the network's parameters have not."""
    fixed = video_shapes(VideoUNet(**VIDEO))
    learned = draw(video_shapes(VideoUNet(**VIDEO, merge_strategy="learned")))
    arrays = dict(export_params(learned, "unet_ldm").tensors)
    read = import_network(fixed, in_memory(arrays), "unet")
    assert same(read["input_blocks_0_0"], learned["input_blocks_0_0"])
    factor = arrays.pop("middle_block.0.time_mixer.mix_factor")
    assert factor.shape == (1,)
    with pytest.raises(ValueError, match="1 missing: middle_block.0.time_mixer.mix_factor"):
        import_network(jax.eval_shape(lambda: learned), in_memory(arrays), "unet")


@pytest.mark.parametrize("name_map", ["vae_ldm", "vae_diffusers"])
def test_an_autoencoder_survives(name_map, vae, draw, same):
    tree = vae()
    arrays = dict(export_params(draw(tree), name_map, "vae.").tensors)
    assert same(import_network(tree, in_memory(arrays), "vae"), draw(tree))


@pytest.mark.parametrize(
    ("kind", "name_map"),
    [
        ("text", "clip_text_hf"),
        ("text", "clip_text_open"),
        ("vision", "clip_vision_hf"),
        ("vision", "clip_vision_open"),
    ],
)
def test_clip_towers_survive(kind, name_map, text, vision, draw, same):
    tree = {"text": text, "vision": vision}[kind]
    params = draw(tree)
    prefix = "a.visual." if name_map == "clip_vision_open" else "a."
    weights = in_memory(dict(export_params(params, name_map, prefix).tensors))
    assert same(import_network(tree, weights, f"clip {kind}"), params)


def test_openclip_joins_queries_keys_and_values(text, draw):
    params = draw(text)
    arrays = dict(export_params(params, "clip_text_open").tensors)
    whole = arrays["transformer.resblocks.1.attn.in_proj_weight"]
    attention = params["encoder"]["layers_1"]["self_attn"]
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        np.testing.assert_array_equal(whole[16 * i : 16 * (i + 1)], attention[name]["kernel"].T)
    np.testing.assert_array_equal(arrays["text_projection"], params["text_projection"]["kernel"])


def test_other_names_and_shapes_of_the_same_numbers_are_read(vae, text, draw, same):
    """Attention of old VAEs by diffusers, 1 x 1 convolutions for dense layers, transformers 5."""
    tree = vae()
    arrays = dict(export_params(draw(tree), "vae_diffusers").tensors)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, array in arrays.items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        renamed[name] = array[..., None, None] if "query.weight" in name else array
    assert set(renamed) != set(arrays)
    assert same(import_network(tree, in_memory(renamed), "vae"), draw(tree))
    arrays = dict(export_params(draw(text), "clip_text_hf").tensors)
    bare = {name.removeprefix("text_model."): array for name, array in arrays.items()}
    bare["embeddings.position_ids"] = np.arange(5)
    assert same(import_network(text, in_memory(bare), "clip text"), draw(text))


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_the_rest_of_a_whole_clip_is_left_aside(kind, text, vision, draw, same):
    """openai/clip-vit-large-patch14 in one file: both towers, both projections, a temperature."""
    both = {"text": draw(text), "vision": draw(vision)}
    arrays = {"logit_scale": np.ones((), np.float32)}
    for name, params in both.items():
        arrays |= dict(export_params(params, f"clip_{name}_hf").tensors)
    tree = {"text": text, "vision": vision}[kind]
    assert same(import_network(tree, in_memory(arrays), f"clip {kind}"), both[kind])
    projection = {"text": "text_projection", "vision": "visual_projection"}[kind]
    bare = {name: child for name, child in tree.items() if name != projection}
    read = import_network(bare, in_memory(arrays), f"clip {kind}")
    assert same(read, {name: both[kind][name] for name in bare})


def test_a_projection_written_as_a_dense_layer_is_turned(text, draw, same):
    """SDXL's second encoder by newer exporters: text_projection.weight is [out in]."""
    arrays = dict(export_params(draw(text), "clip_text_open", "a.").tensors)
    arrays["a.text_projection.weight"] = arrays.pop("a.text_projection").T
    assert same(import_network(text, in_memory(arrays), "clip text"), draw(text))
    bare = {name: child for name, child in text.items() if name != "text_projection"}
    import_network(bare, in_memory(arrays), "clip text")


def test_whole_numbers_are_no_weights(small):
    tree, _, arrays = small
    held = arrays | {f"{PREFIX}out.2.weight": np.ones((4, 32, 3, 3), np.int8)}
    with pytest.raises(ValueError, match=r"1 of whole numbers, which are no .*out.2.weight int8"):
        import_network(tree, in_memory(held), "unet")


def test_whole_checkpoints_carry_what_is_no_parameter(small, same):
    tree, params, arrays = small
    for prefix in (PREFIX, "diffusion_model.", ""):
        held = {name.replace(PREFIX, prefix): array for name, array in arrays.items()}
        for buffer in ("betas", "alphas_cumprod_prev", "denoiser.sigmas", "model_ema.decay"):
            held[buffer] = np.ones(1)
        assert same(import_network(tree, in_memory(held), "unet"), params)


def test_what_does_not_fit_is_listed_at_once(small):
    tree, _, arrays = small
    held = {f"{PREFIX}out.{n}.weight": np.ones(3, np.float32) for n in (0, 7)}
    held = arrays | held
    del held[f"{PREFIX}out.2.bias"]
    with pytest.raises(ValueError) as error:
        import_network(tree, in_memory(held), "unet")
    for part in (
        f"1 missing: {PREFIX}out.2.bias; 1 unused: {PREFIX}out.7.weight; ",
        f"1 of another shape: {PREFIX}out.0.weight (3,) (here (32,))",
        "x.safetensors does not fit the network here, a UNet for 4 channels and text of width 24: ",
    ):
        assert part in str(error.value)


def test_long_lists_are_cut(small):
    tree, _, arrays = small
    held = {name: array for name, array in arrays.items() if "middle_block" not in name}
    with pytest.raises(ValueError, match=r"\d\d missing: (\S+, ){9}\S+ and \d+ more$"):
        import_network(tree, in_memory(held), "unet")


def test_patterns_relax_each_rule(small):
    tree, params, arrays = small
    initial = jax.tree.map(np.zeros_like, params)
    held = {k: v for k, v in arrays.items() if not k.endswith("out.2.bias")}
    held[f"{PREFIX}extra.weight"] = np.ones(1)
    held[f"{PREFIX}out.0.bias"] = np.ones(99)
    options = {
        "allow_missing": [r"out\.2\."],
        "allow_unused": ["extra"],
        "ignore_keys": [r"out\.0\.bias"],
    }
    read = import_network(initial, in_memory(held), "unet", **options)
    changed = {
        path for path, leaf in leaves_of(read).items() if np.any(leaf != leaves_of(initial)[path])
    }
    assert set(leaves_of(params)) - changed == {"out_2/bias", "out_0/bias"}
    for name in options:
        fewer = {k: v for k, v in options.items() if k != name}
        with pytest.raises(ValueError, match="does not fit"):
            import_network(initial, in_memory(held), "unet", **fewer)
    with pytest.raises(ValueError, match="does not have out_0/bias, out_2/bias.*initial"):
        import_network(tree, in_memory(held), "unet", **options)


def test_a_stack_is_there_as_a_whole(unet, draw):
    params = draw(unet(scan=True))
    arrays = dict(export_params(params, "unet_ldm").tensors)
    held = {k: v for k, v in arrays.items() if "transformer_blocks.1" not in k}
    with pytest.raises(ValueError, match="only 1 of the 2 blocks of .*transformer_blocks/"):
        import_params(params, in_memory(held), "unet_ldm", allow_missing=["."])


def averaged(arrays):
    return {
        "model_ema." + name.removeprefix("model.").replace(".", ""): array + 1
        for name, array in arrays.items()
    }


def test_averages_are_read_when_asked_for(unet, draw, same):
    tree = unet()
    params = draw(tree)
    arrays = dict(export_params(params, "unet_ldm", PREFIX).tensors)
    twins = averaged(arrays)
    assert "model_ema.diffusion_modelinput_blocks00weight" in twins and len(twins) > 100
    held = arrays | twins | {"model_ema.decay": np.ones(()), "model_ema.num_updates": np.ones(())}
    read = import_network(tree, in_memory(held), "unet", ema=True)
    assert same(read, jax.tree.map(lambda leaf: leaf + 1, params))
    assert same(import_network(tree, in_memory(held), "unet"), params)
    alone = import_network(tree, in_memory(twins), "unet", ema=True)
    assert same(alone, read)
    with pytest.raises(ValueError, match="holds no unet"):
        import_network(tree, in_memory(twins), "unet")
    held["model_ema.diffusion_modelextra"] = np.ones(1)
    with pytest.raises(ValueError, match="1 unused: .*model_ema.diffusion_modelextra"):
        import_network(tree, in_memory(held), "unet", ema=True)
    few = dict(list(twins.items())[:100])
    with pytest.raises(ValueError, match=r"no averages \(EMA\): 100 of its names start with"):
        import_network(tree, in_memory(arrays | few), "unet", ema=True)


def test_averages_are_written_as_they_are_read(unet, draw, same):
    tree = unet()
    params = draw(tree)
    arrays = dict(export_params(params, "unet_ldm", PREFIX).tensors)
    twins = dict(export_params(params, "unet_ldm", PREFIX, ema=True).tensors)
    assert set(twins) == set(averaged(arrays))
    assert same(import_network(tree, in_memory(arrays | twins), "unet", ema=True), params)


def test_more_input_channels_start_at_zero(small, unet):
    _, params, arrays = small
    wide = unet(9, **SMALL)
    read = import_network(wide, in_memory(arrays), "unet", keep_dims=4)
    kernel = read["input_blocks_0_0"]["kernel"]
    np.testing.assert_array_equal(kernel[:, :, :4], params["input_blocks_0_0"]["kernel"])
    assert kernel.shape[2] == 9 and not kernel[:, :, 4:].any()
    for options in ({}, {"keep_dims": 5}):
        with pytest.raises(ValueError, match=r"1 of another shape.*\(32, 4, 3, 3\) \(here"):
            import_network(wide, in_memory(arrays), "unet", **options)


def test_unused_parameters_that_are_absent_are_zeros(small):
    tree, params, arrays = small
    held = {k: v for k, v in arrays.items() if ".out.2." not in k}
    read = import_network(tree, in_memory(held), "unet", zeros=[r"out\.[0-9]\."])
    assert not read["out_2"]["kernel"].any() and not read["out_2"]["bias"].any()
    np.testing.assert_array_equal(read["out_0"]["scale"], params["out_0"]["scale"])


def test_tensors_of_other_widths_are_repeated():
    """By the loops that Stable Diffusion 2 runs."""
    old = np.arange(24, dtype=np.float32).reshape(3, 2, 2, 2) + 1
    for shape in ((7, 5, 2, 2), (2, 1, 2, 2)):
        uses = np.ones(2)
        for j in range(shape[1]):
            uses[j % 2] += 1
        expected = np.empty(shape, np.float32)
        for i in range(shape[0]):
            for j in range(shape[1]):
                expected[i, j] = old[i % 3, j % 2] / uses[j % 2]
        np.testing.assert_allclose(cyclic(old, shape), expected, rtol=1e-6)
    np.testing.assert_array_equal(cyclic(old[:, 0, 0, 0], (5,)), old[[0, 1, 2, 0, 1], 0, 0, 0])


def test_narrow_weights_fill_a_wide_network_when_asked_to(small, unet):
    _, params, arrays = small
    wide = unet(9, model_channels=64, **SMALL)
    read = import_network(wide, in_memory(arrays), "unet", make_it_fit=True)
    kernel = params["input_blocks_0_0"]["kernel"]
    expected = np.concatenate([kernel[:, :, :1] / 4, kernel[:, :, 1:] / 3], axis=2)
    for channels in (slice(0, 32), slice(32, 64)):
        ours = read["input_blocks_0_0"]["kernel"][:, :, :4, channels]
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="of another shape"):
        import_network(wide, in_memory(arrays), "unet")


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32])
def test_numbers_get_the_dtype_of_the_target(dtype, small):
    tree, params, arrays = small
    held = {name: array.astype(dtype) for name, array in arrays.items()}
    read = import_network(tree, in_memory(held), "unet")
    expected = params["out_2"]["kernel"].astype(dtype).astype(np.float32)
    assert read["out_2"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(read["out_2"]["kernel"], expected)
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), tree)
    read = import_network(half, in_memory(arrays), "unet")
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {jnp.dtype(jnp.bfloat16)}


def test_leaves_go_into_their_shardings(unet, draw, same):
    """Every device gets its part, also of stacked blocks, split along any axis."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))

    def place(leaf):
        specs = {1: ("b",), 2: ("a", "b"), 3: ("a", None, "b"), 4: (None, None, None, "b")}
        spec = specs[len(leaf.shape)]
        fits = all(
            n % {"a": 2, "b": 4, None: 1}[s] == 0 for n, s in zip(leaf.shape, spec, strict=False)
        )
        sharding = NamedSharding(mesh, PartitionSpec(*spec if fits else ()))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    tree = jax.tree.map(place, unet(scan=True))
    params = draw(tree)
    arrays = dict(export_params(params, "unet_ldm").tensors)
    read = import_network(tree, in_memory(arrays), "unet")
    assert same(read, params)
    assert same(jax.tree.map(lambda a: a.sharding, read), jax.tree.map(lambda a: a.sharding, tree))
    sharded = read["middle_block_1"]["transformer_blocks"]["attn1"]["to_q"]["kernel"]
    assert sharded.addressable_shards[0].data.shape == (1, 64, 16)
    again = dict(export_params(read, "unet_ldm").tensors)
    assert all(np.array_equal(again[name], arrays[name]) for name in arrays)


def test_files_of_another_family_are_named(released):
    """Nothing is loaded: only shapes are compared."""
    tree, names = released

    def file(name):
        def refuse():
            raise AssertionError("loaded")

        tensors = {
            f"{PREFIX}{key}": LazyTensor(shape, np.dtype(np.float16), refuse)
            for key, shape in names[name].items()
        }
        return Weights(Path("sd2.safetensors"), tensors)

    with pytest.raises(ValueError) as error:
        import_network(tree("sdxl_base"), file("sd21"), "unet")
    assert "sd2.safetensors does not fit: it holds a Stable Diffusion 2 UNet, and the network" in (
        str(error.value)
    )
    assert "network here is an SDXL base UNet: " in str(error.value)


def test_an_autoencoder_is_no_unet(vae, unet, draw):
    arrays = dict(export_params(draw(vae()), "vae_ldm").tensors)
    with pytest.raises(ValueError, match="vae.safetensors holds no unet, but a vae$"):
        import_network(unet(), in_memory(arrays, "vae.safetensors"), "unet")


def large_file(tmp_path):
    """16 matrices of 1 MiB, a stack of 8 such, and a matrix as large as the stack."""
    sides = [512] * 16 + [1448]
    tree = {
        f"out_{i}": {"kernel": jax.ShapeDtypeStruct((side, side), jnp.float32)}
        for i, side in enumerate(sides)
    }
    tree["transformer_blocks"] = {"kernel": jax.ShapeDtypeStruct((8, 512, 512), jnp.float32)}
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), tree)
    path = tmp_path / "x.safetensors"
    save_weights(path, [export_params(params, "dotted")])
    return tree, path


def test_the_host_holds_one_tensor_at_a_time(tmp_path):
    """NumPy's memory beside the parameters: at most 1.5 times the largest tensor."""
    tree, path = large_file(tmp_path)
    largest = 4 * 1448**2
    for dtype in (jnp.float32, jnp.bfloat16):
        wanted = jax.tree.map(lambda leaf, d=dtype: jax.ShapeDtypeStruct(leaf.shape, d), tree)
        import_params(wanted, open_weights(path), "dotted")
        tracemalloc.start()
        read = import_params(wanted, open_weights(path), "dotted")
        jax.block_until_ready(read)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 0.9 * largest < peak < 1.6 * largest


def test_export_holds_one_tensor_at_a_time(tmp_path):
    tree, path = large_file(tmp_path)
    params = import_params(tree, open_weights(path), "dotted")
    tracemalloc.start()
    exported = export_params(params, "dotted", dtype=jnp.float16)
    save_weights(tmp_path / "y.safetensors", [exported, Exported({}, iter(()))])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The half-precision copy, and a slab of it while it is written.
    assert peak < 1.5 * 4 * 1448**2
    assert len(file_tensors(params, "dotted")) == 25


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16, np.float64])
def test_numbers_that_are_none_are_counted_and_the_first_is_named(dtype):
    params = {"b": np.ones(3, np.float32), "a": np.ones((2, 4), np.float32)}
    arrays = {"b": np.array([np.nan, 1, -np.inf], dtype), "a": np.ones((2, 4), dtype)}
    weights = in_memory({name: array for name, array in arrays.items()})
    with pytest.raises(ValueError, match="holds 2 NaN or infinite numbers in 1 tensors, the .* b;"):
        import_params(params, weights, "dotted")
    found = import_params(params, weights, "dotted", nonfinite=True)
    np.testing.assert_array_equal(found["b"], arrays["b"].astype(np.float32))
