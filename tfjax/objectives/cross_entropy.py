# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of a linear head, without the batch's logits in memory.

Shape letters: B batch, T length, C chunk length, D model width, V vocabulary.
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
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> Float[Array, "B T"]:
  """Weighted -log p(target) of every token, in nats, as written."""
  logits_BTV = jnp.einsum("btd,vd->btv", hidden_BTD,
                          head_VD.astype(hidden_BTD.dtype),
                          preferred_element_type=jnp.float32)
  log_p_BT = jnp.take_along_axis(
      jax.nn.log_softmax(logits_BTV), targets_BT[..., None], -1)[..., 0]
  return -log_p_BT * weights_BT


def losses(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> Float[Array, "B T"]:
  """`reference`, chunk by chunk along the length; for evaluation."""
  chunks = _chunks(hidden_BTD, targets_BT, weights_BT)
  losses_BC = jax.lax.map(
      lambda x: reference(x[0], head_VD, x[1], x[2]), chunks)
  return losses_BC.swapaxes(0, 1).reshape(targets_BT.shape)


@jax.custom_vjp
def loss_sum(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> Float[Array, ""]:
  """The sum of `reference`, chunk by chunk along the length.

  Differentiated, the forward pass makes the gradients of `hidden` and `head`
  too, so that logits are computed once and never kept. Targets and weights
  get no gradient.
  """
  return losses(hidden_BTD, head_VD, targets_BT, weights_BT).sum()


def _chunks(*arrays: Array) -> tuple[Array, ...]:
  """Cuts (B, T, ...) along T into (T / C, B, C, ...).

  The batch stays whole, so that its sharding does. C divides T.
  """
  batch, length = arrays[0].shape[:2]
  width = max(1, min(length, CHUNK_TOKENS // batch))
  while length % width:
    width -= 1
  return tuple(
      x.reshape(batch, length // width, width, *x.shape[2:]).swapaxes(0, 1)
      for x in arrays)


def _forward(hidden_BTD, head_VD, targets_BT, weights_BT):
  dtype = hidden_BTD.dtype
  head = head_VD.astype(dtype)

  def chunk(carry, inputs):
    total, dhead_VD = carry
    hidden_BCD, targets_BC, weights_BC = inputs
    logits_BCV = jnp.einsum("bcd,vd->bcv", hidden_BCD, head,
                            preferred_element_type=jnp.float32)
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
    return (total + (loss_BC * weights_BC).sum(), dhead_VD), dhidden_BCD

  start = (jnp.float32(0), jnp.zeros(head_VD.shape, jnp.float32))
  (total, dhead_VD), dhidden = jax.lax.scan(
      chunk, start, _chunks(hidden_BTD, targets_BT, weights_BT))
  dhidden_BTD = dhidden.swapaxes(0, 1).reshape(hidden_BTD.shape)
  return total, (dhidden_BTD, dhead_VD.astype(head_VD.dtype))


def _backward(residuals, dtotal):
  dhidden_BTD, dhead_VD = residuals
  return (dhidden_BTD * dtotal.astype(dhidden_BTD.dtype), dhead_VD * dtotal,
          None, None)


loss_sum.defvjp(_forward, _backward)
