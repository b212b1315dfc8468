"""Cycles and HBM traffic of a scheduled program, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from cover_jax.planning import hlo, schedule

# Arrays of 1,024 bytes, in layouts as the TPU's compiler writes them; S(1) is fast memory.
SLOW, FAST = 'f32[4,64]{1,0:T(4,128)}', 'f32[4,64]{1,0:T(4,128)S(1)}'
ROW, STACK = 'f32[1,64]{1,0:T(1,128)}', 'f32[40,64]{1,0:T(8,128)}'


def cycles(n):
  return f'backend_config={{"estimated_cycles":"{n}","other":[]}}'


PROGRAM = f"""
HloModule step

%sliced (p0: f32[40,64], p1: s32[]) -> f32[1,64] {{
  %p0 = {STACK} parameter(0)
  %p1 = s32[] parameter(1)
  %view = {STACK} bitcast(%p0)
  ROOT %part = {ROW} dynamic-slice(%view, %p1, %p1), dynamic_slice_sizes={{1,64}}
}}

%updated (q0: f32[40,64], q1: f32[1,64], q2: s32[]) -> (f32[40,64], f32[4,64]) {{
  %q0 = {STACK} parameter(0)
  %q1 = {ROW} parameter(1)
  %q2 = s32[] parameter(2)
  %stack = {STACK} dynamic-update-slice(%q0, %q1, %q2, %q2)
  %other = {SLOW} broadcast(%q1)
  ROOT %both = ({STACK}, {SLOW}) tuple(%stack, %other)
}}

%whole (w0: f32[40,64], w1: s32[]) -> f32[1,64] {{
  %w0 = {STACK} parameter(0)
  %w1 = s32[] parameter(1)
  %a = {ROW} fusion(%w0, %w1), kind=kLoop, calls=%sliced
  %sum = f32[64] reduce(%w0, %w1), dimensions={{0}}
  ROOT %r = {ROW} add(%a, %sum)
}}

%cond (c: (s32[], f32[40,64])) -> pred[] {{
  %c = (s32[], {STACK}) parameter(0)
  %turns = s32[] constant(5)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %turns), direction=LT
}}

%body (b: (s32[], f32[40,64])) -> (s32[], f32[40,64]) {{
  %b = (s32[], {STACK}) parameter(0)
  %j = s32[]{{:S(2)}} get-tuple-element(%b), index=0
  %stacked = {STACK} get-tuple-element(%b), index=1
  %row = {ROW} fusion(%stacked, %j), kind=kLoop, calls=%sliced, {cycles(100)}
  %new = ({STACK}, {FAST}) fusion(%stacked, %row, %j), kind=kLoop, calls=%updated, {cycles(10)}
  %next = {STACK} get-tuple-element(%new), index=0
  %one = s32[] constant(1)
  %more = s32[] add(%j, %one)
  ROOT %t = (s32[], {STACK}) tuple(%more, %next)
}}

ENTRY %main (a: f32[4,64], s: f32[40,64]) -> f32[4,64] {{
  %a = {SLOW} parameter(0)
  %s = {STACK} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], {STACK}) tuple(%zero, %s)
  %loop = (s32[], {STACK}) while(%start), condition=%cond, body=%body
  %near = ({FAST}, {SLOW}, u32[]{{:S(2)}}) copy-start(%a)
  %here = {FAST} copy-done(%near)
  %some = (({STACK}), {FAST}, s32[]{{:S(2)}}) slice-start(%s), slice={{[0:4], [0:64]}}
  %these = {FAST} slice-done(%some)
  %room = {SLOW} custom-call(), custom_call_target="AllocateBuffer"
  %product = {FAST} convolution(%here, %these), {cycles(1000)}
  %both = {SLOW} add(%product, %a), {cycles(2**63 - 1)}
  %reduced = (f32[8], f32[32]) all-gather-start(%x), replica_groups={{}}
  %all = f32[32] all-gather-done(%reduced)
  ROOT %last = {ROW} fusion(%s, %zero), kind=kLoop, calls=%whole, {cycles(7)}
}}
"""
KB, STACK_BYTES, ROW_BYTES = 1024, 10240, 256


def test_by_hand():
  found = {one.name: one for one in schedule.operations(PROGRAM)}
  expected = {
    # A slice is read and written; a stack of which one row is written keeps the others.
    'row': (5, 100, 2 * ROW_BYTES + 4),
    'new': (5, 10, ROW_BYTES + 4 + ROW_BYTES + 0),
    'more': (5, None, 4 + 4 + 4),
    'near': (1, None, KB),
    'some': (1, None, KB),
    'product': (1, 1000, 0),
    'both': (1, None, 2 * KB),
    'reduced': (1, None, 4 * 32),
    # What is used whole and in part is read whole.
    'last': (1, 7, STACK_BYTES + 4 + ROW_BYTES),
  }
  assert {name: (one.times, one.cycles, one.hbm_bytes) for name, one in found.items()} == expected
  whole = schedule.read(PROGRAM)
  assert whole.cycles == 5 * 110 + 1000 + 7
  assert whole.hbm_bytes == sum(times * size for times, _, size in expected.values())
  assert whole.unjudged == 5 + 1  # the counter of the loop, and what has the largest integer for an estimate


def test_a_loop_that_does_not_say_how_often_it_runs():
  with pytest.raises(hlo.Unreadable, match='how often the loop loop runs'):
    schedule.read(PROGRAM.replace('direction=LT', 'direction=NE'))


def test_branches_and_calls_are_entered():
  text = """
%one (p: f32[8]) -> f32[8] {
  %p = f32[8] parameter(0)
  ROOT %n = f32[8] negate(%p)
}

ENTRY %main (x: f32[8], i: s32[]) -> f32[8] {
  %x = f32[8] parameter(0)
  %i = s32[] parameter(1)
  %c = f32[8] call(%x), to_apply=%one
  ROOT %d = f32[8] conditional(%i, %c, %c), branch_computations={%one, %one}
}
"""
  assert schedule.read(text) == schedule.Schedule(None, 3 * 2 * 32, 3)


def test_the_programs_of_this_machine_can_be_read():
  """On a real program: a loop of products moves its own weights once, not the whole stack at each turn."""
  x, w = jnp.ones((64, 64)), jnp.ones((10, 64, 64))
  loop = jax.jit(lambda x, w: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0])
  found = schedule.read(loop.lower(x, w).compile().as_text())
  assert found.cycles is None
  assert 10 * 3 * x.nbytes <= found.hbm_bytes < 10 * 12 * x.nbytes
