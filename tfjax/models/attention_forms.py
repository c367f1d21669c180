# SPDX-License-Identifier: Apache-2.0
"""Attention as XLA compiles it: the formula, the library's form, and a band.

Computed over arrays that may lie on many devices: the compiler cuts them. The
form for CPUs is in blocks.py, other people's kernels are in kernels.py, which
form is taken is in attention_choice.py.

Shape letters: B batch, N heads, K heads of keys and values, G queries' heads to
one of keys, T length, S keys, H head width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tfjax.models import masks

Heads = Float[Array, "B N T H"]
KeyHeads = Float[Array, "B K S H"]


def reference(
    q_BNTH: Heads, k_BKSH: KeyHeads, v_BKSH: KeyHeads, mask: masks.Mask,
    bias_NTS: Float[Array, "N T S"] | None = None, scale: float = 1.0,
) -> Heads:
  """softmax(scale q k^T + bias) v over the keys that are seen, as written."""
  batch, heads, length, width = q_BNTH.shape
  groups, keys = k_BKSH.shape[1:3]
  q_BKGTH = q_BNTH.reshape(batch, groups, heads // groups, length, width)
  scores = scale * jnp.einsum("bkgth,bksh->bkgts", q_BKGTH, k_BKSH,
                              preferred_element_type=jnp.float32)
  if bias_NTS is not None:
    scores += bias_NTS.reshape(groups, heads // groups, length, keys)
  seen_BTS = mask.allowed(*mask.places(slice(0, length), slice(0, keys)))
  if seen_BTS is not None:
    scores = jnp.where(seen_BTS[:, None, None], scores, masks.NEVER)
  p_BKGTS = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype)
  out_BKGTH = jnp.einsum("bkgts,bksh->bkgth", p_BKGTS, v_BKSH)
  return out_BKGTH.reshape(q_BNTH.shape)


def dot_product(
    q_BNTH: Heads, k_BKSH: KeyHeads, v_BKSH: KeyHeads, mask: masks.Mask,
    bias_NTS: Float[Array, "N T S"] | None = None, scale: float = 1.0,
) -> Heads:
  """The library's form, in XLA."""
  if mask.window and bias_NTS is None and mask.start is None:
    return banded(q_BNTH, k_BKSH, v_BKSH, mask, scale)
  q, k, v = (x.swapaxes(1, 2) for x in (q_BNTH, k_BKSH, v_BKSH))
  bare = mask.causal and jax.tree.leaves(mask) == []
  seen_BTS = None if bare and not mask.window else mask.allowed(
      *mask.places(slice(0, q.shape[1]), slice(0, k.shape[1])))
  return jax.nn.dot_product_attention(
      q, k, v, bias=None if bias_NTS is None else bias_NTS[None],
      mask=None if seen_BTS is None else seen_BTS[:, None], scale=scale,
      is_causal=seen_BTS is None and mask.causal,
      implementation="xla").swapaxes(1, 2)


def banded(q_BNTH: Heads, k_BKSH: KeyHeads, v_BKSH: KeyHeads, mask: masks.Mask,
           scale: float = 1.0) -> Heads:
  """Windowed self-attention without the T x T scores.

  Queries are cut into blocks as long as the window reaches, which see their
  own block of keys and the neighbours.
  """
  batch, heads, length, width = q_BNTH.shape
  before, after = mask.reach()
  size = max(before, after, 1)
  blocks = -(-length // size)
  groups = k_BKSH.shape[1]

  def cut(x: Array, axis: int, fill: int = 0) -> Array:
    """Pads an axis to whole blocks and splits it into them."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, blocks * size - length)
    x = jnp.pad(x, padding, constant_values=fill)
    return x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1:])

  def neighbours(x: Array, axis: int, fill: int = 0) -> Array:
    """Each block with the one before it, and the one after it if seen."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (1, 1)
    x = jnp.pad(x, padding, constant_values=fill)
    places = range(3 if after else 2)
    return jnp.concatenate(
        [jax.lax.slice_in_dim(x, i, i + blocks, axis=axis) for i in places],
        axis=axis + 1)

  q = cut(q_BNTH.reshape(batch, groups, heads // groups, length, width), 3)
  k, v = (neighbours(cut(x, 2), 2) for x in (k_BKSH, v_BKSH))
  # Places of queries and keys, by block; keys that do not exist have none.
  place = cut(jnp.arange(length), 0, -1)
  key_place = neighbours(place, 0, -1)
  own = theirs = None
  if mask.segments is not None:
    own = cut(mask.segments, 1, -1).swapaxes(0, 1)
    theirs = neighbours(cut(mask.key_segments, 1, -1), 1, -1).swapaxes(0, 1)
  seen = jax.vmap(lambda t, s, own, theirs: mask.replace(
      segments=own, key_segments=theirs).allowed(t, s) & (s >= 0))(
          place, key_place, own, theirs)
  seen = seen.swapaxes(0, 1)[:, None, None]  # batch, heads, groups, block
  scores = scale * jnp.einsum("bkgith,bkish->bkgits", q, k,
                              preferred_element_type=jnp.float32)
  p = jax.nn.softmax(jnp.where(seen, scores, masks.NEVER), -1).astype(v.dtype)
  out = jnp.einsum("bkgits,bkish->bkgith", p, v)
  out = out.reshape(batch, heads, blocks * size, width)
  return out[:, :, :length]
