# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention and T5's bias, as modules.

What a query sees is in masks.py. How it is computed: by XLA in
attention_forms.py, on CPUs in blocks.py, by kernels in kernels.py; which of
them in attention_choice.py, over devices in attention_shards.py.

Shape letters: B batch, N heads, K heads of keys and values, T length, S keys,
H head width, D model width.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tfjax import config as config_lib
from tfjax.models import attention_choice
from tfjax.models import attention_shards
from tfjax.models import layers
from tfjax.models import masks
from tfjax.models import parametrization


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

    mask = masks.Mask(causal=self.causal)
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
        name="output")(
            out_BTNH.reshape(*out_BTNH.shape[:2], inner))

  def _heads(self, name: str, x_BTD: Array, count: int) -> Array:
    config = self.config
    axis = "heads" if name == "query" else "kv_heads"
    y_BTD = layers.Projection(
        config, self.backend, (config.d_model, count, config.head_dim),
        ("embed", axis, "head_dim"), name=name)(x_BTD)
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

  def _memory_mask(self, context: layers.Context, x_BTD: Array) -> masks.Mask:
    if context.memory_segments is None:
      return masks.Mask()
    segments_BT = context.segments
    if segments_BT is None:
      segments_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
    return masks.Mask(segments=segments_BT,
                      key_segments=context.memory_segments)

  def _rotary_base(self, local: bool | Array) -> float | Array:
    config = self.config
    if config.rotary_base_local is None or local is False:
      return config.rotary_base
    return jnp.where(local, config.rotary_base_local, config.rotary_base)

  def _attend(self, q_BNTH: Array, k_BKSH: Array, v_BKSH: Array,
              mask: masks.Mask, bias_NTS: Array | None,
              local: bool | Array) -> Array:
    config = self.config
    scale = parametrization.score_multiplier(config)
    self._record_scores(q_BNTH, k_BKSH, scale)

    def attend(mask, q_BNTH, k_BKSH, v_BKSH):
      name, _ = attention_choice.choose(
          config.attention, self.backend, q_BNTH, k_BKSH, mask,
          bias_NTS is not None)
      if name in attention_choice.PER_SHARD:
        return attention_shards.attend(
            attention_choice.PER_SHARD[name], q_BNTH, k_BKSH, v_BKSH, mask,
            scale)
      return attention_choice.ANYWHERE[name](
          q_BNTH, k_BKSH, v_BKSH, mask, bias_NTS, scale)

    near = mask.replace(window=config.window)
    if isinstance(local, bool):
      return attend(near if local else mask, q_BNTH, k_BKSH, v_BKSH)
    return jax.lax.cond(
        local, lambda *heads: attend(near, *heads),
        lambda *heads: attend(mask, *heads), q_BNTH, k_BKSH, v_BKSH)

  def _record_scores(self, q_BNTH: Array, k_BKSH: Array,
                     scale: float) -> None:
    """Keeps what the softmax is taken of, without bias and mask, for whoever
    asks for "intermediates"; no form of attention keeps it itself."""
    if not self.is_mutable_collection("intermediates"):
      return
    groups = q_BNTH.shape[1] // k_BKSH.shape[1]
    self.sow("intermediates", "scores", scale * jnp.einsum(
        "bnth,bnsh->bnts", q_BNTH, jnp.repeat(k_BKSH, groups, 1)))


class RelativeBias(nn.Module):
  """T5's bias of scores by bucketed distance (Raffel et al. 2020, §2.1)."""

  config: config_lib.ModelConfig
  causal: bool

  @nn.compact
  def __call__(self, t_T: Int[Array, "T"], keys: int) -> Float[
      Array, "N T S"]:
    config = self.config
    table_RN = layers.parameter(
        self, "embedding", parametrization.initializer(
            config, ("relative_bias", "embedding"), config.relative_buckets),
        (config.relative_buckets, config.num_heads), ("buckets", "heads"))
    # Buckets of all distances are made on the host, where logarithms of
    # exact powers come out exact.
    buckets = jnp.asarray(layers.relative_buckets(
        keys, config.relative_buckets, config.relative_distance,
        bidirectional=not self.causal))
    place_TS = jnp.arange(keys) - t_T[:, None] + keys - 1
    return table_RN[buckets[place_TS]].transpose(2, 0, 1)
