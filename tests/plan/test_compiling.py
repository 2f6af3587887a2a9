"""The plan of a real train step on fake devices: its bytes are those that arrays really take, its
FLOPs those of the traced program."""

import json

import jax
import pytest

from diffusion_jax.devices.chips import GIB
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.plan import DoesNotFit, find_topology, make_plan
from diffusion_jax.plan.compiling import _out_of_memory, build, with_remat
from diffusion_jax.plan.memory import held_bytes
from diffusion_jax.plan.report import advice, as_dict, as_text
from diffusion_jax.plan.topology import Topology
from diffusion_jax.runs.arguments import arguments_of

MNIST = "configs/mnist.py:tiny"
FSDP = ["--config.mesh.data=1", "--config.mesh.fsdp=-1"]


@pytest.fixture(scope="module")
def plan():
    config = load_config(MNIST, ["--config.model.model_channels=8", "--config.model.remat=True"])
    return make_plan(config, find_topology("h100:2"), 3)


def test_the_batch_is_per_device(plan):
    assert (plan.batch_size, plan.per_device_batch) == (6, 3)


def test_arguments_are_the_bytes_that_the_compiler_counts(plan):
    assert plan.arguments == sum(plan.held) - plan.unread
    assert plan.total >= plan.arguments + plan.temporaries
    assert plan.held.ema == plan.held.parameters
    # Two moments, and a counter or two.
    assert 0 < plan.held.moments - 2 * plan.held.parameters < 64


def test_flops_agree_with_the_traced_program(plan):
    # The CPU's compiler of older versions finds most of what remat does again, and does it once.
    lowest = plan.step_flops if jax.__version_info__ >= (0, 12) else plan.model_flops
    assert 0.98 * lowest < plan.counts.flops * 2 < 1.02 * plan.step_flops
    assert plan.model_flops < plan.step_flops < 4 / 3 * plan.model_flops


def test_the_gradient_is_summed_over_the_devices(plan):
    carried = plan.counts.collective_bytes["all-reduce"]
    assert 0 <= carried - plan.held.parameters < 1000


def test_report_and_json_say_the_same(plan):
    figures = json.loads(json.dumps(as_dict(plan)))
    assert figures["bytes"]["parameters"] == plan.held.parameters and figures["fits"] is True
    assert figures["flops"]["model_all_devices"] == plan.model_flops
    text = as_text(plan)
    assert "h100:2: 2 devices (data 2), batch 6, 3 per device, remat True" in text
    assert "of 74.15 GiB (0 %): fits" in text and "all-reduce" in text


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [[], FSDP])
def test_held_bytes_are_those_of_real_arrays(mesh):
    """An array that really lies on the devices takes on each what the arithmetic says."""
    config = load_config("configs/mnist.py", mesh)
    built = build(config, find_topology("cpu:4"), 2)
    held = held_bytes(arguments_of(built))
    state = built.init_state()
    device = built.mesh.devices.flat[-1]

    def lying_there(tree):
        shards = [s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == device)

    assert held.parameters == lying_there(state.params)
    assert held.moments + held.ema == lying_there(state.opt_state)
    assert held.frozen == lying_there(built.random_frozen())
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert held.parameters < whole if mesh else held.parameters == whole


def test_what_cannot_fit_is_told_before_it_is_compiled():
    small = find_topology("l4:2")._replace(memory=10_000)
    with pytest.raises(DoesNotFit, match=r"alone are .* GiB per device and l4:2 has") as caught:
        make_plan(load_config(MNIST, []), small, 1)
    assert caught.value.needed > caught.value.available == 10_000


def test_the_message_of_the_tpu_compiler_is_read():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (19.15G) exceeds available HBM (15.75G). HLO module: jit_f."
    )
    assert _out_of_memory(message) == (int(19.15 * GIB), int(15.75 * GIB))
    assert _out_of_memory("INVALID_ARGUMENT: something else (2G)") is None


def test_a_compiler_that_fails_is_one_sentence(monkeypatch):
    def fail(self, compiler_options=None):
        raise jax.errors.JaxRuntimeError("INTERNAL: no registers are left\nmore")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    config = load_config(MNIST, ["--config.model.model_channels=8"])
    with pytest.raises(ValueError, match="cannot compile the step for l4:1: INTERNAL.* left; this"):
        make_plan(config, find_topology("l4:1"), 2)


@pytest.mark.slow
def test_a_product_that_has_no_tiles_is_compiled_with_cublas(monkeypatch):
    """As of the gradient of two prompts of 77 tokens; a GPU that is there would try both."""
    compile, asked = jax.stages.Lowered.compile, []

    def without_tiles(self, compiler_options=None):
        asked.append(compiler_options)
        if compiler_options is None:
            raise jax.errors.JaxRuntimeError("INTERNAL: Couldn't find output tile sizes that")
        return compile(self)

    monkeypatch.setattr(jax.stages.Lowered, "compile", without_tiles)
    config = load_config(MNIST, ["--config.model.model_channels=8"])
    assert make_plan(config, find_topology("l4:1"), 2).temporaries > 0
    assert asked == [None, {"xla_gpu_enable_triton_gemm": False}]


def test_advice_names_what_is_not_done_yet():
    config = load_config(MNIST, [])
    slice_ = Topology("v5e:4x4", list(range(16)), "tpu", None, 10)
    text = advice(config, slice_, 2, needed=20, held=30)
    for idea in ("a smaller --per_device_batch", "remat=full", "mesh.fsdp=-1", "v5e:4x8"):
        assert idea in text
    done = load_config(MNIST, [*FSDP, "--config.model.remat=True"])
    nothing_else = "try a larger slice with more fsdp, as v5e:4x8"
    assert advice(done, slice_, 1, needed=20, held=5) == nothing_else


def test_advice_names_the_batch_that_fits_in_proportion():
    """4 bytes lie there, 4 samples take 16: of 12 available, 2 samples may have 8."""
    slice_ = Topology("v5e:4x4", list(range(16)), "tpu", None, 12)
    text = advice(load_config(MNIST, []), slice_, 4, needed=20, held=4)
    assert "try --per_device_batch=2 (in proportion), or" in text


def test_another_remat_leaves_the_config_alone():
    config = load_config(MNIST, ["--config.model.remat=True"])
    for remat in (False, "dots_saveable"):
        assert with_remat(config, remat).model.remat == remat and config.model.remat is True
