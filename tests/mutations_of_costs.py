"""Faults of what a plan counts, and of the gradients that are written out; see tests/mutations.py."""

from tests.mutations import Mutation

_HAND = 'test_schedule.py::test_by_hand'

MUTATIONS = {
  'a loop turns once': Mutation('cover_jax/planning/schedule.py', "'body'), times * turns)", "'body'), times)", _HAND),
  'fast memory counts': Mutation(
    'cover_jax/planning/schedule.py',
    "hlo.array_bytes(_FAST_ARRAY.sub('', type_text))",
    'hlo.array_bytes(type_text)',
    _HAND,
  ),
  'a slice is the whole array': Mutation(
    'cover_jax/planning/schedule.py', 'if user.op in _SLICES and place == 0:', 'if False:', _HAND
  ),
  'an update writes the whole stack': Mutation(
    'cover_jax/planning/schedule.py',
    "if one.op == 'dynamic-update-slice':\n    return min(size",
    'if False:\n    return min(size',
    _HAND,
  ),
  'unjudged operations cost the largest integer': Mutation(
    'cover_jax/planning/schedule.py', 'if found and int(found[1]) < _TOO_MANY else None', 'if found else None', _HAND
  ),
  'the estimate forgets the links': Mutation(
    'cover_jax/planning/costs.py',
    "estimate = busy + alone['links']",
    'estimate = busy',
    'test_plan.py::test_time_from_the_schedule_and_the_data_sheet',
  ),
  'GELU without its density': Mutation(
    'cover_jax/models/pointwise.py',
    '(below + x_f32 * density)',
    'below',
    'test_pointwise.py::test_gradient_of_gelu',
  ),
  'LayerNorm whose mean has no gradient': Mutation(
    'cover_jax/models/pointwise.py',
    'd_unit - d_unit.mean(axis=-1, keepdims=True) - unit',
    'd_unit - unit',
    'test_pointwise.py::test_gradient_of_layer_norm',
  ),
  'GELU keeps float32': Mutation(
    'cover_jax/models/pointwise.py',
    'gelu.defvjp(lambda x: (gelu(x), x)',
    'gelu.defvjp(lambda x: (gelu(x), x.astype(jnp.float32))',
    'test_pointwise.py::test_what_is_kept_has_the_dtype_of_the_computation',
  ),
}
