import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.train.checkpoints.saving import open_checkpoints
from diffusion_jax.train.checkpoints.warm_start import warm_start, warm_start_mutable
from diffusion_jax.train.ema import ema
from diffusion_jax.train.state import init_state


def params(value, channels=3, extra=()):
    tree = {
        "network": {
            "input_blocks_0_0": {"kernel": jnp.full((channels, 8), value)},
            "out_2": {"kernel": jnp.full((8, channels), value), "bias": jnp.full(channels, value)},
        },
        "conditioner": {"label": {"embedding": jnp.full((10, 4), value)}},
    }
    for name in extra:
        tree["network"][name] = {"kernel": jnp.full(2, value)}
    return tree


@pytest.fixture
def run(tmp_path):
    state = init_state(params(1.0), optax.chain(optax.sgd(0.1), ema()))
    *rest, average = state.opt_state
    average = average._replace(params=params(2.0))
    checkpoints = open_checkpoints(tmp_path / "run" / "checkpoints")
    checkpoints.save(5, state._replace(opt_state=(*rest, average)), {})
    checkpoints.close()
    return tmp_path / "run"


def values(tree):
    return jax.tree.map(lambda x: float(np.asarray(x).flat[0]), tree)


def test_takes_everything(run):
    for path in (run, run / "checkpoints" / "5"):
        start = warm_start(params(0.0), path)
        assert values(start.params) == values(params(1.0))
        assert (start.not_loaded, start.unused) == ([], [])


def test_takes_the_averages_on_request(run):
    assert values(warm_start(params(0.0), run, ema=True).params) == values(params(2.0))


def test_lists_what_was_not_loaded_and_what_was_left(run):
    own = params(0.0, extra=["new"])
    del own["conditioner"]
    start = warm_start(own, run)
    assert start.not_loaded == ["network/new/kernel"]
    assert start.unused == ["conditioner/label/embedding"]
    assert values(start.params)["network"]["new"]["kernel"] == 0.0
    assert values(start.params)["network"]["out_2"]["kernel"] == 1.0


@pytest.mark.parametrize("ignore", ["network/out_2", r"network/out_\d+/(kernel|bias)", ".*out"])
def test_ignored_keys_keep_their_initial_values(run, ignore):
    start = warm_start(params(0.0), run, ignore_keys=[ignore])
    assert sorted(start.not_loaded) == ["network/out_2/bias", "network/out_2/kernel"]
    assert sorted(start.unused) == sorted(start.not_loaded)
    assert values(start.params)["network"]["out_2"] == {"kernel": 0.0, "bias": 0.0}
    assert values(start.params)["network"]["input_blocks_0_0"] == {"kernel": 1.0}


def test_only_the_unet(run):
    start = warm_start(params(0.0), run, load_only_unet=True)
    assert start.not_loaded == ["conditioner/label/embedding"]
    assert values(start.params)["network"] == values(params(1.0))["network"]


def test_other_shapes_are_an_error_unless_ignored(run):
    with pytest.raises(ValueError, match=r"input_blocks_0_0/kernel \(3, 8\) \(here \(4, 8\)\)"):
        warm_start(params(0.0, channels=4), run)
    ignore = ["network/input_blocks_0_0", "network/out_2"]
    start = warm_start(params(0.0, channels=4), run, ignore_keys=ignore)
    assert len(start.not_loaded) == 3


def test_nothing_in_common_is_an_error(run):
    with pytest.raises(ValueError, match="nothing was loaded from checkpoint 5 .* this run has w"):
        warm_start({"w": jnp.zeros(3)}, run)


def test_shardings_and_dtypes_stay(run):
    mesh = Mesh(np.asarray(jax.devices()), ("fsdp",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    own = params(0.0)
    kernel = jax.device_put(jnp.zeros((3, 8), jnp.bfloat16), sharding)
    own["network"]["input_blocks_0_0"]["kernel"] = kernel
    got = warm_start(own, run).params["network"]["input_blocks_0_0"]["kernel"]
    assert (got.sharding, got.dtype) == (sharding, jnp.bfloat16)


def test_running_statistics_are_taken_too(tmp_path):
    state = init_state(params(1.0), optax.sgd(0.1))
    mean = {"discriminator": {"batch_stats": {"main_3": {"mean": jnp.arange(4.0)}}}}
    checkpoints = open_checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state._replace(mutable=mean), {})
    checkpoints.close()
    zeros = {**jax.tree.map(jnp.zeros_like, mean), "regularizer": {"codebook": jnp.zeros(2)}}
    found = warm_start_mutable(zeros, tmp_path)
    assert found["discriminator"]["batch_stats"]["main_3"]["mean"].tolist() == [0, 1, 2, 3]
    assert found["regularizer"]["codebook"].tolist() == [0, 0]
    kept = warm_start_mutable(zeros, tmp_path, ignore_keys=["discriminator/"])
    assert kept["discriminator"]["batch_stats"]["main_3"]["mean"].tolist() == [0] * 4
    wider = {"discriminator": {"batch_stats": {"main_3": {"mean": jnp.zeros(5)}}}}
    with pytest.raises(ValueError, match="has other shapes: discriminator/batch_stats/main_3/mean"):
        warm_start_mutable(wider, tmp_path)


def test_a_run_without_mutable_collections_gives_none(run):
    assert warm_start_mutable({}, run) == {}
