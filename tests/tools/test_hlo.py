import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax.tools.compile_check import hlo
from sapt_jax.tools.compile_check.hlo_text import parse, replica_group


def text_of(function, *shapes):
    return jax.jit(function).lower(*[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]).compile().as_text()


def total(text, field, loop_trips=1):
    return sum(one.count * getattr(one, field) for one in hlo.operations(text, loop_trips))


def test_a_product_counts_two_flops_for_each_multiply_add_and_its_arrays_once():
    text = text_of(lambda x, w: x @ w, (8, 16), (16, 32))
    assert total(text, "flops") == 2 * 8 * 16 * 32
    assert total(text, "bytes") == 4 * (8 * 16 + 16 * 32 + 8 * 32)


@pytest.mark.parametrize("layers", [1, 3, 7])
def test_a_scan_counts_its_body_as_often_as_it_runs(layers):
    def scan(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    text = text_of(scan, (4, 16), (layers, 16, 16))
    assert total(text, "flops") == layers * 2 * 4 * 16 * 16


def test_the_gradient_of_a_scan_is_two_thirds_of_its_work():
    def loss(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    assert total(text_of(jax.grad(loss), (5, 16, 16), (4, 16)), "flops") == 5 * 3 * 2 * 4 * 16 * 16


def test_nested_loops_multiply():
    def outer(x, w):
        def inner(x, _):
            return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x), None

        return jax.lax.scan(inner, x, None, length=5)[0]

    assert total(text_of(outer, (4, 16), (16, 16)), "flops") == 15 * 2 * 4 * 16 * 16


def test_a_loop_that_may_end_early_runs_as_often_as_it_is_told_to():
    def loop(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100.0, lambda x: jnp.tanh(x @ w), x)

    text = text_of(loop, (4, 16), (16, 16))
    assert total(text, "flops", loop_trips=9) == 9 * 2 * 4 * 16 * 16


def test_a_layer_reads_its_slice_of_stacked_weights_only():
    def scan(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    one, many = (total(text_of(scan, (4, 64), (n, 64, 64)), "bytes") for n in (2, 16))
    assert many < 9 * one


# What TPUs make of a batched product: the batch of 2 x 32 is a window of which one position meets an element.
DILATED = """
HloModule m
ENTRY %main (a: f32[2,512,32,64], b: f32[2,512,32,64]) -> f32[2,32,512,512] {
  %a = bf16[2,512,32,64]{3,1,2,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[2,512,32,64]{3,1,2,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %c = f32[2,32,512,512]{2,3,1,0:T(8,128)} convolution(%a, %b), window={size=2x32 stride=1x31 lhs_dilate=2x32}, \
dim_labels=0b1f_0o1i->01bf
}
"""


def test_positions_between_dilated_elements_are_no_work_and_vector_memory_no_traffic():
    (operation,) = hlo.operations(DILATED)
    assert operation.flops == 2 * 2 * 32 * 512 * 512 * 64
    assert operation.bytes == 2 * 2 * 512 * 32 * 64 + 4 * 2 * 32 * 512 * 512


def test_a_padded_convolution_counts_as_numpy_does():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    text = text_of(convolve, (1, 9, 3), (4, 3, 5))
    padded = np.pad(np.ones(9), (1, 2))
    pairs = sum(padded[start : start + 4].sum() for start in range(0, 9, 2))
    flops = total(text, "flops")
    assert flops == 2 * 3 * 5 * pairs


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, x", (0, 2)),
        ("replica_groups=[2,4]<=[8], x", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, x", (0, 2, 4, 6)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}, x", tuple(range(8))),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", (0, 2)),
        ("source_target_pairs={{0,3},{1,0}}, x", (0, 3)),
        ("replica_groups={}, x", ()),
    ],
)
def test_device_groups_in_every_notation(attributes, group):
    assert replica_group(attributes) == group


# One gather that a TPU spreads over two fusions, and a reduce-scatter that it writes as an all-reduce with a slice.
SPREAD = """
HloModule m
%start (p: bf16[8,64]) -> (bf16[8,64], bf16[32,64]) {
  %p = bf16[8,64]{1,0} parameter(0)
  %g = bf16[32,64]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %t = (bf16[8,64]{1,0}, bf16[32,64]{1,0}) tuple(%p, %g)
}
%finish (p.1: bf16[8,64]) -> (bf16[8,64], bf16[32,64]) {
  %p.1 = bf16[8,64]{1,0} parameter(0)
  %g.1 = bf16[32,64]{1,0} all-gather(%p.1), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %t.1 = (bf16[8,64]{1,0}, bf16[32,64]{1,0}) tuple(%p.1, %g.1)
}
%scatter (q: f32[32,64]) -> f32[8,64] {
  %q = f32[32,64]{1,0} parameter(0)
  %r = f32[32,64]{1,0} all-reduce(%q), channel_id=8, replica_groups=[1,4]<=[4], to_apply=%add
  %z = s32[] constant(0)
  ROOT %s = f32[8,64]{1,0} dynamic-slice(%r, %z, %z), dynamic_slice_sizes={8,64}
}
ENTRY %main (x: bf16[8,64], y: f32[32,64]) -> f32[8,64] {
  %x = bf16[8,64]{1,0} parameter(0)
  %y = f32[32,64]{1,0} parameter(1)
  %f = (bf16[8,64]{1,0}, bf16[32,64]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %h = (bf16[8,64]{1,0}, bf16[32,64]{1,0}) fusion(%x), kind=kCustom, calls=%finish
  ROOT %u = f32[8,64]{1,0} fusion(%y), kind=kCustom, calls=%scatter
}
"""


def test_a_collective_in_fusions_counts_once_with_its_kind_and_size():
    found = [one for operation in hlo.operations(SPREAD) for one in operation.collectives]
    assert [(one.kind, one.bytes, one.group) for one in found] == [
        ("all-gather", 2 * 32 * 64, (0, 1, 2, 3)),
        ("reduce-scatter", 4 * 32 * 64, (0, 1, 2, 3)),
    ]
    assert sum(one.bytes for one in hlo.operations(SPREAD)) == 2 * (8 + 32) * 64 + 4 * (32 + 8 + 8) * 64


GPU_PRODUCT = """
HloModule m
ENTRY %main (a: bf16[416,1024], b: bf16[1024,64]) -> f32[416,64] {
  %a = bf16[416,1024]{1,0} parameter(0)
  %b = bf16[1024,64]{1,0} parameter(1)
  %c = (f32[416,64]{1,0}, s8[33554432]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  ROOT %d = f32[416,64]{1,0} get-tuple-element(%c), index=0
}
"""


def test_a_product_of_cublas_counts_without_its_workspace():
    (operation,) = hlo.operations(GPU_PRODUCT)
    assert operation.flops == 2 * 416 * 1024 * 64
    assert operation.bytes == 2 * (416 * 1024 + 1024 * 64) + 4 * 416 * 64


# A scan as TPUs compile it: no trip count beside it, the bound in the condition, the counter behind a copy.
COUNTED = """
HloModule m
%condition (s: (s32[], f32[4,4])) -> pred[] {
  %s = (s32[], f32[4,4]{1,0}) parameter(0)
  %n = s32[] constant(24)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
%body (t: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %t = (s32[], f32[4,4]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%t), index=0
  %two = s32[] constant(2)
  %k = s32[] add(%j, %two)
  %x = f32[4,4]{1,0} get-tuple-element(%t), index=1
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %u = (s32[], f32[4,4]{1,0}) tuple(%k, %y)
}
ENTRY %main (z: f32[4,4]) -> (s32[], f32[4,4]) {
  %z = f32[4,4]{1,0} parameter(0)
  %zero = s32[] constant(4)
  %copy = s32[] copy(%zero)
  %w = (s32[], f32[4,4]{1,0}) tuple(%copy, %z)
  ROOT %loop = (s32[], f32[4,4]{1,0}) while(%w), condition=%condition, body=%body
}
"""


def test_a_loop_without_a_stated_count_is_counted_from_its_constants():
    assert total(COUNTED, "flops") == 10 * 2 * 4 * 4 * 4


@pytest.mark.parametrize(
    ("config", "flops"), [("{}", 0), ('{"cost_estimate":{"flops":"123","transcendentals":"4"}}', 123)]
)
def test_a_kernel_of_its_own_counts_what_it_states_or_is_told_of(config, flops):
    text = (
        "HloModule m\nENTRY %main (a: f32[8]) -> f32[8] {\n  %a = f32[8]{0} parameter(0)\n"
        f'  ROOT %k = f32[8]{{0}} custom-call(%a), custom_call_target="tpu_custom_call", backend_config={config}\n}}\n'
    )
    (operation,) = hlo.operations(text)
    assert (operation.flops, operation.unknown) == (flops, not flops)


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("not an HLO module")
