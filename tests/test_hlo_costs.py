"""What is counted in a jaxpr and in HLO, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from cover_jax.models.products import product_flops
from cover_jax.planning import collectives, hlo

# Counting products.


def test_products_of_loops_convolutions_and_recomputation():
  x, w = jnp.ones((4, 8)), jnp.ones((3, 8, 8))
  one = 2 * 4 * 8 * 8

  def loop(x, w):
    return jax.lax.scan(lambda c, w: (c @ w, None), x, w)[0].sum()

  assert product_flops(loop, x, w) == 3 * one
  # Forwards one product, backwards two; the gradient of the first block's input is not wanted.
  assert product_flops(jax.grad(loop, argnums=(0, 1)), x, w) == 3 * 3 * one

  def twice(x, w):
    return jax.checkpoint(lambda x: jnp.sin(x @ w[0]) @ w[1])(x).sum()

  without, recomputed = (
    product_flops(jax.value_and_grad(f), x, w) for f in (lambda x, w: (jnp.sin(x @ w[0]) @ w[1]).sum(), twice)
  )
  assert recomputed == without + one  # the first product again; nothing needs the second one

  image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((4, 4, 3, 5))
  convolve = lambda image, kernel: jax.lax.conv_general_dilated(
    image, kernel, (4, 4), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  patches = 2 * (2 * 2 * 2) * (4 * 4 * 3) * 5
  assert product_flops(convolve, image, kernel) == patches
  both = jax.grad(lambda image, kernel: convolve(image, kernel).sum() ** 2, argnums=(0, 1))
  assert product_flops(both, image, kernel) == pytest.approx(3 * patches, rel=0.01)
  assert product_flops(lambda x, w: ((x @ w[0]), x)[1], x, w) == 0  # nothing uses it


# Counting communication.

HLO = """
HloModule step

%cond (p: (s32[], f32[8])) -> pred[] {
  %c = s32[]{:T(128)} constant(6)
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %one = s32[]{:T(128)} constant(1)
  %ag = bf16[16,4]{1,0:T(8,128)(2,1)S(1)} all-gather(%x), replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}
  %start = (f32[4], f32[8]) all-gather-start(%y), replica_groups=[4,2]<=[8], dimensions={0}
  %done = f32[8] all-gather-done(%start)
  %copy = s32[] copy(%j)
  %next = s32[] add(%copy, %one)
  ROOT %t = (s32[], f32[8]) tuple(%next, %done)
}

%gather (z: f32[25]) -> f32[100] {
  %z = f32[25] parameter(0)
  ROOT %whole = f32[100] all-gather(%z), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %zero = s32[] constant(0)
  %a = f32[8] parameter(0)
  %init = (s32[], f32[8]) tuple(%zero, %a)
  %while = (s32[], f32[8]) while(%init), condition=%cond, body=%body, metadata={op_name="jit(f)/while"}
  %ar = (f32[100], bf16[10,10]) all-reduce(%g, %h), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %rs = f32[25]{0} reduce-scatter(%g), replica_groups=[2,4]<=[8], dimensions={0}
  %alone = f32[7] all-reduce(%g), replica_groups=[8,1]<=[8], to_apply=%add
  ROOT %r = f32[8] get-tuple-element(%while), index=1
}
"""


def test_collectives_by_hand():
  gather, reduce, scatter = collectives.read(HLO, 8)
  assert (gather.kind, gather.count) == ('all-gather', 12)
  assert gather.result_bytes == 6 * (16 * 4 * 2) + 6 * (8 * 4)
  assert gather.sent_bytes == gather.result_bytes / 2  # two take part
  assert (reduce.kind, reduce.count, reduce.result_bytes) == ('all-reduce', 1, 600)
  assert reduce.sent_bytes == 600 * 2 * 3 / 4
  assert (scatter.kind, scatter.result_bytes, scatter.sent_bytes) == ('reduce-scatter', 100, 300)


def test_an_asynchronous_collective_in_several_fusions_is_one():
  """The TPU's compiler repeats it, under one channel, in its start, in fusions that move it on and in its end."""
  call = '  %{0} = f32[100] fusion(%rs), kind=kCustom, calls=%gather\n'
  fused = HLO.replace('  ROOT %r =', call.format('first') + call.format('second') + '  ROOT %r =')
  before, after = (collectives.read(text, 8)[0] for text in (HLO, fused))
  assert after.count == before.count + 1
  assert after.result_bytes == before.result_bytes + 400
  assert after.sent_bytes == before.sent_bytes + 300


@pytest.mark.parametrize(
  ('groups', 'size'),
  [
    ("mesh['a'=8,'b'=1,'c'=32], device_ids=([32,8]T(1,0)) {'a'}, dimensions={0}", 8),
    ("mesh['a'=8,'b'=1,'c'=32] {'a','c'}, dimensions={0}", 256),
    ('[32,8]<=[8,32]T(1,0), dimensions={0}', 8),
    ('{{0,8,16},{1,9,17}}, to_apply=%add', 3),
    ('{}, to_apply=%add', 256),
  ],
)
def test_groups_in_every_way_of_writing(groups, size):
  assert collectives._group_size(f'%x), channel_id=1, replica_groups={groups}', 256) == size
  with pytest.raises(hlo.Unreadable, match='unknown way'):
    collectives._group_size(f'%x), replica_groups=<{groups}', 256)


def test_a_reduction_of_which_each_keeps_a_part_is_a_scatter():
  fusion = """%scatter (in: f32[100]) -> f32[25] {
  %in = f32[100] parameter(0)
  %all = f32[100] all-reduce(%in), channel_id=9, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %part = f32[25] dynamic-slice(%all, %i), dynamic_slice_sizes={25}
}

ENTRY """
  call = '  %mine = f32[25] fusion(%rs), kind=kCustom, calls=%scatter\n  ROOT %r ='
  fused = HLO.replace('ENTRY ', fusion).replace('  ROOT %r =', call)
  *same, before = collectives.read(HLO, 8)
  *others, after = collectives.read(fused, 8)
  assert others == same and after.count == before.count + 1
  assert after.sent_bytes == before.sent_bytes + 300


@pytest.mark.parametrize(
  ('old', 'new', 'turns'),
  [
    ('constant(1)', 'constant(2)', 3),
    ('constant(1)', 'constant(4)', 2),
    ('constant(0)', 'constant(5)', 1),
    ('s32[]', 'u32[]', 6),  # as in the loops of products whose operand is gathered on the way
    ('add(%copy, %one)', 'add(%one, %copy)', 6),
    ('body=%body', 'body=%body, backend_config={"known_trip_count":{"n":"3"}}', 3),
  ],
)
def test_turns_of_a_loop(old, new, turns):
  assert collectives.read(HLO.replace(old, new), 8)[0].count == 2 * turns


@pytest.mark.parametrize(
  ('old', 'new'),
  [
    ('direction=LT', 'direction=NE'),
    ('add(%copy, %one)', 'multiply(%copy, %one)'),
    ('constant(1)', 'parameter(1)'),
    ('tuple(%zero, %a)', 'custom-call(%zero, %a)'),
    ('constant(1)', 'constant(-1)'),
  ],
)
def test_a_loop_of_unknown_length_is_not_guessed(old, new):
  with pytest.raises(hlo.Unreadable, match='not known'):
    collectives.read(HLO.replace(old, new), 8)


def test_loops_of_a_real_program():
  """A loop in a loop, as this machine's compiler writes them."""
  mesh = jax.sharding.Mesh(jax.devices()[:4], 'x')

  @jax.shard_map(mesh=mesh, in_specs=jax.P('x'), out_specs=jax.P('x'))
  def shift(x):
    inner = lambda _, x: jax.lax.ppermute(x, 'x', [(i, (i + 1) % 4) for i in range(4)]) * 2
    return jax.lax.fori_loop(0, 5, lambda _, x: jax.lax.fori_loop(0, 3, inner, x) + 1, x)

  text = jax.jit(shift).lower(jnp.ones((8, 16), jnp.float32)).compile().as_text()
  (found,) = collectives.read(text, 4)
  assert (found.kind, found.count, found.sent_bytes) == ('collective-permute', 15, 15 * 2 * 16 * 4)
