# SPDX-License-Identifier: Apache-2.0
"""Attention on each device's own part of the batch, the heads and the length.

For the forms that no compiler can cut: those that loop over sequences, and
kernels. Where sequences are cut too, blocks go round a ring (Liu et al. 2023):
each device keeps its queries, and keys and values pass by. Kernels, which want
whole sequences, get them for a part of the heads (Jacobs et al. 2023).

The ring was measured against gathering all keys, on 8 simulated devices at
T 4096: 1.2 s against 2.7 s a pass forwards and backwards, and a ninth of the
memory; heads exchanged for length lay between.

Shape letters: B batch, N heads, K heads of keys and values, T length, S keys,
H head width; all of one device inside `jax.shard_map`.
"""

import dataclasses
import functools
import math
from typing import Callable

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tfjax.models import blocks
from tfjax.models import layers
from tfjax.models import masks

Form = Callable[[Array, Array, Array, masks.Mask, float], Array]


@dataclasses.dataclass(frozen=True)
class Cut:
  """Over how many devices the mesh at hand cuts heads and sequences."""

  heads: int = 1
  length: int = 1
  axis: str | None = None  # the mesh axis of the length


def cut() -> Cut:
  """That of `jax.set_mesh` and Linen's rules around the call."""
  return Cut(layers.parts("heads"), layers.parts("length"),
             next(iter(layers.mesh_axes("length")), None))


def attend(
    form: Form, q_BNTH: Float[Array, "B N T H"],
    k_BKSH: Float[Array, "B K S H"], v_BKSH: Float[Array, "B K S H"],
    mask: masks.Mask, scale: float = 1.0,
) -> Float[Array, "B N T H"]:
  """`form` on every device's own part of global arrays.

  `choose` in attention_choice.py has seen to it that the form can.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return form(q_BNTH, k_BKSH, v_BKSH, mask, scale)
  parts, length = cut(), "length"
  if parts.length > 1 and form is blocks.blocks:
    form = functools.partial(ring, parts)
  elif parts.length > 1:
    form, length = functools.partial(exchange, parts, form), None
  spec = nn.logical_to_mesh_axes
  queries, keys = (spec(("batch", axis, "length", None))
                   for axis in ("heads", "kv_heads"))
  ids = spec(("batch", length))
  mask_specs = mask.replace(**{
      name: spec for name, spec in dict(
          segments=ids, key_segments=ids, prefix=spec(("batch",))).items()
      if getattr(mask, name) is not None})
  # The output varies as the inputs do; loops inside need no annotation.
  return jax.shard_map(
      lambda q, k, v, mask: form(q, k, v, mask, scale),
      in_specs=(queries, keys, keys, mask_specs), out_specs=queries,
      check_vma=False)(q_BNTH, k_BKSH, v_BKSH, mask)


def exchange(parts: Cut, form: Form, q_BNTH: Array, k_BKTH: Array,
             v_BKTH: Array, mask: masks.Mask, scale: float) -> Array:
  """`form` on whole sequences, each device with a part of its heads.

  The mask is that of whole sequences. Heads of keys that are too few are
  repeated.
  """
  swap = functools.partial(jax.lax.all_to_all, axis_name=parts.axis, tiled=True)
  repeats = parts.length // math.gcd(k_BKTH.shape[1], parts.length)
  k_BKTH, v_BKTH = (jnp.repeat(x, repeats, 1) for x in (k_BKTH, v_BKTH))
  whole = [swap(x, split_axis=1, concat_axis=2)
           for x in (q_BNTH, k_BKTH, v_BKTH)]
  return swap(form(*whole, mask, scale), split_axis=2, concat_axis=1)


# --- The ring ----------------------------------------------------------------


def ring(parts: Cut, q_BNTH: Array, k_BKSH: Array, v_BKSH: Array,
         mask: masks.Mask, scale: float) -> Array:
  """Blocks against the keys of one device after the other.

  What a device's queries cannot see is not computed. The backward pass goes
  round again: a device keeps its own part and the log sums, nothing else.
  """
  return _ring(parts, scale, q_BNTH, k_BKSH, v_BKSH, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(parts: Cut, scale: float, q_BNTH: Array, k_BKSH: Array,
          v_BKSH: Array, mask: masks.Mask) -> Array:
  return _ring_forward(parts, scale, q_BNTH, k_BKSH, v_BKSH, mask)[0]


def _pass_on(parts: Cut, x: Array) -> Array:
  size = parts.length
  return jax.tree.map(lambda x: jax.lax.ppermute(
      x, parts.axis, [(i, (i + 1) % size) for i in range(size)]), x)


def _here(parts: Cut, step: Array, mask: masks.Mask, key_segments: Array | None,
          queries: int, keys: int) -> tuple[masks.Mask, Array]:
  """The mask of the keys at hand, and whether it lets any of them through."""
  own = jax.lax.axis_index(parts.axis)
  theirs = (own - step) % parts.length
  if mask.prefix is not None:
    mask = mask.replace(prefix=mask.prefix - theirs * keys)
  if mask.causal or mask.window:
    mask = mask.replace(start=own * queries - theirs * keys)
  mask = mask.replace(key_segments=key_segments)
  return mask, mask.meets(queries, keys)


def _ring_forward(parts, scale, q_BNTH, k_BKSH, v_BKSH, mask):
  repeats = q_BNTH.shape[1] // k_BKSH.shape[1]

  def step(carry, i):
    out_BNTH, log_sum_BNT1, passing = carry
    k_BKSH, v_BKSH, key_segments = passing
    here, meets = _here(parts, i, mask, key_segments, q_BNTH.shape[2],
                        k_BKSH.shape[2])

    def add(out_BNTH, log_sum_BNT1):
      new_BNTH, (*_, new_BNT1) = blocks.forward(
          scale, q_BNTH, jnp.repeat(k_BKSH, repeats, 1),
          jnp.repeat(v_BKSH, repeats, 1), here)
      both_BNT1 = jnp.logaddexp(log_sum_BNT1, new_BNT1)
      return (out_BNTH * jnp.exp(log_sum_BNT1 - both_BNT1) +
              new_BNTH * jnp.exp(new_BNT1 - both_BNT1)), both_BNT1

    sums = jax.lax.cond(meets, add, lambda *sums: sums, out_BNTH, log_sum_BNT1)
    return (*sums, _pass_on(parts, passing)), None

  nothing = (jnp.zeros(q_BNTH.shape, jnp.float32),
             jnp.full((*q_BNTH.shape[:3], 1), -jnp.inf))
  (out_BNTH, log_sum_BNT1, _), _ = jax.lax.scan(
      step, (*nothing, (k_BKSH, v_BKSH, mask.key_segments)),
      jnp.arange(parts.length))
  out_BNTH = out_BNTH.astype(v_BKSH.dtype)
  return out_BNTH, (mask, q_BNTH, k_BKSH, v_BKSH, out_BNTH, log_sum_BNT1)


def _ring_backward(parts, scale, residuals, dout_BNTH):
  mask, q_BNTH, k_BKSH, v_BKSH, out_BNTH, log_sum_BNT1 = residuals
  repeats = q_BNTH.shape[1] // k_BKSH.shape[1]

  def of_groups(x_BNSH):
    batch, heads, *rest = x_BNSH.shape
    return x_BNSH.reshape(batch, heads // repeats, repeats, *rest).sum(2)

  def step(carry, i):
    dq_BNTH, passing, sums = carry
    k_BKSH, v_BKSH, key_segments = passing
    here, meets = _here(parts, i, mask, key_segments, q_BNTH.shape[2],
                        k_BKSH.shape[2])

    def add(dq_BNTH, sums):
      dq, dk_BNSH, dv_BNSH, _ = blocks.backward(
          scale, (here, q_BNTH * scale, jnp.repeat(k_BKSH, repeats, 1),
                  jnp.repeat(v_BKSH, repeats, 1), out_BNTH, log_sum_BNT1),
          dout_BNTH)
      return dq_BNTH + dq, tuple(
          s + of_groups(x) for s, x in zip(sums, (dk_BNSH, dv_BNSH)))

    dq_BNTH, sums = jax.lax.cond(meets, add, lambda *x: x, dq_BNTH, sums)
    # Gradients go with the keys that they are of, and come home with them.
    return (dq_BNTH, *_pass_on(parts, (passing, sums))), None

  zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q_BNTH, k_BKSH, v_BKSH)]
  (dq_BNTH, _, (dk_BKSH, dv_BKSH)), _ = jax.lax.scan(
      step, (zeros[0], (k_BKSH, v_BKSH, mask.key_segments), tuple(zeros[1:])),
      jnp.arange(parts.length))
  return (dq_BNTH.astype(q_BNTH.dtype), dk_BKSH.astype(k_BKSH.dtype),
          dv_BKSH.astype(v_BKSH.dtype), None)


_ring.defvjp(_ring_forward, _ring_backward)
