# SPDX-License-Identifier: Apache-2.0
"""Which keys a query sees. How attention is computed is in attention_forms.py
and beside it.

Shape letters: B batch, T length, S keys.
"""

import functools

from flax import struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Added to the scores of keys that are not seen: far below every score, yet a
# query that sees no key at all (padding) gets numbers, not NaN.
NEVER = -1e30


@struct.dataclass
class Mask:
  """Which keys a query sees.

  Attributes:
    causal: only those at its own place and before.
    window: only those near by: causal, `window` keys with its own; else
      window // 2 on either side. 0: any distance.
    segments, key_segments: only those of its own segment.
    prefix: keys before this place are seen whatever causality says.
    start: the place of the first query among the keys; None: 0.
  """

  causal: bool = struct.field(pytree_node=False, default=False)
  window: int = struct.field(pytree_node=False, default=0)
  segments: Int[Array, "B T"] | None = None
  key_segments: Int[Array, "B S"] | None = None
  prefix: Int[Array, "B"] | None = None
  start: Int[Array, ""] | None = None

  def reach(self) -> tuple[int, int]:
    """How far before and after its place a query sees, under a window."""
    if not self.causal:
      return self.window // 2, self.window // 2
    return self.window - 1, 0 if self.prefix is None else self.window - 1

  def allowed(self, t_T: Array, s_S: Array) -> Bool[Array, "B T S"] | None:
    """Whether the queries at places t see the keys at places s.

    The batch dimension is 1 where all sequences agree; None: all see all.
    """
    seen = []
    distance_TS = t_T[:, None] - s_S
    if self.causal:
      before_BTS = (distance_TS >= 0)[None]
      if self.prefix is not None:
        before_BTS |= s_S < self.prefix[:, None, None]
      seen.append(before_BTS)
    if self.window:
      before, after = self.reach()
      seen.append(((distance_TS <= before) & (distance_TS >= -after))[None])
    if self.segments is not None:
      seen.append(self.segments[:, :, None] == self.key_segments[:, None])
    return functools.reduce(jnp.logical_and, seen) if seen else None

  def places(self, queries: slice, keys: slice) -> tuple[Array, Array]:
    """The places of some queries and of some keys, among the keys."""
    t_T = jnp.arange(queries.start, queries.stop)
    return (t_T if self.start is None else self.start + t_T,
            jnp.arange(keys.start, keys.stop))

  def meets(self, queries: int, keys: int) -> Bool[Array, ""]:
    """Whether any of the first queries may see any of the first keys, by
    their places."""
    start = 0 if self.start is None else self.start
    seen = jnp.array(True)
    if self.causal:
      seen = jnp.array(start + queries > 0)
      if self.prefix is not None:
        seen |= (self.prefix > 0).any()
    if self.window:
      before, after = self.reach()
      seen &= (start - (keys - 1) <= before) & (start + queries - 1 >= -after)
    return seen
