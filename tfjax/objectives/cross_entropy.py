# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of a linear head, without the batch's logits in memory.

Shape letters: B batch, T targets, C chunk length, D model width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tfjax.models import layers

# Tokens whose logits a device holds at a time. On a CPU more would not fit its
# caches; elsewhere fewer would not fill the device.
CHUNK_TOKENS = {"cpu": 1024, "accelerator": 2048}


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
    backend: str,
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    bias_V: Float[Array, "V"] | None,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> Float[Array, "B T"]:
  """`reference`, chunk by chunk along the length; for evaluation."""
  def local(hidden_BTD, head_VD, bias_V, targets_BT, weights_BT):
    head = _Head(head_VD, bias_V, hidden_BTD.dtype)

    def chunk(inputs):
      hidden_BCD, targets_BC, weights_BC = inputs
      return head.losses(hidden_BCD, targets_BC)[0] * weights_BC
    losses_BC = jax.lax.map(
        chunk, _chunks(backend, hidden_BTD, targets_BT, weights_BT))
    return _joined(losses_BC, targets_BT.shape[1])
  length = targets_BT.shape[1]
  call = layers.manual(local, _AXES, [("batch", "length")])
  hidden_BTD, targets_BT, weights_BT = _padded(
      hidden_BTD, targets_BT, weights_BT)
  return call(hidden_BTD, head_VD, bias_V, targets_BT, weights_BT)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def loss_sum(
    backend: str,
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    bias_V: Float[Array, "V"] | None,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> Float[Array, ""]:
  """The sum of `reference`, chunk by chunk along the length.

  Differentiated, the forward pass makes the gradients of `hidden`, `head` and
  `bias` too, so that logits are computed once and never kept. Targets and
  weights get no gradient. Every device computes on its own rows, its part of
  the length and its part of the vocabulary; gradients of the head are summed
  over devices once, not once a chunk.
  """
  return losses(backend, hidden_BTD, head_VD, bias_V, targets_BT,
                weights_BT).sum()


# Of the arguments after `backend`.
_AXES = (("batch", "length", "stream"), ("vocab", "embed"), ("vocab",),
         ("batch", "length"), ("batch", "length"))


class _Head:
  """This device's rows of the vocabulary, and losses by them."""

  def __init__(self, head_VD: Array, bias_V: Array | None, dtype: jnp.dtype):
    head_VD = head_VD.astype(dtype)
    if embed := layers.mesh_axes("embed"):
      head_VD = jax.lax.all_gather(head_VD, embed, axis=1, tiled=True)
    self.kernel_VD, self.bias_V = head_VD, bias_V
    self.vocab = layers.mesh_axes("vocab")
    self.first = (jax.lax.axis_index(self.vocab) * len(head_VD)
                  if self.vocab else 0)

  def losses(self, hidden_BCD: Array, targets_BC: Array):
    """-log p(target); the softmax of own rows; where the targets are in it."""
    logits_BCV = _logits(hidden_BCD, self.kernel_VD, self.bias_V)
    largest_BC1 = logits_BCV.max(-1, keepdims=True)
    if self.vocab:
      largest_BC1 = jax.lax.pmax(largest_BC1, self.vocab)
    exp_BCV = jnp.exp(logits_BCV - largest_BC1)
    index_BC = targets_BC - self.first
    rows = len(self.kernel_VD)
    target_BC1 = jnp.take_along_axis(
        logits_BCV, jnp.clip(index_BC, 0, rows - 1)[..., None], -1)
    sum_BC1 = exp_BCV.sum(-1, keepdims=True)
    if self.vocab:
      here_BC1 = ((index_BC >= 0) & (index_BC < rows))[..., None]
      sum_BC1, target_BC1 = jax.lax.psum(
          (sum_BC1, jnp.where(here_BC1, target_BC1, 0)), self.vocab)
    loss_BC = (largest_BC1 + jnp.log(sum_BC1) - target_BC1)[..., 0]
    return loss_BC, exp_BCV / sum_BC1, index_BC


def _logits(hidden_BCD, head_VD, bias_V):
  logits_BCV = jnp.einsum("bcd,vd->bcv", hidden_BCD, head_VD,
                          preferred_element_type=jnp.float32)
  return logits_BCV if bias_V is None else logits_BCV + bias_V


def _padded(*arrays: Array) -> tuple[Array, ...]:
  """Adds zeros, which have no weight, until the length divides over devices."""
  added = -arrays[0].shape[1] % layers.parts("length")
  return tuple(jnp.pad(x, [(0, 0), (0, added)] + [(0, 0)] * (x.ndim - 2))
               for x in arrays) if added else arrays


def _chunks(backend: str, *arrays: Array) -> tuple[Array, ...]:
  """Cuts (B, T, ...) along T into (T / C, B, C, ...).

  Where no such C divides T, zeros are added, which have no weight.
  """
  batch, length = arrays[0].shape[:2]
  tokens = CHUNK_TOKENS.get(backend, CHUNK_TOKENS["accelerator"])
  count = -(-length // max(1, tokens // batch))
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


def _forward(backend, hidden_BTD, head_VD, bias_V, targets_BT, weights_BT):
  length = targets_BT.shape[1]
  hidden_BTD, targets_BT, weights_BT = _padded(
      hidden_BTD, targets_BT, weights_BT)
  total, dhidden_BTD, dhead_VD, dbias_V = layers.manual(
      functools.partial(_local_forward, backend), _AXES,
      [(), ("batch", "length", "stream"), ("vocab", "embed"), ("vocab",)])(
          hidden_BTD, head_VD, bias_V, targets_BT, weights_BT)
  return total, (dhidden_BTD[:, :length], dhead_VD.astype(head_VD.dtype),
                 None if bias_V is None else dbias_V)


def _local_forward(backend, hidden_BTD, head_VD, bias_V, targets_BT,
                   weights_BT):
  """The loss and its gradients, of one device's part."""
  dtype = hidden_BTD.dtype
  head = _Head(head_VD, bias_V, dtype)

  def chunk(carry, inputs):
    total, dhead_VD, dbias_V = carry
    hidden_BCD, targets_BC, weights_BC = inputs
    loss_BC, p_BCV, index_BC = head.losses(hidden_BCD, targets_BC)
    hit_BCV = index_BC[..., None] == jnp.arange(len(head.kernel_VD))
    dlogits_BCV = ((p_BCV - hit_BCV) * weights_BC[..., None]).astype(dtype)
    dhidden_BCD = jnp.einsum("bcv,vd->bcd", dlogits_BCV, head.kernel_VD)
    dhead_VD += layers.weight_gradient(
        hidden_BCD, dlogits_BCV).T.astype(jnp.float32)
    if bias_V is not None:
      dbias_V += dlogits_BCV.sum((0, 1), dtype=jnp.float32)
    total += (loss_BC * weights_BC).sum()
    return (total, dhead_VD, dbias_V), dhidden_BCD

  rows = len(head.kernel_VD)
  start = (jnp.float32(0), jnp.zeros(head.kernel_VD.shape, jnp.float32),
           jnp.zeros(0 if bias_V is None else rows, jnp.float32))
  (total, dhead_VD, dbias_V), dhidden = jax.lax.scan(
      chunk, start, _chunks(backend, hidden_BTD, targets_BT, weights_BT))
  dhidden_BTD = _joined(dhidden, hidden_BTD.shape[1])
  if head.vocab:
    dhidden_BTD = jax.lax.psum(dhidden_BTD, head.vocab)
  tokens, embed = layers.mesh_axes("batch", "length"), layers.mesh_axes("embed")
  if tokens:
    total, dbias_V = jax.lax.psum((total, dbias_V), tokens)
  if others := tuple(name for name in tokens if name not in embed):
    dhead_VD = jax.lax.psum(dhead_VD, others)
  if embed:
    dhead_VD = jax.lax.psum_scatter(dhead_VD, embed, scatter_dimension=1,
                                    tiled=True)
  return total, dhidden_BTD, dhead_VD, dbias_V


def _backward(backend, residuals, dtotal):
  del backend
  dhidden_BTD, dhead_VD, dbias_V = residuals
  return (dhidden_BTD * dtotal.astype(dhidden_BTD.dtype), dhead_VD * dtotal,
          None if dbias_V is None else dbias_V * dtotal, None, None)


loss_sum.defvjp(_forward, _backward)
