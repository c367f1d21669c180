# SPDX-License-Identifier: Apache-2.0
"""Attention: one reference, the forms that are fast, and the module.

A `Mask` says which keys a query sees. The forms take queries
(batch, heads, length, head width), keys and values with as many heads or fewer
(grouped queries), and compute softmax in float32:

- `reference`: the formula; the oracle of the others in tests.
- `blocks`: for CPUs. Blocks of queries see only the blocks of keys that the
  mask can let through, so what causality or a window excludes is never
  computed; the backward pass is written out.
- `dot_product`: `jax.nn.dot_product_attention`, for accelerators.
- `banded`: a window on accelerators, in memory proportional to the length.

Shape letters: B batch, N heads, K heads of keys and values, G queries' heads to
one of keys, T length, S keys, H head width, D model width.
"""

import functools

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tfjax import config as config_lib
from tfjax.models import layers

Heads = Float[Array, "B N T H"]
KeyHeads = Float[Array, "B K S H"]

# Added to the scores of keys that are not seen: far below every score, yet a
# query that sees no key at all (padding) gets numbers, not NaN.
_NEVER = -1e30


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

  def places(self, queries: int, keys: int) -> tuple[Array, Array]:
    start = 0 if self.start is None else self.start
    return start + jnp.arange(queries), jnp.arange(keys)


def reference(
    q_BNTH: Heads, k_BKSH: KeyHeads, v_BKSH: KeyHeads, mask: Mask,
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
  seen_BTS = mask.allowed(*mask.places(length, keys))
  if seen_BTS is not None:
    scores = jnp.where(seen_BTS[:, None, None], scores, _NEVER)
  p_BKGTS = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype)
  out_BKGTH = jnp.einsum("bkgts,bksh->bkgth", p_BKGTS, v_BKSH)
  return out_BKGTH.reshape(q_BNTH.shape)


def dot_product(
    q_BNTH: Heads, k_BKSH: KeyHeads, v_BKSH: KeyHeads, mask: Mask,
    bias_NTS: Float[Array, "N T S"] | None = None, scale: float = 1.0,
) -> Heads:
  """The library's form, in XLA: cuDNN's kernels are chosen by name only."""
  if mask.window and bias_NTS is None and mask.start is None:
    return banded(q_BNTH, k_BKSH, v_BKSH, mask, scale)
  q, k, v = (x.swapaxes(1, 2) for x in (q_BNTH, k_BKSH, v_BKSH))
  bare = mask.causal and jax.tree.leaves(mask) == []
  seen_BTS = None if bare and not mask.window else mask.allowed(
      *mask.places(q.shape[1], k.shape[1]))
  return jax.nn.dot_product_attention(
      q, k, v, bias=None if bias_NTS is None else bias_NTS[None],
      mask=None if seen_BTS is None else seen_BTS[:, None], scale=scale,
      is_causal=seen_BTS is None and mask.causal).swapaxes(1, 2)


def banded(q_BNTH: Heads, k_BKSH: KeyHeads, v_BKSH: KeyHeads, mask: Mask,
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
  p = jax.nn.softmax(jnp.where(seen, scores, _NEVER), -1).astype(v.dtype)
  out = jnp.einsum("bkgits,bkish->bkgith", p, v)
  out = out.reshape(batch, heads, blocks * size, width)
  return out[:, :, :length]


# --- Blocks ------------------------------------------------------------------


def blocks(
    q_BNTH: Heads, k_BKSH: KeyHeads, v_BKSH: KeyHeads, mask: Mask,
    bias_NTS: Float[Array, "N T S"] | None = None, scale: float = 1.0,
) -> Heads:
  """Blocks of queries against the blocks of keys that they may see.

  One sequence after the other keeps the scores in a core's cache; only their
  log sums are kept for the backward pass, which makes the scores again. With
  a bias or a start it is the reference.
  """
  if bias_NTS is not None or mask.start is not None:
    return reference(q_BNTH, k_BKSH, v_BKSH, mask, bias_NTS, scale)
  repeats = q_BNTH.shape[1] // k_BKSH.shape[1]
  if repeats > 1:
    k_BKSH, v_BKSH = (jnp.repeat(x, repeats, 1) for x in (k_BKSH, v_BKSH))
  return _blocks(scale, q_BNTH, k_BKSH, v_BKSH, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(scale: float, q_BNTH: Heads, k_BNSH: Heads, v_BNSH: Heads,
            mask: Mask) -> Heads:
  return _blocks_forward(scale, q_BNTH, k_BNSH, v_BNSH, mask)[0]


def _cut(length: int, size: int) -> list[slice]:
  return [slice(start, min(start + size, length))
          for start in range(0, length, size)]


def _layout(mask: Mask, queries: int, keys: int) -> list[
    tuple[slice, slice, list[slice]]]:
  """Each block of queries, the keys that it may see, and those in blocks."""
  # Small blocks compute less that the mask excludes, large ones multiply
  # faster.
  size = 64 if queries <= 256 else 128
  key_blocks = _cut(keys, size)
  layout = []
  for block in _cut(queries, size):
    first, last = 0, len(key_blocks)
    if mask.causal and mask.prefix is None:
      last = min(last, (block.stop - 1) // size + 1)
    if mask.window:
      before, after = mask.reach()
      first = max(0, block.start - before) // size
      last = min(last, (block.stop - 1 + after) // size + 1)
    seen = key_blocks[first:last]
    layout.append((block, slice(seen[0].start, seen[-1].stop), seen))
  return layout


def _scores(q_NTH: Array, k_NSH: Array, mask: Mask, block: slice,
            keys: slice) -> Array:
  """Masked scores of a block of (scaled) queries and some keys."""
  scores_NTS = jnp.einsum("nth,nsh->nts", q_NTH[:, block], k_NSH[:, keys],
                          preferred_element_type=jnp.float32)
  if mask.segments is not None:
    mask = mask.replace(segments=mask.segments[:, block],
                        key_segments=mask.key_segments[:, keys])
  seen = mask.allowed(jnp.arange(block.start, block.stop),
                      jnp.arange(keys.start, keys.stop))
  if seen is None:
    return scores_NTS
  return scores_NTS + jnp.where(seen, 0.0, _NEVER)


def _of_one(mask: Mask) -> Mask:
  """A sequence's own mask, as of a batch of one."""
  return jax.tree.map(lambda x: x[None], mask)


def _blocks_forward(scale, q_BNTH, k_BNSH, v_BNSH, mask):
  layout = _layout(mask, q_BNTH.shape[2], k_BNSH.shape[2])

  def sequence(inputs):
    q_NTH, k_NSH, v_NSH, mask = inputs
    mask = _of_one(mask)
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
  inputs = (*jax.lax.optimization_barrier(
      (q_BNTH * scale, k_BNSH, v_BNSH)), mask)
  output_BNTH, log_sum_BNT1 = jax.lax.map(sequence, inputs)
  return output_BNTH, (*inputs, output_BNTH, log_sum_BNT1)


def _blocks_backward(scale, residuals, dout_BNTH):
  dtype = dout_BNTH.dtype
  mask = residuals[3]
  layout = _layout(mask, dout_BNTH.shape[2], residuals[1].shape[2])

  def sequence(inputs):
    q_NTH, k_NSH, v_NSH, mask, out_NTH, log_sum_NT1, dout_NTH = inputs
    mask = _of_one(mask)
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
  dq_BNTH, dk_BNSH, dv_BNSH = jax.lax.map(sequence, (*residuals, dout_BNTH))
  return dq_BNTH * scale, dk_BNSH, dv_BNSH, None


_blocks.defvjp(_blocks_forward, _blocks_backward)

IMPLEMENTATIONS = {
    "reference": reference,
    "blocks": blocks,
    "dot_product": dot_product,
}


def choose(name: str, backend: str) -> str:
  """The implementation that `auto` means on a backend."""
  if name != "auto":
    return name
  return "blocks" if backend == "cpu" else "dot_product"


# --- Modules -----------------------------------------------------------------


class Attention(nn.Module):
  """Multi-head attention (Vaswani et al. 2017), with grouped queries
  (Ainslie et al. 2023) where there are fewer heads of keys.

  `causal` and `cross` say what it attends to: the tokens before, or the
  context's memory. With a cache, keys and values are kept in the collection
  "cache" and the queries see all that are in it.
  """

  config: config_lib.ModelConfig
  backend: str
  causal: bool
  cross: bool = False

  @nn.compact
  def __call__(
      self, x_BTD: Float[Array, "B T D"], context: layers.Context,
      bias_NTS: Float[Array, "N T S"] | None = None,
      local: bool | Bool[Array, ""] = False,
  ) -> Float[Array, "B T D"]:
    """`local`: within the config's window; traced where layers are scanned."""
    config = self.config
    q_BNTH = self._heads("query", x_BTD, config.num_heads)
    if self.cross:
      k_BKSH, v_BKSH = self._memory(context)
    else:
      k_BKSH, v_BKSH = (self._heads(name, x_BTD, config.num_kv_heads)
                        for name in ("key", "value"))

    mask = Mask(causal=self.causal)
    if self.cross:
      mask = self._memory_mask(context, x_BTD)
    else:
      mask = mask.replace(prefix=context.prefix, segments=context.segments,
                          key_segments=context.segments)
      if config.positions == "rotary":
        base = self._rotary_base(local)
        q_BNTH, k_BKSH = (layers.rotate(x, context.positions, base)
                          for x in (q_BNTH, k_BKSH))
      if context.start is not None:
        all_BKSH = self._cached(context, k_BKSH, v_BKSH)
        # Several tokens are the first ones, and see only each other.
        if x_BTD.shape[1] == 1:
          k_BKSH, v_BKSH = all_BKSH
          mask = mask.replace(start=context.start,
                              key_segments=context.key_segments)
    out_BNTH = self._attend(q_BNTH, k_BKSH, v_BKSH, mask, bias_NTS, local)
    out_BTNH = out_BNTH.swapaxes(1, 2)
    inner = config.num_heads * config.head_dim
    return layers.Projection(
        config, self.backend, (inner, config.d_model), ("heads", "embed"),
        residual=True, name="output")(
            out_BTNH.reshape(*out_BTNH.shape[:2], inner))

  def _heads(self, name: str, x_BTD: Array, count: int) -> Array:
    config = self.config
    axis = "heads" if name == "query" else "kv_heads"
    # Scores that are not divided by sqrt(head_dim) start as if they were.
    scale = (config.head_dim ** -0.5
             if name == "query" and not config.scale_scores else 1.0)
    y_BTD = layers.Projection(
        config, self.backend, (config.d_model, count, config.head_dim),
        ("embed", axis, "head_dim"), fan_in_scale=scale, name=name)(x_BTD)
    y_BTNH = y_BTD.reshape(*y_BTD.shape[:2], count, config.head_dim)
    return layers.constrain(y_BTNH.swapaxes(1, 2),
                            "batch", axis, "length", None)

  def _memory(self, context: layers.Context) -> tuple[Array, Array]:
    """Keys and values of the memory, from the cache once they are there."""
    if context.memory is None:
      return tuple(self.variable("cache", name, lambda: None).value
                   for name in ("keys", "values"))
    made = [self._heads(name, context.memory, self.config.num_kv_heads)
            for name in ("key", "value")]
    if context.start is not None:
      for name, x_BKSH in zip(("keys", "values"), made):
        self.variable("cache", name, lambda: None).value = x_BKSH
    return tuple(made)

  def _cached(self, context: layers.Context, k_BKTH: Array,
              v_BKTH: Array) -> tuple[Array, Array]:
    """Writes new keys and values into the cache and returns all of it."""
    whole = []
    for name, x_BKTH in (("keys", k_BKTH), ("values", v_BKTH)):
      batch, count, _, width = x_BKTH.shape
      length = context.key_segments.shape[1]
      entry = self.variable("cache", name, jnp.zeros,
                            (batch, count, length, width), x_BKTH.dtype)
      entry.value = jax.lax.dynamic_update_slice(
          entry.value, x_BKTH, (0, 0, context.start, 0))
      whole.append(entry.value)
    return tuple(whole)

  def _memory_mask(self, context: layers.Context, x_BTD: Array) -> Mask:
    if context.memory_segments is None:
      return Mask()
    segments_BT = context.segments
    if segments_BT is None:
      segments_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
    return Mask(segments=segments_BT, key_segments=context.memory_segments)

  def _rotary_base(self, local: bool | Array) -> float | Array:
    config = self.config
    if config.rotary_base_local is None or local is False:
      return config.rotary_base
    return jnp.where(local, config.rotary_base_local, config.rotary_base)

  def _attend(self, q_BNTH, k_BKSH, v_BKSH, mask, bias_NTS, local):
    name = choose(self.config.attention, self.backend)
    scale = self.config.head_dim ** -0.5 if self.config.scale_scores else 1.0
    attend = functools.partial(IMPLEMENTATIONS[name], scale=scale)
    if name == "blocks" and bias_NTS is None and mask.start is None:
      # It loops over sequences, which devices share.
      attend = layers.per_shard(attend, "batch", "heads", "length", None)
    near = mask.replace(window=self.config.window)
    if isinstance(local, bool):
      return attend(q_BNTH, k_BKSH, v_BKSH, near if local else mask, bias_NTS)
    return jax.lax.cond(
        local, lambda q, k, v: attend(q, k, v, near, bias_NTS),
        lambda q, k, v: attend(q, k, v, mask, bias_NTS),
        q_BNTH, k_BKSH, v_BKSH)


class RelativeBias(nn.Module):
  """T5's bias of scores by bucketed distance (Raffel et al. 2020, §2.1)."""

  config: config_lib.ModelConfig
  causal: bool

  @nn.compact
  def __call__(self, t_T: Int[Array, "T"], keys: int) -> Float[
      Array, "N T S"]:
    config = self.config
    table_RN = layers.parameter(
        self, "embedding", layers.initializer(config, 1.0),
        (config.relative_buckets, config.num_heads), ("buckets", "heads"))
    # Buckets of all distances are made on the host, where logarithms of
    # exact powers come out exact.
    buckets = jnp.asarray(layers.relative_buckets(
        keys, config.relative_buckets, config.relative_distance,
        bidirectional=not self.causal))
    place_TS = jnp.arange(keys) - t_T[:, None] + keys - 1
    return table_RN[buckets[place_TS]].transpose(2, 0, 1)
