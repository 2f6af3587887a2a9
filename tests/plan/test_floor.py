"""The floor of a step: bytes and FLOPs against closed forms, on programs and on texts."""

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax.devices.chips import CHIPS
from diffusion_jax.plan.count import count
from diffusion_jax.plan.floor import by_kind, floor
from diffusion_jax.plan.hlo import parse

H100 = next(chip for chip in CHIPS if chip.name == "h100")


def work_of(function, *args):
    return floor(parse(jax.jit(function).lower(*args).compile().as_text()), H100)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize(("m", "k", "n", "bound"), [(512, 512, 512, "bytes"), (8, 64, 16, "bytes")])
def test_a_product_takes_the_longer_of_its_two_times(m, k, n, bound):
    work = work_of(jnp.matmul, shape(m, k), shape(k, n))
    product = by_kind(work)["matrix product"]
    flops, moved = 2 * m * k * n, 4 * (m * k + k * n + m * n)
    assert (product.flops, product.bytes) == (flops, moved)
    times = {"flops": flops / H100.peak_flops, "bytes": moved / H100.hbm_bandwidth}
    assert product.seconds == pytest.approx(times[bound]) == max(times.values())


def test_a_large_product_is_bound_by_its_flops():
    slow = H100._replace(peak_flops=1e9)
    text = jax.jit(jnp.matmul).lower(shape(256, 256), shape(256, 256)).compile().as_text()
    (product,) = (w for w in floor(parse(text), slow) if w.kind == "matrix product")
    assert product.seconds == pytest.approx(2 * 256**3 / 1e9)


def test_a_loop_counts_as_often_as_it_runs_and_slices_are_read_once():
    def scanned(x, weights):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0]

    work = work_of(scanned, shape(64, 128), shape(10, 128, 128))
    product = by_kind(work)["matrix product"]
    assert product.runs == 10 and product.flops == 10 * 2 * 64 * 128 * 128
    # Each turn reads one of the ten weights; reading all ten would move ten times as much.
    weights, activations = 4 * 10 * 128 * 128, 4 * 10 * 64 * 128
    total = sum(w.bytes for w in work)
    assert weights + 2 * activations <= total <= 4 * weights + 8 * activations


TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "/x/diffusion_jax/models/layers/norm.py"
2 "/x/site-packages/optax/transforms/_clipping.py"
3 "/x/site-packages/jax/_src/numpy/lax_numpy.py"

FunctionNames
1 "norm"

FileLocations
1 {file_name_id=1 function_name_id=1 line=32 end_line=32 column=14 end_column=28}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
3 {file_name_id=3 function_name_id=1 line=99 end_line=99 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

%moves (p.0: f32[8,4]) -> f32[4,8] {
  %p.0 = f32[8,4]{1,0} parameter(0)
  ROOT %t = f32[4,8]{1,0} transpose(%p.0), dimensions={1,0}
}

%sliced (q.0: f32[100,16], q.1: s32[]) -> f32[1,16] {
  %q.0 = f32[100,16]{1,0} parameter(0)
  %q.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %ds = f32[1,16]{1,0} dynamic-slice(%q.0, %q.1, %zero), dynamic_slice_sizes={1,16}
}

%updated (r.0: f32[100,16], r.1: f32[1,16], r.2: s32[]) -> f32[100,16] {
  %r.0 = f32[100,16]{1,0} parameter(0)
  %r.1 = f32[1,16]{1,0} parameter(1)
  %r.2 = s32[] parameter(2)
  %none = s32[] constant(0)
  %twice = f32[1,16]{1,0} add(%r.1, %r.1)
  ROOT %dus = f32[100,16]{1,0} dynamic-update-slice(%r.0, %twice, %r.2, %none)
}

ENTRY %main (x: bf16[2,8,8,16], k: bf16[32,3,3,16], m: f32[8,4], s: f32[100,16], i: s32[]) -> f32[4,8] {
  %x = bf16[2,8,8,16]{3,2,1,0} parameter(0)
  %k = bf16[32,3,3,16]{3,2,1,0} parameter(1)
  %m = f32[8,4]{1,0} parameter(2)
  %s = f32[100,16]{1,0} parameter(3)
  %i = s32[] parameter(4)
  %conv = (bf16[2,4,4,32]{3,2,1,0}, u8[0]{0}) custom-call(%x, %k), window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %y = bf16[2,4,4,32]{3,2,1,0} get-tuple-element(%conv), index=0
  %filter = (bf16[32,3,3,16]{3,2,1,0}, u8[0]{0}) custom-call(%x, %y), window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %input = (bf16[2,8,8,16]{3,2,1,0}, u8[0]{0}) custom-call(%y, %k), window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %attend = (bf16[2,4,64,64]{3,1,2,0}, u8[0]{0}) custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "64", "80"]}}}
  %product = (f32[4,4]{1,0}, s8[4194304]{0}) custom-call(%m, %m), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"]}}}
  %moved = f32[4,8]{1,0} fusion(%m), kind=kLoop, calls=%moves
  %row = f32[1,16]{1,0} fusion(%s, %i), kind=kLoop, calls=%sliced, metadata={op_name="a" stack_frame_id=3}
  %table = f32[100,16]{1,0} fusion(%s, %row, %i), kind=kLoop, calls=%updated, metadata={op_name="b" stack_frame_id=1}
  %later = ((f32[100,16]{1,0}, f32[1,16]{1,0}, s32[]), f32[100,16]{1,0}, u32[]) fusion-start(%s, %row, %i), kind=kLoop, calls=%updated
  ROOT %out = f32[4,8]{1,0} copy(%moved)
}
"""  # noqa: E501


def test_programs_of_the_gpu_compiler():
    work = {w.name: w for w in floor(parse(TEXT), H100)}
    x, k, y = 2 * 2 * 8 * 8 * 16, 2 * 32 * 9 * 16, 2 * 2 * 4 * 4 * 32
    # 4 x 4 outputs: of 3 x 3 taps the last row and column meet padding in one of four places.
    flops = 2 * 2 * 32 * 16 * (4 * 3 - 1) ** 2
    for name in ("conv", "filter", "input"):
        assert work[name].kind == "convolution" and work[name].flops == flops, name
        assert work[name].bytes == x + k + y
    # What cuBLAS may use of its workspace of 4 MiB is not counted.
    assert work["product"].kind == "matrix product" and work["product"].flops == 2 * 4 * 4 * 8
    assert work["product"].bytes == 4 * (8 * 4 + 4 * 4)
    # 4 heads of width 8: q has 2 * 8 * 8 * 16 numbers; two products with 80 keys.
    assert work["attend"].kind == "attention"
    assert work["attend"].flops == 4 * (2 * 8 * 8 * 16) * 80
    assert work["moved"].kind == work["out"].kind == "transpose, copy"
    assert work["moved"].bytes == work["out"].bytes == 2 * 4 * 32
    assert work["row"].bytes == 2 * 4 * 16 + 4  # one row of a hundred, and its index
    for name in ("table", "later"):
        assert work[name].bytes == 2 * 4 * 16 + 4, name  # the row is updated in place
    assert work["row"].kind == "optimizer" and work["table"].kind == "norm, element-wise"
    assert work["row"].place == work["table"].place == "models/layers/norm.py:32"
    assert sum(w.flops for w in work.values()) == count(parse(TEXT)).flops


# What the compiler for a v5e makes of tanh(x w) v: arrays of S(1) stay in its vector memory.
ON_A_TPU = """HloModule jit_f, is_scheduled=true

%first (param_0: bf16[1024,1024], param_1: bf16[1024,2048]) -> (f32[1024], bf16[1024,2048]) {
  %param_0 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[1024,2048]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %dot = bf16[1024,2048]{1,0:T(8,128)(2,1)} convolution(%param_0, %param_1), dim_labels=bf_io->bf
  %tanh = bf16[1024,2048]{1,0:T(8,128)(2,1)S(1)} tanh(%dot)
  %sum = f32[1024]{0:T(1024)S(1)} custom(%tanh)
  ROOT %both = (f32[1024]{0:T(1024)S(1)}, bf16[1024,2048]{1,0:T(8,128)(2,1)S(1)}) tuple(%sum, %tanh)
}

%last (param_0: bf16[1024,2048], param_1: bf16[2048,1024]) -> bf16[1024,1024] {
  %param_0 = bf16[1024,2048]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1 = bf16[2048,1024]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %dot = bf16[1024,1024]{1,0} convolution(%param_0, %param_1), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[1024,1024], w: bf16[1024,2048], v: bf16[2048,1024]) -> bf16[1024,1024] {
  %x = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[1024,2048]{1,0:T(8,128)(2,1)} parameter(1)
  %v = bf16[2048,1024]{1,0:T(8,128)(2,1)} parameter(2)
  %start = (bf16[1024,2048]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,2048]{1,0}, u32[]{:S(2)}) \
copy-start(%w)
  %done = bf16[1024,2048]{1,0:T(8,128)(2,1)S(1)} copy-done(%start)
  %h = (f32[1024]{0:T(1024)S(1)}, bf16[1024,2048]{1,0:T(8,128)(2,1)S(1)}) fusion(%x, %done), \
kind=kOutput, calls=%first
  %tanh = bf16[1024,2048]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%h), index=1
  ROOT %y = bf16[1024,1024]{1,0:T(8,128)(2,1)} fusion(%tanh, %v), kind=kOutput, calls=%last
}
""".replace("\\\n", "")


def test_what_stays_in_the_vector_memory_of_a_tpu_is_not_moved():
    """Each argument is read once from memory and the result written once: the least there is."""
    v5e = next(chip for chip in CHIPS if chip.name == "v5e")
    work = {w.name: w for w in floor(parse(ON_A_TPU), v5e)}
    x, w, v, y = 2 * 1024**2, 4 * 1024**2, 4 * 1024**2, 2 * 1024**2
    assert {name: each.bytes for name, each in work.items()} == {"start": w, "h": x, "y": v + y}
    assert work["start"].kind == "transpose, copy" and work["y"].kind == "convolution"
    # To a GPU the number of this memory space means nothing.
    everywhere = {w.name: w.bytes for w in floor(parse(ON_A_TPU), H100)}
    assert everywhere == {"start": 2 * w, "h": x + 2 * w + 4096, "y": w + v + y}


def test_collectives_take_their_links():
    text = """HloModule x

ENTRY %main (p: f32[1000,1000]) -> f32[1000,1000] {
  %p = f32[1000,1000]{1,0} parameter(0)
  %start = f32[1000,1000]{1,0} all-reduce-start(%p), to_apply=%add
  ROOT %done = f32[1000,1000]{1,0} all-reduce-done(%start)
}
"""
    (reduced,) = floor(parse(text), H100)
    assert reduced.kind == "collective"
    assert reduced.seconds == pytest.approx(2 * 4e6 / H100.interconnect)


def test_flops_of_custom_kernels_are_split_among_them():
    text = """HloModule x

ENTRY %main (p: f32[10]) -> f32[10] {
  %p = f32[10]{0} parameter(0)
  %a = f32[10]{0} custom-call(%p), custom_call_target="tpu_custom_call"
  ROOT %b = f32[10]{0} custom-call(%a), custom_call_target="tpu_custom_call"
}
"""
    assert [w.flops for w in floor(parse(text), H100, 3e12)] == [1.5e12, 1.5e12]
    assert by_kind(floor(parse(text), H100, 3e12))["attention"].seconds == pytest.approx(
        3e12 / H100.peak_flops
    )
