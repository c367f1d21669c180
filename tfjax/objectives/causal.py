# SPDX-License-Identifier: Apache-2.0
"""Causal language modelling: every token is predicted from those before it.

Shape letters: B batch, T length, V vocabulary.
"""

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tfjax.objectives import cross_entropy


def split(
    windows: Int[Array, "B T+1"], weights_B: Float[Array, "B"],
) -> tuple[Array, Array, Array]:
  """Inputs, targets and weights, each B x T, of windows of T + 1 tokens."""
  inputs_BT, targets_BT = windows[:, :-1], windows[:, 1:]
  weights_BT = jnp.broadcast_to(weights_B[:, None], targets_BT.shape)
  return inputs_BT, targets_BT, weights_BT.astype(jnp.float32)


def loss_sum(
    model: nn.Module, params: dict, windows: Int[Array, "B T+1"],
    weights_B: Float[Array, "B"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Summed loss in nats, and the weight that it sums over (tokens)."""
  hidden_BTD, head_VD, targets_BT, weights_BT = _apply(
      model, params, windows, weights_B)
  total = cross_entropy.loss_sum(hidden_BTD, head_VD, targets_BT, weights_BT)
  return total, weights_BT.sum()


def losses(
    model: nn.Module, params: dict, windows: Int[Array, "B T+1"],
    weights_B: Float[Array, "B"],
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
  """Per window: summed loss in nats, and its weight (tokens)."""
  hidden_BTD, head_VD, targets_BT, weights_BT = _apply(
      model, params, windows, weights_B)
  loss_BT = cross_entropy.losses(hidden_BTD, head_VD, targets_BT, weights_BT)
  return loss_BT.sum(1), weights_BT.sum(1)


def _apply(model, params, windows, weights_B):
  """Hidden states and head, with what they are to predict."""
  inputs_BT, targets_BT, weights_BT = split(windows, weights_B)
  variables = {"params": params}
  hidden_BTD = model.apply(variables, inputs_BT, method="hidden")
  head_VD = model.apply(variables, method="head_kernel")
  return hidden_BTD, head_VD, targets_BT, weights_BT
