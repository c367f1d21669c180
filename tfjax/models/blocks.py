# SPDX-License-Identifier: Apache-2.0
"""Attention for CPUs: blocks of queries against blocks of keys.

What causality or a window excludes is never computed; the backward pass is
written out. The other forms are in attention_forms.py and kernels.py.

Shape letters: B batch, N heads, K heads of keys and values, T length, S keys,
H head width.
"""

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tfjax.models import masks


def blocks(
    q_BNTH: Float[Array, "B N T H"], k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"], mask: masks.Mask, scale: float = 1.0,
) -> Float[Array, "B N T H"]:
  """Blocks of queries against the blocks of keys that they may see.

  One sequence after the other keeps the scores in a core's cache; only their
  log sums are kept for the backward pass, which makes the scores again.
  """
  repeats = q_BNTH.shape[1] // k_BKSH.shape[1]
  if repeats > 1:
    k_BKSH, v_BKSH = (jnp.repeat(x, repeats, 1) for x in (k_BKSH, v_BKSH))
  return _blocks(scale, q_BNTH, k_BKSH, v_BKSH, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(scale: float, q_BNTH: Array, k_BNSH: Array, v_BNSH: Array,
            mask: masks.Mask) -> Array:
  return forward(scale, q_BNTH, k_BNSH, v_BNSH, mask)[0]


def _cut(length: int, size: int) -> list[slice]:
  return [slice(start, min(start + size, length))
          for start in range(0, length, size)]


def _layout(mask: masks.Mask, queries: int, keys: int) -> list[
    tuple[slice, slice, list[slice]]]:
  """Each block of queries, the keys that it may see, and those in blocks."""
  # Small blocks compute less that the mask excludes, large ones multiply
  # faster.
  size = 64 if queries <= 256 else 128
  key_blocks = _cut(keys, size)
  layout = []
  for block in _cut(queries, size):
    first, last = 0, len(key_blocks)
    if mask.start is not None:
      # Known when it runs: all keys, of which `_scores` masks the unseen.
      layout.append((block, slice(0, keys), key_blocks))
      continue
    if mask.causal and mask.prefix is None:
      last = min(last, (block.stop - 1) // size + 1)
    if mask.window:
      before, after = mask.reach()
      first = max(0, block.start - before) // size
      last = min(last, (block.stop - 1 + after) // size + 1)
    seen = key_blocks[first:last]
    layout.append((block, slice(seen[0].start, seen[-1].stop), seen))
  return layout


def _scores(q_NTH: Array, k_NSH: Array, mask: masks.Mask, block: slice,
            keys: slice) -> Array:
  """Masked scores of a block of (scaled) queries and some keys."""
  scores_NTS = jnp.einsum("nth,nsh->nts", q_NTH[:, block], k_NSH[:, keys],
                          preferred_element_type=jnp.float32)
  if mask.segments is not None:
    mask = mask.replace(segments=mask.segments[:, block],
                        key_segments=mask.key_segments[:, keys])
  t_T, s_S = mask.places(block, keys)
  seen = mask.allowed(t_T, s_S)
  if seen is None:
    return scores_NTS
  return scores_NTS + jnp.where(seen, 0.0, masks.NEVER)


def _map(function: Callable, mask: masks.Mask, *arrays: Array) -> Any:
  """function(mask, *arrays) of one sequence after the other."""
  start = mask.start  # all sequences' own

  def sequence(inputs):
    mask, *arrays = inputs
    mask = jax.tree.map(lambda x: x[None], mask)  # as of a batch of one
    return function(mask.replace(start=start), *arrays)
  return jax.lax.map(sequence, (mask.replace(start=None), *arrays))


def forward(scale: float, q_BNTH: Array, k_BNSH: Array, v_BNSH: Array,
            mask: masks.Mask) -> tuple[Array, tuple]:
  """The output, and what `backward` needs: with it the log of the sums of
  exponents, last."""
  layout = _layout(mask, q_BNTH.shape[2], k_BNSH.shape[2])

  def sequence(mask, q_NTH, k_NSH, v_NSH):
    outputs, log_sums = [], []
    for block, keys, _ in layout:
      scores = _scores(q_NTH, k_NSH, mask, block, keys)
      largest = scores.max(-1, keepdims=True)
      weights = jnp.exp(scores - largest)
      total = weights.sum(-1, keepdims=True)
      output = jnp.einsum("nts,nsh->nth", weights.astype(v_NSH.dtype),
                          v_NSH[:, keys])
      outputs.append((output / total).astype(v_NSH.dtype))
      log_sums.append(largest + jnp.log(total))
    return jnp.concatenate(outputs, 1), jnp.concatenate(log_sums, 1)

  # Barriers: what makes these arrays would be computed again in every block.
  inputs = jax.lax.optimization_barrier((q_BNTH * scale, k_BNSH, v_BNSH))
  output_BNTH, log_sum_BNT1 = _map(sequence, mask, *inputs)
  return output_BNTH, (mask, *inputs, output_BNTH, log_sum_BNT1)


def backward(scale: float, residuals: tuple, dout_BNTH: Array) -> tuple:
  """Gradients of queries, keys and values. `residuals` are of `forward`, or of
  some of the keys: their mask, scaled queries, them and their values, then
  the output and log sums over all keys."""
  dtype = dout_BNTH.dtype
  mask, *arrays = residuals
  layout = _layout(mask, dout_BNTH.shape[2], arrays[1].shape[2])

  def sequence(mask, q_NTH, k_NSH, v_NSH, out_NTH, log_sum_NT1, dout_NTH):
    # sum_s p_ts dp_ts = dout_t . out_t (Dao et al. 2022, appendix B.2)
    delta_NT1 = jnp.sum((dout_NTH * out_NTH).astype(jnp.float32), -1,
                        keepdims=True)
    dq, dk, dv = [], {}, {}

    def add(sums, parts_NHS, keys, seen):
      for part in seen:
        sums[part.start] = sums.get(part.start, 0.0) + parts_NHS[
            :, :, part.start - keys.start:part.stop - keys.start]

    for block, keys, seen in layout:
      q, dout = q_NTH[:, block], dout_NTH[:, block]
      k, v = k_NSH[:, keys], v_NSH[:, keys]
      p = jnp.exp(_scores(q_NTH, k_NSH, mask, block, keys) -
                  log_sum_NT1[:, block])
      dp = jnp.einsum("nth,nsh->nts", dout, v,
                      preferred_element_type=jnp.float32)
      ds = (p * (dp - delta_NT1[:, block])).astype(dtype)
      dq.append(jnp.einsum("nts,nsh->nth", ds, k))
      # Transposed, as XLA's product of transposed scores takes twice as long.
      add(dk, jnp.einsum("nth,nts->nhs", q, ds), keys, seen)
      add(dv, jnp.einsum("nth,nts->nhs", dout, p.astype(dtype)), keys, seen)

    def whole(sums):
      return jnp.concatenate([sums[i] for i in sorted(sums)], 2).swapaxes(1, 2)
    return jnp.concatenate(dq, 1), whole(dk), whole(dv)

  dout_BNTH = jax.lax.optimization_barrier(dout_BNTH)
  dq_BNTH, dk_BNSH, dv_BNSH = _map(sequence, mask, *arrays, dout_BNTH)
  return dq_BNTH * scale, dk_BNSH, dv_BNSH, None


_blocks.defvjp(forward, backward)

