# SPDX-License-Identifier: Apache-2.0
"""The train step: (state, batch) -> (state, metrics), jitted over a mesh.

The step knows no objective and no family by name: an objective has made the
batch, which says what is predicted from what.
"""

import dataclasses
import functools
from typing import Any

from flax import linen as nn
from flax import struct
import jax
from jax.sharding import Mesh
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

from tfjax import config as config_lib
from tfjax.models import transformer
from tfjax.objectives import loss as loss_lib
from tfjax.train import optimizers
from tfjax.train import sharding
from tfjax.train import tuning


@struct.dataclass
class TrainState:
  """All that a step changes, and the numbers of the optimizer that it reads.

  `recent_losses` are of the last good steps, not a number where there were
  fewer; None where nobody asks for spikes.
  """

  step: Int[Array, ""]
  params: Any
  optimizer_state: Any
  hyperparameters: optimizers.Hyperparameters
  recent_losses: Float[Array, "W"] | None = None


class Functions:
  """What one model's functions compute; pure, for whoever compiles them.

  Attributes:
    model: the module.
    recovery: what is bad about a step, and whether it is skipped.
    parameter_shardings: over the mesh; None without one.
  """

  def __init__(self, model_config: config_lib.ModelConfig,
               train_config: config_lib.TrainConfig,
               recovery: config_lib.RecoveryConfig,
               runtime: config_lib.RuntimeConfig, backend: str,
               mesh: Mesh | None = None):
    """`mesh`: what they are compiled over; None: a device has all of it."""
    self.recovery = recovery
    self.model = transformer.create(model_config, backend, train_config.dtype)
    self._part_tokens = tuning.part_tokens(
        runtime, backend, transformer.count_parameters(model_config).total)
    self._accumulation_steps = train_config.accumulation_steps
    self._cut_rows, self._cut_length = (1, 1) if mesh is None else (
        sharding.row_parts(mesh), mesh.shape["sequence"])
    self.parameter_shardings = None if mesh is None else (
        sharding.parameter_shardings(
            transformer.abstract_parameters(self.model), mesh))

  def init(self, key: Array,
           values: optimizers.Hyperparameters) -> TrainState:
    """The state before the first step."""
    # The smallest that divide over the mesh.
    inputs = transformer.example_inputs(
        self.model.config, self._cut_rows, self._cut_length)
    params = nn.meta.unbox(self.model.init(key, inputs)["params"])
    recent = None
    if self.recovery.spike_factor is not None:
      recent = jnp.full(self.recovery.spike_window, jnp.nan)
    # An explicit type: a weakly typed 0 would compile the step twice.
    return TrainState(jnp.zeros((), jnp.int32), params,
                      self._optimizer(values).init(params), values,
                      recent)

  def train(self, state: TrainState, batch: loss_lib.Batch
            ) -> tuple[TrainState, dict[str, Array]]:
    """One step; the metrics are those of `Steps.compiled_train`."""
    total, weight, gradients = self._gradients(state.params, batch)
    # A batch of padding alone has no loss; its weight must not divide.
    scale = 1 / jnp.maximum(weight, 1e-9)
    gradients = jax.tree.map(lambda g: g * scale, gradients)
    values = state.hyperparameters
    rate = optimizers.learning_rate(values.schedule, state.step)
    updates, optimizer_state = self._optimizer(values).update(
        gradients, state.optimizer_state, state.params)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    loss, norm = total * scale, optax.tree.norm(gradients)
    bad, recent = self._judge(loss, norm, state.recent_losses)
    if self.recovery.action == "skip":
      params, optimizer_state = jax.tree.map(
          lambda new, old: jnp.where(bad, old, new),
          (params, optimizer_state), (state.params, state.optimizer_state))
    metrics = dict(loss=loss, learning_rate=rate, grad_norm=norm, bad=bad)
    state = state.replace(
        step=state.step + 1, params=params, optimizer_state=optimizer_state,
        recent_losses=recent)
    return state, metrics

  def losses(self, params: Any, batch: loss_lib.Batch
             ) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Per example: summed loss, weight."""
    return loss_lib.losses(self.model, params, batch)

  def _optimizer(self, values: optimizers.Hyperparameters
                 ) -> optax.GradientTransformation:
    return optimizers.make_optimizer(values, self.model.config)

  def _judge(self, loss: Array, norm: Array, recent: Array | None):
    """Whether a step is bad, and the recent losses after it.

    Decided on the device, so that every process decides alike and the loop
    need not wait for a loss.
    """
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
    if recent is None:
      return bad, None
    # While the window fills the median is not a number, and nothing spikes.
    bad |= loss > self.recovery.spike_factor * jnp.median(recent)
    return bad, jnp.where(bad, recent, jnp.roll(recent, 1).at[0].set(loss))

  def _gradients(self, params, batch: loss_lib.Batch):
    """Summed loss, its weight, and the gradient of the sum.

    Sums, not means, are accumulated over the parts of a batch, so that parts
    with different padding count as they would in one.
    """
    gradient = jax.value_and_grad(
        functools.partial(loss_lib.loss_sum, self.model), has_aux=True)
    parts = self._parts(batch)
    if parts == 1:
      (total, weight), gradients = gradient(params, batch)
      return total, weight, gradients

    def cut(x):
      # Rows i, i + parts, ... form part i: every device keeps its own rows.
      x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
      return x.swapaxes(0, 1)

    def add(sums, part):
      (total, weight), gradients = gradient(params, part)
      return jax.tree.map(jnp.add, sums, (total, weight, gradients)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    if self.parameter_shardings is not None:
      # Each device keeps the sums of its own part of the parameters.
      zeros = jax.lax.with_sharding_constraint(zeros, self.parameter_shardings)
    sums, _ = jax.lax.scan(add, (jnp.float32(0), jnp.float32(0), zeros),
                           jax.tree.map(cut, batch))
    return sums

  def _parts(self, batch: loss_lib.Batch) -> int:
    """How many parts a batch is computed in: what was asked for, or more."""
    rows, parts = batch.targets.shape[0], self._accumulation_steps
    inputs = batch.inputs
    length = sum(x.tokens.shape[1] for x in (inputs, inputs.source) if x)
    shards = self._cut_rows
    tokens = rows // shards * length
    while (self._part_tokens and tokens // parts > self._part_tokens and
           rows % (2 * parts * shards) == 0):
      parts *= 2
    return parts


class Steps:
  """The compiled functions of one model, optimizer and mesh.

  Attributes:
    functions: what they compute.
    abstract_state: shapes, types and shardings of a state; also what a
      checkpoint is restored into.
    init: (key, hyperparameters) -> TrainState.
    evaluate: (params, batch) -> per example summed loss, weight.
  """

  def __init__(self, model_config: config_lib.ModelConfig,
               optimizer_config: config_lib.OptimizerConfig,
               train_config: config_lib.TrainConfig,
               recovery: config_lib.RecoveryConfig,
               runtime: config_lib.RuntimeConfig, mesh: Mesh):
    self.mesh = mesh
    self.functions = Functions(
        model_config, train_config, recovery, runtime,
        mesh.devices.flat[0].platform, mesh)
    values = jax.eval_shape(
        lambda: optimizers.make_hyperparameters(optimizer_config, 10**9))
    abstract = jax.eval_shape(self.functions.init, jax.random.key(0), values)
    self._shardings = self._state_shardings(abstract)
    self.abstract_state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract, self._shardings)
    batch = sharding.batch_sharding(mesh)
    replicated = sharding.replicated(mesh)
    self._train_jitted = jax.jit(
        self.functions.train, in_shardings=(self._shardings, batch),
        out_shardings=(self._shardings, replicated), donate_argnums=0)
    self._train_compiled: dict[Any, jax.stages.Compiled] = {}
    self.init = self._in_mesh(jax.jit(
        self.functions.init, out_shardings=self._shardings))
    self.evaluate = self._in_mesh(jax.jit(
        self.functions.losses,
        in_shardings=(self._shardings.params, batch),
        out_shardings=replicated))

  def compiled_train(self, batch: loss_lib.Batch) -> jax.stages.Compiled:
    """The compiled step for batches of this one's shapes; made once.

    (TrainState, Batch) -> (TrainState, metrics); donates the state. Metrics
    are `loss` (nats a token), `grad_norm` (before clipping), `learning_rate`
    and `bad`: whether loss or gradients are not finite, or the loss spikes
    (config.recovery). Compiled ahead, so that no step ever compiles again: a
    state or batch of another type raises.
    """
    leaves, structure = jax.tree.flatten(batch)
    key = structure, tuple((x.shape, str(x.dtype)) for x in leaves)
    if key not in self._train_compiled:
      self._train_compiled[key] = self.lower_train(batch).compile()
    return self._train_compiled[key]

  def lower_train(self, batch: loss_lib.Batch) -> jax.stages.Lowered:
    """The train step before compilation, to look into."""
    target = sharding.batch_sharding(self.mesh)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=target), batch)
    return self._in_mesh(self._train_jitted.lower)(self.abstract_state, batch)

  def _in_mesh(self, function):
    # Linen's constraints are silently dropped outside of jax.set_mesh.
    @functools.wraps(function)
    def call(*args):
      with jax.set_mesh(self.mesh), nn.logical_axis_rules(sharding.rules()):
        return function(*args)
    return call

  def _state_shardings(self, abstract: TrainState) -> TrainState:
    params = self.functions.parameter_shardings
    replicated = sharding.replicated(self.mesh)
    # A moment lies where its parameter lies, the rest everywhere.
    optimizer_state = optax.tree_map_params(
        optimizers.make_optimizer(
            abstract.hyperparameters, self.functions.model.config),
        lambda _, s: s, abstract.optimizer_state, params,
        transform_non_params=lambda _: replicated)
    everywhere = jax.tree.map(lambda _: replicated, abstract)
    return everywhere.replace(params=params, optimizer_state=optimizer_state)


_kept_steps = functools.lru_cache(maxsize=8)(Steps)


def forget_steps() -> None:
  """Drops what `steps_for` keeps: the next run finds its code on disk."""
  _kept_steps.cache_clear()


def steps_for(config: config_lib.ExperimentConfig, mesh: Mesh) -> Steps:
  """`Steps`, kept: runs of one process that share a model share its code.

  What the compiled step does not depend on is set to its default first.
  """
  optimizer = optimizers.structure(config.optimizer)
  train = dataclasses.replace(
      config.train, batch_size=config.train.accumulation_steps,
      log_every_steps=1)
  runtime = config_lib.RuntimeConfig(cpu_tuning=config.runtime.cpu_tuning)
  return _kept_steps(config.model, optimizer, train, config.recovery, runtime,
                     mesh)


def put(mesh: Mesh, batch: loss_lib.Batch) -> loss_lib.Batch:
  """Host arrays, this process's rows of them, as one global batch.

  The rows are `sharding.host_rows`, in their order.
  """
  return jax.tree.map(functools.partial(
      jax.make_array_from_process_local_data,
      sharding.batch_sharding(mesh)), batch)
