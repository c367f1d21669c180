# SPDX-License-Identifier: Apache-2.0
"""The real train step, compiled ahead of time for devices that need not be
here: TPU topologies, by libtpu's compiler, or simulated CPU devices.

No data is read and nothing is run: shapes follow from the config. What is
learnt of the compiled step is whether it fits, what takes memory and what
moves. What to change is in `tfjax.train.remedies`.
"""

import contextlib
import dataclasses
import math
import os
import re
import sys
import time
from typing import Any, Iterator, Sequence

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
import numpy as np

from tfjax import config as config_lib
from tfjax import objectives
from tfjax.cost import hardware
from tfjax.cost import hlo
from tfjax.cost import lengths as lengths_lib
from tfjax.cost import traffic
from tfjax.data import batches as batches_lib
from tfjax.data import vocabulary as vocabulary_lib
from tfjax.objectives import loss as loss_lib
from tfjax.train import sharding
from tfjax.train import step as step_lib

EXAMPLES = ("v4:2x2x2", "v5e:1x1", "v5e:4x4", "v5e:16x16", "v5p:2x2x1",
            "v5p:4x4x8", "v6e:16x16", "tpu7x:2x2x1", "2xv5e:16x16")


class TopologyError(ValueError):
  """There is no such topology, or nothing here to compile for it."""


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device, by kind, while a step runs.

  Attributes:
    parameters, optimizer, batch: what the step is given, without padding.
    padding: what layouts add to those, and the few other numbers.
    outputs: what the step returns beside the state, which is updated in place.
    temporary: activations, gradients and workspace.
    code: the program.
    peak: what is there at once, as the compiler says, less than the sum where
      kinds take turns; None: it does not say.
  """

  parameters: int
  optimizer: int
  batch: int
  padding: int
  outputs: int
  temporary: int
  code: int
  peak: int | None = None

  @property
  def total(self) -> int:
    return sum(dataclasses.astuple(self)[:-1])

  @property
  def needed(self) -> int:
    return self.total if self.peak is None else self.peak


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What the compiler made of a step.

  Attributes:
    fits: None: there is no memory size to compare to.
    needed_bytes: of a device; at least that, where it does not fit; None where
      the compiler did not say.
    available_bytes: of a device, as the compiler has it, else by its vendor.
    memory, collectives, memory_bytes: None where there is no program, as the
      step does not fit.
    unknown_loops: loops whose length could not be read; they count as one.
    compile_seconds: tracing included.
  """

  fits: bool | None
  needed_bytes: int | None
  available_bytes: int | None
  memory: Memory | None
  collectives: tuple[traffic.Collective, ...] | None
  memory_bytes: float | None
  unknown_loops: int
  compile_seconds: float


# --- Devices -----------------------------------------------------------------


def topology(name: str) -> list[Any]:
  """The devices of a TPU topology, such as v5e:16x16 or, for two slices,
  2xv5e:16x16.

  Raises:
    TopologyError: libtpu is not installed, or knows no such topology.
  """
  if not _has_libtpu():
    raise TopologyError("compiling for TPUs needs libtpu, which is not "
                        "installed: pip install -e '.[tpu]'")
  match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*:(\d+(?:x\d+)*))", name)
  if not match:
    raise TopologyError(_no_topology(name, "it is not of the form "
                                     "GENERATION:SHAPE"))
  slices, one, shape = match.groups()
  options: dict[str, Any] = {} if slices is None else {
      "num_slices": int(slices)}
  bounds = [int(size) for size in shape.split("x")]
  if math.prod(bounds) == 1:
    # Otherwise a host has 2 x 2 chips, which one chip does not divide into.
    options["chips_per_host_bounds"] = [1, 1, 1]
  # Off Google's cloud there is no metadata server to ask.
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  # Compilers may run side by side; libtpu locks for the sake of the chips.
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
  try:
    with _silent():
      found = topologies.get_topology_desc(
          platform="tpu", topology_name=one, **options)
  except (jax.errors.JaxRuntimeError, RuntimeError) as error:
    raise TopologyError(_no_topology(name, str(error))) from None
  return list(found.devices)


def _has_libtpu() -> bool:
  try:
    import libtpu  # pylint: disable=unused-import
  except ImportError:
    return False
  return True


def _no_topology(name: str, problem: str) -> str:
  return (f"no TPU topology {name!r} ({problem}); valid are, for instance, "
          f"{', '.join(EXAMPLES)}")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
  """Without libtpu's complaints that this machine is no TPU's host."""
  sys.stderr.flush()
  kept = os.dup(2)
  null = os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(null, 2)
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(null)


def describe(devices: Sequence[Any], dtype: str) -> hardware.Device:
  """What one of the devices can do."""
  places = {(getattr(d, "slice_index", None), *getattr(d, "coords", (d.id,)))
            for d in devices}
  # A topology shows both cores of a v4 chip; on the machine they are one.
  shared = len(devices) // len(places)
  return hardware.device(devices[0].device_kind, dtype,
                         shared if shared > 1 else None)


# --- Shapes ------------------------------------------------------------------


def abstract_batch(config: config_lib.ExperimentConfig) -> loss_lib.Batch:
  """Shapes and types of a training batch: the objective's own, of no text."""
  length = config.model.context_length
  windows: Any = np.zeros((1, length + 1), np.int32)
  if config.objective.name == "seq2seq" and (
      config.objective.corruption == "pairs"):
    windows = batches_lib.Pairs(
        np.zeros((1, lengths_lib.of(config).encoder), np.int32),
        np.zeros((1, length), np.int32))
  one = objectives.create(config, _stand_in(config)).batch(
      windows, np.ones(1, np.float32), objectives.Generators(0, 0, [0]))
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      (config.train.batch_size, *x.shape[1:]), x.dtype), one)


def _stand_in(
    config: config_lib.ExperimentConfig) -> vocabulary_lib.Vocabulary:
  """A vocabulary that serves any objective, and tells nothing."""
  size = config.model.vocab_size
  special = np.zeros(size, bool)
  special[-1] = True
  return vocabulary_lib.Vocabulary(
      size=size, separator=size - 1, pad=size - 1, start=size - 1,
      mask=size - 1, sentinels=(size - 1,) * config.model.context_length,
      special=special, token_bytes=None, word_starts=special,
      sentence_ends=special)


def make_mesh(config: config_lib.ExperimentConfig,
              devices: Sequence[Any]) -> Mesh:
  """The config's mesh over all of the devices.

  Raises:
    ConfigError: it is of more or fewer, or does not suit the batch or length.
  """
  mesh = sharding.make_mesh(config, devices)
  if mesh.size != len(devices):
    raise config_lib.ConfigError(
        "mesh", f"{sharding.product(mesh.shape)} is "
        f"{mesh.size} of {len(devices)} devices; leave mesh.data unset to use "
        "all")
  return mesh


# --- Compilation -------------------------------------------------------------


def compile_step(config: config_lib.ExperimentConfig, mesh: Mesh,
                 memory_bytes: int | None = None) -> Outcome:
  """Compiles the train step of a config, whose vocabulary is known, for a mesh.

  Args:
    memory_bytes: of a device; unset: what the compiler or the vendor says.

  Raises:
    ConfigError: the model cannot be cut over the mesh.
  """
  begun = time.perf_counter()
  steps = step_lib.steps_for(config, mesh)
  batch = abstract_batch(config)
  given = _given_bytes(steps, batch)
  devices = list(mesh.devices.flat)
  known = memory_bytes or describe(devices, config.train.dtype).memory_bytes
  try:
    compiled = steps.lower_train(batch).compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    needed, available = _exhausted(str(error))
    return Outcome(False, needed, available or known, None, None, None, 0,
                   time.perf_counter() - begun)
  on_tpu = devices[0].platform == "tpu"
  memory = _memory(compiled, on_tpu, *given)
  module = hlo.parse(compiled.as_text())
  collectives, unknown = traffic.collectives(module)
  moved, _ = traffic.memory_bytes(module)
  if on_tpu and memory_bytes is None:
    fits = True  # The compiler refuses what does not.
  else:
    fits = None if known is None else memory.needed <= known
  return Outcome(fits, memory.needed, known, memory, tuple(collectives), moved,
                 unknown, time.perf_counter() - begun)


def state_bytes(config: config_lib.ExperimentConfig, mesh: Mesh) -> int:
  """Bytes of a device for parameters and optimizer state; compiles nothing."""
  return sum(_given_bytes(step_lib.steps_for(config, mesh), None))


def _given_bytes(steps: step_lib.Steps,
                 batch: loss_lib.Batch | None) -> tuple[int, int, int]:
  """Bytes of a device: parameters, optimizer state, and its rows of a batch."""
  def of(tree, sharding_of):
    return sum(math.prod(sharding_of(x).shard_shape(x.shape)) *
               x.dtype.itemsize for x in jax.tree.leaves(tree))
  state, rows = steps.abstract_state, sharding.batch_sharding(steps.mesh)
  return (of(state.params, lambda x: x.sharding),
          of(state.optimizer_state, lambda x: x.sharding),
          of(batch, lambda x: rows))


def _memory(compiled: jax.stages.Compiled, has_peak: bool, parameters: int,
            optimizer: int, batch: int) -> Memory:
  found = compiled.memory_analysis()
  given = found.argument_size_in_bytes
  return Memory(
      parameters=parameters, optimizer=optimizer, batch=batch,
      padding=given - parameters - optimizer - batch,
      outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
      temporary=found.temp_size_in_bytes,
      code=found.generated_code_size_in_bytes,
      # The CPU's compiler leaves out most of what is temporary.
      peak=found.peak_memory_in_bytes if has_peak else None)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"


def _exhausted(message: str) -> tuple[int | None, int | None]:
  """Bytes needed, at least, and available, as the compiler puts it."""
  for pattern in (
      rf"Used {_SIZE} of {_SIZE} hbm",
      rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"):
    if match := re.search(pattern, message):
      needed, needed_unit, available, unit = match.groups()
      return (round(float(needed) * _UNITS[needed_unit]),
              round(float(available) * _UNITS[unit]))
  return None, None
