# SPDX-License-Identifier: Apache-2.0
"""The optimizer: AdamW and learning-rate schedules.

All numbers of it are traced values of the train state, not constants of the
compiled step: runs of one model that differ in length, learning rate, betas
or weight decay share one compilation, and may train as one ensemble. What a
parameter's own are, relative to these, is in `tfjax.models.parametrization`.
"""

import dataclasses
from typing import Callable

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

from tfjax import config as config_lib
from tfjax.models import parametrization

# Config fields that only make the numbers of `Hyperparameters`. (So is
# clip_norm, where it is set.)
VALUE_FIELDS = (
    "learning_rate", "warmup_fraction", "warmup_steps", "decay_fraction",
    "final_fraction", "beta1", "beta2", "epsilon", "weight_decay")


@struct.dataclass
class Schedule:
  """The numbers of a learning-rate schedule; `kind` alone is static."""

  peak: Float[Array, ""]
  warmup_steps: Float[Array, ""]
  decay_steps: Float[Array, ""]
  total_steps: Float[Array, ""]
  final_fraction: Float[Array, ""]
  kind: str = struct.field(pytree_node=False)


@struct.dataclass
class Hyperparameters:
  """All numbers of the optimizer; `clip_norm` None: no clipping."""

  schedule: Schedule
  beta1: Float[Array, ""]
  beta2: Float[Array, ""]
  epsilon: Float[Array, ""]
  weight_decay: Float[Array, ""]
  clip_norm: Float[Array, ""] | None


def make_hyperparameters(
    config: config_lib.OptimizerConfig, total_steps: int,
) -> Hyperparameters:
  """The numbers of a run of `total_steps` steps.

  Raises:
    ConfigError: warmup and decay do not fit into the steps.
  """
  return Hyperparameters(
      make_schedule(config, total_steps), *(
          None if x is None else jnp.float32(x) for x in (
              config.beta1, config.beta2, config.epsilon, config.weight_decay,
              config.clip_norm)))


def structure(config: config_lib.OptimizerConfig
              ) -> config_lib.OptimizerConfig:
  """The config with all mere numbers at their default: the same for runs whose
  compiled step is the same."""
  default = config_lib.OptimizerConfig()
  return dataclasses.replace(
      config, clip_norm=config.clip_norm and default.clip_norm,
      **{name: getattr(default, name) for name in VALUE_FIELDS})


def make_schedule(
    config: config_lib.OptimizerConfig, total_steps: int,
) -> Schedule:
  """The schedule of a run of `total_steps` steps."""
  if config.warmup_steps is None:
    warmup = round(config.warmup_fraction * total_steps)
  else:
    warmup = config.warmup_steps
  decay = {"cosine": total_steps - warmup, "linear": total_steps - warmup,
           "wsd": round(config.decay_fraction * total_steps),
           "constant": 0}[config.schedule]
  if warmup + decay > total_steps or decay < 0:
    raise config_lib.ConfigError(
        "optimizer.warmup_steps", f"a warmup of {warmup} steps and a decay of "
        f"{max(decay, 0)} do not fit into {total_steps} steps; at most "
        f"{total_steps - max(decay, 0)} is valid")
  return Schedule(*(jnp.float32(x) for x in (
      config.learning_rate, warmup, decay, total_steps,
      config.final_fraction)), kind=config.schedule)


def learning_rate(
    schedule: Schedule, step: Int[Array, ""],
) -> Float[Array, ""]:
  """The rate of the update after `step` completed ones.

  The warmup rises linearly and reaches the peak in its last step; the decay
  reaches final_fraction of the peak in the run's last step.
  """
  done = step.astype(jnp.float32) + 1
  warm = jnp.minimum(1.0, done / jnp.maximum(schedule.warmup_steps, 1.0))
  start = schedule.total_steps - schedule.decay_steps
  progress = jnp.clip(
      (done - start) / jnp.maximum(schedule.decay_steps, 1.0), 0.0, 1.0)
  if schedule.kind == "cosine":
    progress = (1 - jnp.cos(jnp.pi * progress)) / 2
  decayed = 1 - (1 - schedule.final_fraction) * progress
  return schedule.peak * warm * decayed


def decay_mask(params: dict) -> dict:
  """True for every parameter that decays.

  Raises:
    ValueError: a parameter has no role (`parametrization.role`).
  """
  return jax.tree_util.tree_map_with_path(
      lambda keys, _: parametrization.decays(_names(keys)), params)


def make_optimizer(
    values: Hyperparameters, model: config_lib.ModelConfig,
) -> optax.GradientTransformation:
  """AdamW (Loshchilov & Hutter 2019) up to the factor -learning_rate.

  Each parameter's learning rate, epsilon and weight decay are multiplied as
  `parametrization.scales` says for the model. The gradient norm is clipped
  before.
  """
  clip = (optax.identity() if values.clip_norm is None
          else optax.clip_by_global_norm(values.clip_norm))
  adam = optax.scale_by_adam(values.beta1, values.beta2, values.epsilon)
  if model.parametrization == "standard":
    return optax.chain(clip, adam, optax.add_decayed_weights(
        values.weight_decay, mask=decay_mask))

  def decay(scales, u, p):
    if scales.weight_decay:
      u += values.weight_decay * scales.weight_decay * p
    return u * scales.learning_rate
  # Adam of g / c with an epsilon is Adam of g with c times that epsilon.
  return optax.chain(
      clip, _each(model, lambda scales, g, _: g / scales.epsilon), adam,
      _each(model, decay))


def _each(
    model: config_lib.ModelConfig,
    change: Callable[[parametrization.Scales, Array, Array], Array],
) -> optax.GradientTransformation:
  """Changes each parameter's update by its scales and the parameter."""
  def update(updates, params):
    return jax.tree_util.tree_map_with_path(
        lambda keys, u, p: change(
            parametrization.scales(model, _names(keys)), u, p),
        updates, params)
  return optax.stateless(update)


def _names(keys: tuple[jax.tree_util.DictKey, ...]) -> tuple[str, ...]:
  return tuple(key.key for key in keys)
