"""Matrix products and convolutions of a function, counted in its jaxpr."""

import math
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval


def product_flops(function: Any, *args: Any) -> float:
  """Floating-point operations of a function's matrix products and convolutions, of all devices together.

  Loops count as often as they run, recomputation counts as it is written, results that nothing uses do not count, and
  of branches the dearest does.
  """
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _product_flops(jaxpr)


def _product_flops(jaxpr: Any) -> float:
  total = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      shape = eqn.invars[0].aval.shape
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
    elif eqn.primitive.name == 'conv_general_dilated':
      kernel, dims = eqn.invars[1].aval.shape, eqn.params['dimension_numbers']
      groups = eqn.params['batch_group_count']
      inputs, window = kernel[dims.rhs_spec[1]], math.prod(kernel[i] for i in dims.rhs_spec[2:])
      # Of a dilated image (the gradient by the input) most products are with zeros that the compiler leaves out.
      dilated = math.prod(eqn.params['lhs_dilation'])
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * inputs * window / groups / dilated
    else:
      inner = [_product_flops(jaxpr) for jaxpr in jaxprs_in_params(eqn.params)]
      times = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
      total += max(inner, default=0.0) if eqn.primitive.name == 'cond' else times * sum(inner)
  return total
