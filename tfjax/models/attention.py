# SPDX-License-Identifier: Apache-2.0
"""Causal self-attention: one reference, and the forms that are fast.

All take and give (batch, heads, length, head width), with softmax in float32:

- `reference`: the formula; the oracle of the others in tests.
- `block_causal`: for CPUs. Query blocks see only their prefix, so the upper
  triangle is never computed; the backward pass is written out.
- `dot_product`: `jax.nn.dot_product_attention`, for accelerators.

Shape letters: B batch, N heads, T length, S prefix length, H head width.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tfjax import config as config_lib
from tfjax.models import layers

Heads = Float[Array, "B N T H"]

def reference(q_BNTH: Heads, k_BNTH: Heads, v_BNTH: Heads) -> Heads:
  """softmax(q k^T / sqrt(H)) v under a causal mask, as written."""
  length, width = q_BNTH.shape[-2:]
  scores = jnp.einsum("bnth,bnsh->bnts", q_BNTH, k_BNTH,
                      preferred_element_type=jnp.float32) / width**0.5
  mask = jnp.tril(jnp.ones((length, length), bool))
  probabilities = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
  return jnp.einsum("bnts,bnsh->bnth", probabilities.astype(v_BNTH.dtype),
                    v_BNTH)


def dot_product(q_BNTH: Heads, k_BNTH: Heads, v_BNTH: Heads) -> Heads:
  """The library's form, which picks a fused kernel where there is one."""
  q, k, v = (x.swapaxes(1, 2) for x in (q_BNTH, k_BNTH, v_BNTH))
  return jax.nn.dot_product_attention(q, k, v, is_causal=True).swapaxes(1, 2)


@jax.custom_vjp
def block_causal(q_BNTH: Heads, k_BNTH: Heads, v_BNTH: Heads) -> Heads:
  """Blocks of queries against the keys up to their end, by sequence.

  One sequence after the other keeps the scores in a core's cache; only their
  log sums are kept for the backward pass, which makes the scores again.
  """
  return _block_causal_forward(q_BNTH, k_BNTH, v_BNTH)[0]


def _blocks(length: int) -> list[slice]:
  # Small blocks compute less above the diagonal, large ones multiply faster.
  size = 64 if length <= 256 else 128
  return [slice(start, min(start + size, length))
          for start in range(0, length, size)]


def _scores(q_NTH: Array, k_NTH: Array, block: slice) -> Array:
  """Masked scores of a block of (scaled) queries and the keys up to its end."""
  scores_NTS = jnp.einsum(
      "nth,nsh->nts", q_NTH[:, block], k_NTH[:, :block.stop],
      preferred_element_type=jnp.float32)
  allowed = (jnp.arange(block.start, block.stop)[:, None] >=
             jnp.arange(block.stop)[None, :])
  return scores_NTS + jnp.where(allowed, 0.0, -jnp.inf)


def _block_causal_forward(q_BNTH: Heads, k_BNTH: Heads, v_BNTH: Heads):
  def sequence(inputs):
    q_NTH, k_NTH, v_NTH = inputs
    outputs, log_sums = [], []
    for block in _blocks(q_NTH.shape[1]):
      scores = _scores(q_NTH, k_NTH, block)
      largest = scores.max(-1, keepdims=True)
      weights = jnp.exp(scores - largest)
      total = weights.sum(-1, keepdims=True)
      output = jnp.einsum("nts,nsh->nth", weights.astype(v_NTH.dtype),
                          v_NTH[:, :block.stop])
      outputs.append((output / total).astype(v_NTH.dtype))
      log_sums.append(largest + jnp.log(total))
    return jnp.concatenate(outputs, 1), jnp.concatenate(log_sums, 1)

  # Barriers: what makes these arrays would be computed again in every block.
  inputs = jax.lax.optimization_barrier(
      (q_BNTH * q_BNTH.shape[-1] ** -0.5, k_BNTH, v_BNTH))
  output_BNTH, log_sum_BNT1 = jax.lax.map(sequence, inputs)
  return output_BNTH, (*inputs, output_BNTH, log_sum_BNT1)


def _block_causal_backward(residuals, dout_BNTH: Heads):
  dtype = dout_BNTH.dtype

  def sequence(inputs):
    q_NTH, k_NTH, v_NTH, out_NTH, log_sum_NT1, dout_NTH = inputs
    # sum_s p_ts dp_ts = dout_t . out_t (Dao et al. 2022, appendix B.2)
    delta_NT1 = jnp.sum((dout_NTH * out_NTH).astype(jnp.float32), -1,
                        keepdims=True)
    blocks = _blocks(q_NTH.shape[1])
    dq, dk, dv = [], [0.0] * len(blocks), [0.0] * len(blocks)

    def add(sums, parts_NHS):
      for i, block in enumerate(blocks):
        if block.stop <= parts_NHS.shape[2]:
          sums[i] += parts_NHS[:, :, block]

    for block in blocks:
      q, dout = q_NTH[:, block], dout_NTH[:, block]
      k, v = k_NTH[:, :block.stop], v_NTH[:, :block.stop]
      p = jnp.exp(_scores(q_NTH, k_NTH, block) - log_sum_NT1[:, block])
      dp = jnp.einsum("nth,nsh->nts", dout, v,
                      preferred_element_type=jnp.float32)
      ds = (p * (dp - delta_NT1[:, block])).astype(dtype)
      dq.append(jnp.einsum("nts,nsh->nth", ds, k))
      # Transposed, as XLA's product of transposed scores takes twice as long.
      add(dk, jnp.einsum("nth,nts->nhs", q, ds))
      add(dv, jnp.einsum("nth,nts->nhs", dout, p.astype(dtype)))
    return (jnp.concatenate(dq, 1), jnp.concatenate(dk, 2).swapaxes(1, 2),
            jnp.concatenate(dv, 2).swapaxes(1, 2))

  dout_BNTH = jax.lax.optimization_barrier(dout_BNTH)
  dq_BNTH, dk_BNTH, dv_BNTH = jax.lax.map(sequence, (*residuals, dout_BNTH))
  return dq_BNTH * dq_BNTH.shape[-1] ** -0.5, dk_BNTH, dv_BNTH


block_causal.defvjp(_block_causal_forward, _block_causal_backward)

IMPLEMENTATIONS = {
    "reference": reference,
    "block_causal": block_causal,
    "dot_product": dot_product,
}


def choose(name: str, backend: str) -> str:
  """The implementation that `auto` means on a backend."""
  if name != "auto":
    return name
  return "block_causal" if backend == "cpu" else "dot_product"


class Attention(nn.Module):
  """Multi-head causal self-attention (Vaswani et al. 2017)."""

  config: config_lib.ModelConfig
  backend: str

  @nn.compact
  def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    config = self.config
    num_heads, width = config.num_heads, config.head_dim

    def heads(name: str) -> Heads:
      y_BTD = layers.Projection(
          config, self.backend, (config.d_model, num_heads, width),
          ("embed", "heads", "head_dim"), name=name)(x_BTD)
      y_BTNH = y_BTD.reshape(*y_BTD.shape[:2], num_heads, width)
      return layers.constrain(y_BTNH.swapaxes(1, 2),
                              "batch", "heads", "length", None)

    q_BNTH, k_BNTH, v_BNTH = heads("query"), heads("key"), heads("value")
    if config.positions == "rotary":
      q_BNTH = layers.rotate(q_BNTH, config.rotary_base)
      k_BNTH = layers.rotate(k_BNTH, config.rotary_base)
    attend = layers.per_shard(
        IMPLEMENTATIONS[choose(config.attention, self.backend)],
        "batch", "heads", "length", None)
    out_BTNH = attend(q_BNTH, k_BNTH, v_BNTH).swapaxes(1, 2)
    out_BTD = out_BTNH.reshape(*out_BTNH.shape[:2], num_heads * width)
    return layers.Projection(
        config, self.backend, (num_heads * width, config.d_model),
        ("heads", "embed"), layers.residual_std(config), name="output")(
            out_BTD)
