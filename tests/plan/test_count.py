"""Compiled programs are counted with loops in full: against closed forms, unrolled programs and the
count of their jaxprs; the forms that only the TPU compiler writes, from texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax.devices.flops import count_flops
from diffusion_jax.plan.count import Counts, count
from diffusion_jax.plan.hlo import parse


def compiled_counts(function, *args, loops=True) -> Counts:
    return count(parse(jax.jit(function).lower(*args).compile().as_text()), loops=loops)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def block(x, w):
    return jnp.tanh(x @ w), None


def scanned(x, weights):
    return jax.lax.scan(block, x, weights)[0].sum()


def unrolled(x, weights):
    for w in weights:
        x, _ = block(x, w)
    return x.sum()


@pytest.mark.parametrize("gradient", [False, True])
def test_ten_blocks_scanned_count_as_ten_unrolled(gradient):
    args = shape(16, 32), shape(10, 32, 32)
    once = 2 * 16 * 32 * 32
    expected = 10 * once * (3 if gradient else 1)
    functions = [jax.grad(f, (0, 1)) if gradient else f for f in (scanned, unrolled)]
    for function in functions:
        assert compiled_counts(function, *args).flops == expected == count_flops(function, *args)
    by_xla = compiled_counts(functions[0], *args, loops=False).flops
    assert by_xla == once * (3 if gradient else 1)


def test_loops_in_loops_multiply():
    def twice(x, weights):
        return jax.lax.scan(lambda h, _: (jax.lax.scan(block, h, weights)[0], None), x, length=3)[0]

    assert compiled_counts(twice, shape(8, 16), shape(5, 16, 16)).flops == 15 * 2 * 8 * 16 * 16


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    def until(x, w):
        return jax.lax.while_loop(lambda h: h.sum() < 10, lambda h: h @ w, x)

    counts = compiled_counts(until, shape(8, 16), shape(16, 16))
    assert counts.unknown_loops == 1 and counts.flops == 2 * 8 * 16 * 16


def test_a_condition_counts_its_dearest_branch():
    def choose(i, x, w):
        return jax.lax.switch(i, [lambda h: h @ w @ w, lambda h: h @ w, lambda h: h], x)

    args = jax.ShapeDtypeStruct((), jnp.int32), shape(8, 16), shape(16, 16)
    assert compiled_counts(choose, *args).flops == 2 * 2 * 8 * 16 * 16


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_and_its_gradients_cost_the_same_each(stride):
    def convolve(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=numbers
        )

    args = shape(2, 9, 9, 8), shape(3, 3, 8, 12)
    # Of the 9 x 3 pairs of an output and a kernel position, 2 meet the padding.
    pairs = {1: 25, 2: 13}[stride] ** 2
    forward = 2 * 2 * pairs * 8 * 12
    assert compiled_counts(convolve, *args).flops == forward
    gradients = jax.grad(lambda x, k: jnp.sum(convolve(x, k) ** 2), (0, 1))
    assert compiled_counts(gradients, *args).flops == 3 * forward == count_flops(gradients, *args)


def test_collectives_in_a_loop_count_as_often_as_they_run():
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("d",))

    def place(spec, *sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(mesh, spec))

    # Rows of x are split, and so is the inner dimension of every w: each turn gathers w.
    args = place(P("d"), 16, 32), place(P(None, "d"), 6, 32, 32)
    counts = compiled_counts(scanned, *args)
    assert counts.flops == 6 * 2 * 16 // 4 * 32 * 32
    assert counts.collectives["all-gather"] == 6
    assert counts.collective_bytes["all-gather"] == 6 * 32 * 32 * 4
    once = compiled_counts(scanned, *args, loops=False)
    assert once.collective_bytes["all-gather"] == 32 * 32 * 4


def program(body: str, result: str = "f32[4]", before: str = "") -> str:
    return f"HloModule m\n\n{before}ENTRY %main () -> {result} {{\n{body}\n}}\n"


def test_a_batched_product_as_the_tpu_compiler_writes_it():
    """Batch is a dimension of the window: of each window, all but one position is padding."""
    text = program(
        """  %a = bf16[8,16,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[8,32,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %c = bf16[8,16,64]{2,1,0:T(8,128)(2,1)} convolution(%a, %b), \
window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf"""
    )
    assert count(parse(text)).flops == 8 * 2 * 16 * 32 * 64


def test_window_attributes_of_a_strided_convolution():
    """Padding on one side, and negative padding, which cuts off."""
    text = program(
        """  %x = bf16[2,9,9,8]{3,2,1,0} parameter(0)
  %k = bf16[3,3,8,12]{3,2,1,0} parameter(1)
  ROOT %y = bf16[2,4,4,12]{3,2,1,0} convolution(%x, %k), \
window={size=3x3 stride=2x2 pad=0_0x-1_1}, dim_labels=b01f_01io->b01f"""
    )
    # Down: four windows of 3 inside. Across: from 1 on, of 8, the last window of 3 ends outside.
    assert count(parse(text)).flops == 2 * 2 * 12 * 8 * (4 * 3) * (4 * 3 - 1)


LOOP = """%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %step = s32[] constant(3)
  %next = s32[]{:T(128)} add(%i, %step)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %r = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%sum, \
backend_config={"estimated_cycles":"100"}
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %r)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(11)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

"""
ENTRY = """  %start = s32[] constant(2)
  %x = f32[8]{0} parameter(0)
  %t = (s32[], f32[8]{0}) tuple(%start, %x)
  ROOT %w = (s32[], /*index=1*/f32[8]{0}) while(%t), condition=%condition, body=%body"""


def test_the_length_of_a_loop_follows_from_its_counter():
    """From 2 in steps of 3 while below 11: 2, 5, 8."""
    counts = count(parse(program(ENTRY, before=LOOP)))
    assert counts.collectives == {"all-reduce": 3} and counts.cycles == 300
    assert counts.collective_bytes == {"all-reduce": 3 * 8 * 4}


def test_a_reduce_scatter_that_the_tpu_compiler_writes_as_a_fusion():
    inner = """%all-reduce-scatter.1 (p: f32[8]) -> f32[4] {
  %p = f32[8]{0} parameter(0)
  %sum = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
  ROOT %mine = f32[4]{0} dynamic-slice(%sum, %p), dynamic_slice_sizes={4}
}

"""
    body = """  %x = f32[8]{0} parameter(0)
  ROOT %y = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1"""
    counts = count(parse(program(body, before=inner)))
    assert counts.collective_bytes == {"reduce-scatter": 32}


def test_a_started_gather_counts_once_and_without_its_argument():
    body = """  %x = bf16[8]{0} parameter(0)
  %s = (bf16[8]{0}, bf16[32]{0}) all-gather-start(%x), dimensions={0}
  ROOT %d = bf16[32]{0} all-gather-done(%s)"""
    counts = count(parse(program(body)))
    assert counts.collective_bytes == {"all-gather": 64} and counts.collectives["all-gather"] == 1


def test_line_breaks_in_the_attributes_of_kernels_end_nothing():
    call = """custom-call(%x), custom_call_target="tpu_custom_call", attributes={metadata={
"tiles":"{128}"
}}, backend_config={"body":"abc"}"""
    body = f"""  %x = bf16[8,8]{{1,0}} parameter(0)
  %y = bf16[8,8]{{1,0}} {call}
  %z = bf16[8,8]{{1,0}} {call}
  ROOT %d = bf16[8,8]{{1,0}} dot(%y, %z), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"""
    counts = count(parse(program(body)))
    assert (counts.kernels, counts.flops) == (2, 2 * 8**3)


def test_a_text_without_a_program_is_an_error():
    with pytest.raises(ValueError, match="no entry computation"):
        parse("HloModule nothing\n")
