# SPDX-License-Identifier: Apache-2.0
"""The loss that all objectives share, of a batch that one of them made.

Shape letters: B batch, T length, P predicted positions, D model width.
"""

from flax import linen as nn
from flax import struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tfjax.models import inputs as inputs_lib
from tfjax.objectives import cross_entropy


@struct.dataclass
class Batch:
  """Examples: what the model sees, and what it is to predict.

  Attributes:
    inputs: what the model sees.
    targets: token ids; padding may be any id.
    weights: what each target's loss is multiplied by; 0: padding.
    predicted: positions of the targets in the decoder's (or lone encoder's)
      tokens; None: every position has a target, P = T.
  """

  inputs: inputs_lib.Inputs
  targets: Int[Array, "B P"]
  weights: Float[Array, "B P"]
  predicted: Int[Array, "B P"] | None = None


def loss_sum(
    model: nn.Module, params: dict, batch: Batch,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Summed loss in nats, and the weight that it sums over (tokens)."""
  total = cross_entropy.loss_sum(
      model.backend, *_features(model, params, batch), batch.targets, batch.weights)
  return total, batch.weights.sum()


def losses(
    model: nn.Module, params: dict, batch: Batch,
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
  """Per example: summed loss in nats, and its weight (tokens)."""
  loss_BP = cross_entropy.losses(
      model.backend, *_features(model, params, batch), batch.targets, batch.weights)
  return loss_BP.sum(1), batch.weights.sum(1)


def _features(model, params, batch):
  """What the head is applied to, its kernel, and its bias or None."""
  variables = {"params": params}
  hidden_BTD = model.apply(variables, batch.inputs, method="hidden")
  if batch.predicted is not None:
    hidden_BTD = jnp.take_along_axis(
        hidden_BTD, batch.predicted[..., None], axis=1)
  features_BPD = model.apply(variables, hidden_BTD, method="features")
  kernel_VD, bias_V = model.apply(variables, method="head")
  return features_BPD, kernel_VD, bias_V
