# SPDX-License-Identifier: Apache-2.0
"""The optimizer: AdamW, which parameters decay, and learning-rate schedules.

All numbers of it are traced values of the train state, not constants of the
compiled step: runs of one model that differ in length, learning rate, betas
or weight decay share one compilation, and may train as one ensemble.
"""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

from tfjax import config as config_lib

# Which parameters weight decay pulls on, by the parameter's own name. A name
# that is not here raises: no parameter is left out by accident.
DECAYS = {"kernel": True, "embedding": True, "bias": False, "scale": False}

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
    ValueError: a parameter has a name that no rule covers.
  """
  def rule(path, _):
    name = path[-1].key
    if name not in DECAYS:
      raise ValueError(
          f"no weight-decay rule covers the parameter "
          f"{'/'.join(key.key for key in path)}; known names: "
          f"{', '.join(DECAYS)}")
    return DECAYS[name]
  return jax.tree_util.tree_map_with_path(rule, params)


def make_optimizer(
    values: Hyperparameters,
) -> optax.GradientTransformation:
  """AdamW (Loshchilov & Hutter 2019) up to the factor -learning_rate."""
  clip = (optax.identity() if values.clip_norm is None
          else optax.clip_by_global_norm(values.clip_norm))
  return optax.chain(
      clip,
      optax.scale_by_adam(values.beta1, values.beta2, values.epsilon),
      optax.add_decayed_weights(values.weight_decay, mask=decay_mask),
  )
