# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of a linear head, without the batch's logits in memory.

Shape letters: B batch, T targets, C chunk length, D model width, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tfjax.models import layers

# Logits held at a time, in tokens of the whole batch.
CHUNK_TOKENS = 1024


def reference(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    bias_V: Float[Array, "V"] | None,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> Float[Array, "B T"]:
  """Weighted -log p(target) of every token, in nats, as written."""
  logits_BTV = _logits(hidden_BTD, head_VD.astype(hidden_BTD.dtype), bias_V)
  log_p_BT = jnp.take_along_axis(
      jax.nn.log_softmax(logits_BTV), targets_BT[..., None], -1)[..., 0]
  return -log_p_BT * weights_BT


def losses(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    bias_V: Float[Array, "V"] | None,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> Float[Array, "B T"]:
  """`reference`, chunk by chunk along the length; for evaluation."""
  chunks = _chunks(hidden_BTD, targets_BT, weights_BT)
  losses_BC = jax.lax.map(
      lambda x: reference(x[0], head_VD, bias_V, x[1], x[2]), chunks)
  return _joined(losses_BC, targets_BT.shape[1])


@jax.custom_vjp
def loss_sum(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    bias_V: Float[Array, "V"] | None,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> Float[Array, ""]:
  """The sum of `reference`, chunk by chunk along the length.

  Differentiated, the forward pass makes the gradients of `hidden`, `head` and
  `bias` too, so that logits are computed once and never kept. Targets and
  weights get no gradient.
  """
  return losses(hidden_BTD, head_VD, bias_V, targets_BT, weights_BT).sum()


def _logits(hidden_BCD, head_VD, bias_V):
  logits_BCV = jnp.einsum("bcd,vd->bcv", hidden_BCD, head_VD,
                          preferred_element_type=jnp.float32)
  return logits_BCV if bias_V is None else logits_BCV + bias_V


def _chunks(*arrays: Array) -> tuple[Array, ...]:
  """Cuts (B, T, ...) along T into (T / C, B, C, ...).

  The batch stays whole, so that its sharding does. Where no such C divides T,
  zeros are added, which have no weight.
  """
  batch, length = arrays[0].shape[:2]
  count = -(-length // max(1, CHUNK_TOKENS // batch))
  width = -(-length // count)
  added = count * width - length

  def cut(x):
    x = jnp.pad(x, [(0, 0), (0, added)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(batch, count, width, *x.shape[2:]).swapaxes(0, 1)
  return tuple(map(cut, arrays))


def _joined(x: Array, length: int) -> Array:
  """The inverse for one array: (T / C, B, C, ...) to (B, T, ...)."""
  x = x.swapaxes(0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _forward(hidden_BTD, head_VD, bias_V, targets_BT, weights_BT):
  dtype = hidden_BTD.dtype
  head = head_VD.astype(dtype)

  def chunk(carry, inputs):
    total, dhead_VD, dbias_V = carry
    hidden_BCD, targets_BC, weights_BC = inputs
    logits_BCV = _logits(hidden_BCD, head, bias_V)
    largest_BC1 = logits_BCV.max(-1, keepdims=True)
    exp_BCV = jnp.exp(logits_BCV - largest_BC1)
    sum_BC1 = exp_BCV.sum(-1, keepdims=True)
    hit_BCV = targets_BC[..., None] == jnp.arange(head.shape[0])
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], -1)
    loss_BC = (largest_BC1 + jnp.log(sum_BC1) - target_BC)[..., 0]
    dlogits_BCV = ((exp_BCV / sum_BC1 - hit_BCV) *
                   weights_BC[..., None]).astype(dtype)
    dhidden_BCD = jnp.einsum("bcv,vd->bcd", dlogits_BCV, head)
    dhead_VD += layers.weight_gradient(
        hidden_BCD, dlogits_BCV).T.astype(jnp.float32)
    if bias_V is not None:
      dbias_V += dlogits_BCV.sum((0, 1), dtype=jnp.float32)
    total += (loss_BC * weights_BC).sum()
    return (total, dhead_VD, dbias_V), dhidden_BCD

  start = (jnp.float32(0), jnp.zeros(head_VD.shape, jnp.float32),
           None if bias_V is None else jnp.zeros(bias_V.shape, jnp.float32))
  (total, dhead_VD, dbias_V), dhidden = jax.lax.scan(
      chunk, start, _chunks(hidden_BTD, targets_BT, weights_BT))
  dhidden_BTD = _joined(dhidden, hidden_BTD.shape[1])
  return total, (dhidden_BTD, dhead_VD.astype(head_VD.dtype), dbias_V)


def _backward(residuals, dtotal):
  dhidden_BTD, dhead_VD, dbias_V = residuals
  return (dhidden_BTD * dtotal.astype(dhidden_BTD.dtype), dhead_VD * dtotal,
          None if dbias_V is None else dbias_V * dtotal, None, None)


loss_sum.defvjp(_forward, _backward)
