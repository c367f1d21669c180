# SPDX-License-Identifier: Apache-2.0
"""One compiled step for many runs that differ in values alone.

The members' states lie in one tree, stacked along a first axis that the mesh
axis `run` cuts: each device trains its own members, and none talks to another.
Which members there are, and what becomes of each, is for others to say.

Shape letters: M members, those that fill up the last device included; B
examples of a batch.
"""

import dataclasses
import functools
from typing import Any, Callable, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import jax.numpy as jnp
from jaxtyping import Array, Bool
import numpy as np

from tfjax import config as config_lib
from tfjax.objectives import loss as loss_lib
from tfjax.train import step as step_lib

AXIS = "run"
# Training FLOPs of a member's step up to which a CPU is faster with all
# members in each operation; above, one of them at a time stays in its caches.
# Of 8 members on one core (scripts/bench.py --ensemble), beside one by one:
# at 2.5e7 FLOPs 1.8 times by vmap and 1.35 by map, at 1.8e9 0.8 and 0.9, at
# 6.8e9 0.95 and 1.15. Nothing between was measured.
CPU_VMAP_FLOPS = 3e7

Member = Callable[[Any, loss_lib.Batch], Any]


def form(backend: str, step_flops: float) -> str:
  """How one device trains its members: vmap, all at once, or map, in turn.

  Both are of one program; `step_flops` are of one member's step.
  """
  if backend == "cpu" and step_flops > CPU_VMAP_FLOPS:
    return "map"
  return "vmap"


def run_mesh(devices: Sequence[jax.Device]) -> Mesh:
  """Devices that each have members of their own."""
  return Mesh(np.array(devices), (AXIS,))


class EnsembleSteps:
  """The compiled functions of some members on some devices.

  Attributes:
    mesh: of one axis, `run`.
    size: M, a multiple of the devices.
    form: map or vmap.
  """

  def __init__(self, model_config: config_lib.ModelConfig,
               train_config: config_lib.TrainConfig,
               recovery: config_lib.RecoveryConfig,
               runtime: config_lib.RuntimeConfig,
               devices: tuple[jax.Device, ...], num_members: int, form: str,
               shared_batch: bool):
    """`shared_batch`: all members read the same batches; else those of a step
    are stacked."""
    devices = devices[:num_members]
    self.mesh = run_mesh(devices)
    self.form = form
    self.size = -(-num_members // len(devices)) * len(devices)
    functions = step_lib.Functions(
        model_config, train_config, recovery, runtime, devices[0].platform)
    self._own = NamedSharding(self.mesh, P(AXIS))
    self._everywhere = NamedSharding(self.mesh, P())
    self._shared = shared_batch
    self._of_batch = self._everywhere if shared_batch else self._own
    self._train = jax.jit(
        self._over_members(functions.train, _stay, shared_batch),
        in_shardings=(self._own, self._of_batch, self._own),
        out_shardings=self._own, donate_argnums=0)
    self._losses = jax.jit(
        self._over_members(functions.losses, _nothing, True),
        in_shardings=(self._own, self._everywhere, self._own),
        out_shardings=self._own)
    self._compiled: dict[Any, jax.stages.Compiled] = {}
    self._active: dict[tuple[int, ...], Array] = {}

  def compiled_train(self, state: step_lib.TrainState, batch: loss_lib.Batch
                     ) -> jax.stages.Compiled:
    """The compiled step for states and batches of these shapes; made once.

    (states, batch, active [M]) -> (states, metrics [M]); donates the states.
    Metrics are as in `Steps.compiled_train`; those of members that are not
    active mean nothing, and their states stay.
    """
    leaves, structure = jax.tree.flatten((state, batch))
    key = structure, tuple((x.shape, str(x.dtype)) for x in leaves)
    if key not in self._compiled:
      self._compiled[key] = self.lower_train(state, batch).compile()
    return self._compiled[key]

  def lower_train(self, state: step_lib.TrainState, batch: loss_lib.Batch
                  ) -> jax.stages.Lowered:
    """The step before compilation, to look into."""
    return self._train.lower(state, batch, jax.ShapeDtypeStruct(
        (self.size,), bool, sharding=self._own))

  def evaluate(self, params: Any, batch: loss_lib.Batch,
               active: Bool[Array, "M"]) -> tuple[Array, Array]:
    """Summed loss and weight per example, [M, B], of a batch that all read;
    zeros of those that are not active."""
    return self._losses(
        params, jax.device_put(batch, self._everywhere), active)

  # --- To and from the devices -----------------------------------------------

  def stack(self, states: Sequence[step_lib.TrainState]
            ) -> step_lib.TrainState:
    """The members' states in one tree, on their devices.

    What fills up the last device are copies of the last state.
    """
    return jax.device_put(self._stacked(states), self._own)

  def unstack(self, tree: Any, members: Sequence[int]) -> list[Any]:
    """The parts of a tree that are of some members, as arrays of NumPy; the
    others' stay where they are."""
    each = self.size // self.mesh.size
    found = []
    for member in members:
      device = self.mesh.devices.flat[member // each]
      on_device = jax.tree.map(lambda x, device=device: next(
          shard.data for shard in x.addressable_shards
          if shard.device == device), tree)
      # A copy: on a CPU the tree's own memory is given to the next step.
      found.append(jax.device_get(_one_of(on_device, member % each)))
    return found

  def put(self, batches: Sequence[loss_lib.Batch]) -> loss_lib.Batch:
    """The batch of all members, or one of each, on the devices."""
    return jax.device_put(
        batches[0] if self._shared else self._stacked(batches),
        self._of_batch)

  def active(self, members: Sequence[int]) -> Bool[Array, "M"]:
    """Of all members those that are to do something, on the devices."""
    key = tuple(members)
    if key not in self._active:  # at nearly every step it is
      chosen = np.zeros(self.size, bool)
      chosen[list(key)] = True
      self._active[key] = jax.device_put(chosen, self._own)
    return self._active[key]

  def _stacked(self, trees: Sequence[Any]) -> Any:
    trees = [*trees, *[trees[-1]] * (self.size - len(trees))]
    return jax.tree.map(
        lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *trees)

  # --- Details ---------------------------------------------------------------

  def _over_members(self, function: Member, otherwise: Callable[..., Any],
                    shared_batch: bool) -> Callable[..., Any]:
    """`function` of one member, of all; each device has its own."""
    one = functools.partial(_if_active, function, otherwise)

    def on_device(states, batch, active):
      # The members know of no mesh: each lies on one device.
      with jax.sharding.use_abstract_mesh(_NO_MESH):
        if self.form == "vmap":
          return jax.vmap(one, (0, None if shared_batch else 0, 0))(
              states, batch, active)
        if shared_batch:
          return jax.lax.map(lambda x: one(x[0], batch, x[1]),
                             (states, active))
        return jax.lax.map(lambda x: one(*x), (states, batch, active))
    own = P(AXIS)
    return jax.shard_map(
        on_device, mesh=self.mesh,
        in_specs=(own, P() if shared_batch else own, own), out_specs=own,
        check_vma=False)


@jax.jit
def _one_of(tree: Any, place: int) -> Any:
  return jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, place, keepdims=False), tree)


_NO_MESH = jax.sharding.AbstractMesh((), ())


def _if_active(function: Member, otherwise: Callable[..., Any], state: Any,
               batch: loss_lib.Batch, active: Bool[Array, ""]) -> Any:
  made = jax.eval_shape(function, state, batch)
  return jax.lax.cond(
      active, function, lambda state, _: otherwise(state, made), state, batch)


def _nothing(_: Any, made: Any) -> Any:
  """Zeros of the shapes that would be made."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made)


def _stay(state: step_lib.TrainState, made: Any) -> Any:
  return state, _nothing(state, made[1])


_kept_steps = functools.lru_cache(maxsize=8)(EnsembleSteps)


def steps_for(config: config_lib.ExperimentConfig,
              devices: Sequence[jax.Device], num_members: int, form: str,
              shared_batch: bool) -> EnsembleSteps:
  """`EnsembleSteps`, kept: ensembles of one process share their code.

  `config` is any member's, complete.
  """
  model = dataclasses.replace(
      config.model, init_std=config_lib.ModelConfig().init_std)
  train = dataclasses.replace(
      config.train, batch_size=config.train.accumulation_steps,
      log_every_steps=1)
  runtime = config_lib.RuntimeConfig(cpu_tuning=config.runtime.cpu_tuning)
  return _kept_steps(model, train, config.recovery, runtime, tuple(devices),
                     num_members, form, shared_batch)
