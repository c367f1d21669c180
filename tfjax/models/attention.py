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

# The largest block is the fastest until its triangle's wasted half weighs in.
BLOCK = 64


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
  """Each block of queries against the keys up to its end."""
  return _block_causal_forward(q_BNTH, k_BNTH, v_BNTH)[0]


def _blocks(length: int) -> list[tuple[int, int]]:
  return [(start, min(start + BLOCK, length))
          for start in range(0, length, BLOCK)]


def _scores(q_BNTH: Heads, k_BNSH: Heads, start: int) -> Array:
  """Masked scores of a query block that begins at `start`."""
  scale = q_BNTH.shape[-1] ** -0.5
  scores = jnp.einsum("bnth,bnsh->bnts", q_BNTH * scale, k_BNSH,
                      preferred_element_type=jnp.float32)
  length, prefix = scores.shape[-2:]
  mask = (jnp.arange(start, start + length)[:, None] >=
          jnp.arange(prefix)[None, :])
  return jnp.where(mask, scores, -jnp.inf)


def _block_causal_forward(q_BNTH: Heads, k_BNTH: Heads, v_BNTH: Heads):
  outputs, log_sums = [], []
  for start, end in _blocks(q_BNTH.shape[2]):
    scores = _scores(q_BNTH[:, :, start:end], k_BNTH[:, :, :end], start)
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    output = jnp.einsum("bnts,bnsh->bnth", weights.astype(v_BNTH.dtype),
                        v_BNTH[:, :, :end])
    outputs.append((output / total).astype(v_BNTH.dtype))
    log_sums.append(largest + jnp.log(total))
  output_BNTH = jnp.concatenate(outputs, 2)
  log_sum_BNT1 = jnp.concatenate(log_sums, 2)
  return output_BNTH, (q_BNTH, k_BNTH, v_BNTH, output_BNTH, log_sum_BNT1)


def _block_causal_backward(residuals, dout_BNTH: Heads):
  q_BNTH, k_BNTH, v_BNTH, output_BNTH, log_sum_BNT1 = residuals
  dtype, scale = q_BNTH.dtype, q_BNTH.shape[-1] ** -0.5
  # sum_s p_ts dp_ts = dout_t . out_t (Dao et al. 2022, appendix B.2)
  delta_BNT1 = jnp.sum((dout_BNTH * output_BNTH).astype(jnp.float32), -1,
                       keepdims=True)
  blocks = _blocks(q_BNTH.shape[2])
  dq_blocks = []
  dk_blocks, dv_blocks = [None] * len(blocks), [None] * len(blocks)

  def add(sums, parts):
    for i, (start, end) in enumerate(blocks):
      if end > parts.shape[2]:
        break
      part = parts[:, :, start:end]
      sums[i] = part if sums[i] is None else sums[i] + part

  for start, end in blocks:
    here = slice(start, end)
    q, k, v = q_BNTH[:, :, here], k_BNTH[:, :, :end], v_BNTH[:, :, :end]
    dout = dout_BNTH[:, :, here]
    p = jnp.exp(_scores(q, k, start) - log_sum_BNT1[:, :, here])
    dp = jnp.einsum("bnth,bnsh->bnts", dout, v,
                    preferred_element_type=jnp.float32)
    ds = (p * (dp - delta_BNT1[:, :, here])).astype(dtype)
    dq_blocks.append(jnp.einsum("bnts,bnsh->bnth", ds, k) * scale)
    add(dk_blocks, jnp.einsum("bnts,bnth->bnsh", ds, q * scale))
    add(dv_blocks, jnp.einsum("bnts,bnth->bnsh", p.astype(dtype), dout))
  return tuple(jnp.concatenate(x, 2)
               for x in (dq_blocks, dk_blocks, dv_blocks))


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
    init = nn.initializers.normal(config.init_std)

    def heads(name: str) -> Heads:
      y_BTD = _HeadProjection(config, self.backend, init, name=name)(x_BTD)
      y_BTNH = y_BTD.reshape(*y_BTD.shape[:2], num_heads, width)
      return layers.constrain(y_BTNH.swapaxes(1, 2),
                              "batch", "heads", "length", None)

    q_BNTH, k_BNTH, v_BNTH = heads("query"), heads("key"), heads("value")
    if config.positions == "rotary":
      q_BNTH = layers.rotate(q_BNTH, config.rotary_base)
      k_BNTH = layers.rotate(k_BNTH, config.rotary_base)
    attend = IMPLEMENTATIONS[choose(config.attention, self.backend)]
    out_BTNH = attend(q_BNTH, k_BNTH, v_BNTH).swapaxes(1, 2)
    out_BTD = out_BTNH.reshape(*out_BTNH.shape[:2], num_heads * width)
    return layers.Projection(
        config, self.backend, (num_heads * width, config.d_model),
        ("heads", "embed"), layers.residual_std(config), name="output")(
            out_BTD)


class _HeadProjection(nn.Module):
  """D -> N H, with the kernel kept as D x N x H so that heads can shard."""

  config: config_lib.ModelConfig
  backend: str
  init: jax.nn.initializers.Initializer

  @nn.compact
  def __call__(self, x_BTD: Array) -> Array:
    config = self.config
    shape = (config.d_model, config.num_heads, config.head_dim)
    kernel_DNH = layers.parameter(
        self, "kernel", self.init, shape, ("embed", "heads", "head_dim"))
    y_BTD = layers.project(
        x_BTD, kernel_DNH.reshape(shape[0], -1), self.backend)
    if config.use_bias:
      bias_NH = layers.parameter(
          self, "bias", nn.initializers.zeros, shape[1:],
          ("heads", "head_dim"))
      y_BTD += bias_NH.reshape(-1).astype(y_BTD.dtype)
    return y_BTD
