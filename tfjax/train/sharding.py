# SPDX-License-Identifier: Apache-2.0
"""Where arrays live: the mesh, and the rules from logical axes to its axes.

    data      each device group has all parameters and its rows of the batch
    fsdp      rows of the batch too, and parameters cut along d_model
    sequence  a part of every sequence
    tensor    heads, feed-forward width and vocabulary

Any product of them is a mesh; the same config runs on each.
"""

import math
from typing import Any, Mapping, Sequence

from flax import linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from tfjax import config as config_lib
from tfjax.cost import lengths as lengths_lib
from tfjax.models import layers

# Neighbours in the last axis are neighbours in the machine: tensor talks most.
MESH_AXES = ("data", "fsdp", "sequence", "tensor")

# Logical axis -> mesh axis or axes, or None for a dimension that is not cut.
RULES: dict[str, str | tuple[str, ...] | None] = {
    # Of activations.
    "batch": ("data", "fsdp"),
    "length": "sequence",
    # Of parameters.
    "embed": "fsdp",
    "position": None,
    "token_type": None,
    "buckets": None,
    "head_dim": None,
    "layers": None,
    # Of both.
    "stream": None,
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}


def make_mesh(config: config_lib.ExperimentConfig,
              devices: Sequence[Any] | None = None) -> Mesh:
  """The config's mesh over `devices` (by default all that JAX has).

  Of a CPU's devices, which are as many as the process happens to have cores,
  it takes as many as divide the batches. An accelerator that would stand idle
  is an error.

  Raises:
    ConfigError: there are too few devices or too many, or the batches or
      sequences of the config do not divide over them.
  """
  devices = list(jax.devices() if devices is None else devices)
  mesh = config.mesh
  shape = dict(zip(MESH_AXES, (
      mesh.data, mesh.fsdp, mesh.sequence, mesh.tensor)))
  if mesh.data is None:
    shape["data"] = _data_axis(config, devices)
  count = math.prod(shape.values())
  given = config.runtime.num_devices
  if given not in (None, count):
    raise config_lib.ConfigError(
        "runtime.num_devices", f"{given} is not the product of the mesh, "
        f"{product(shape)} = {count}; leave one of mesh.data and "
        "runtime.num_devices unset")
  if count > len(devices):
    raise config_lib.ConfigError(
        "runtime.num_devices" if given else "mesh", f"{count} "
        f"({product(shape)}) is more than the {len(devices)} "
        f"{devices[0].platform} device(s) here")
  processes = _processes(devices)
  if count % len(processes):
    raise config_lib.ConfigError(
        "mesh", f"the {count} devices of {product(shape)} are not the same "
        f"number on each of {len(processes)} processes; use all "
        f"{len(devices)}")
  if count < len(devices) and given is None and devices[0].platform != "cpu":
    raise config_lib.ConfigError(
        "mesh", f"{product(shape)} uses {count} of {len(devices)} "
        f"{devices[0].platform} devices; use all, or set "
        f"runtime.num_devices={count} if the others are to stand idle")
  _check_divides(config, shape)
  used = [device for own in processes
          for device in own[:count // len(processes)]]
  return Mesh(_arranged(tuple(shape.values()), used), MESH_AXES)


def _processes(devices: Sequence[Any]) -> list[list[Any]]:
  """The devices of each process, in the processes' order."""
  own: dict[int, list[Any]] = {}
  for device in devices:
    own.setdefault(device.process_index, []).append(device)
  return [own[index] for index in sorted(own)]


def product(shape: Mapping[str, int]) -> str:
  """A mesh's shape in words, such as data 2 x fsdp 4."""
  return " x ".join(f"{axis} {size}" for axis, size in shape.items())


def _batches(config: config_lib.ExperimentConfig) -> tuple[int, int]:
  """Sequences in a part of a training batch, and in an evaluation batch."""
  train = config.train
  return (train.batch_size // train.accumulation_steps,
          config.evaluation.batch_size or train.batch_size)


def _data_axis(config: config_lib.ExperimentConfig,
               devices: Sequence[Any]) -> int:
  """As many data parts as the other axes leave devices for."""
  mesh, given = config.mesh, config.runtime.num_devices
  others = mesh.fsdp * mesh.sequence * mesh.tensor
  count = given or len(devices)
  if given is None and devices[0].platform == "cpu":
    rows, processes = math.gcd(*_batches(config)), len(_processes(devices))
    return max((n for n in range(1, count // others + 1)
                if rows % (n * mesh.fsdp) == 0 and
                n * others % processes == 0), default=1)
  if count % others:
    raise config_lib.ConfigError(
        "mesh", f"fsdp {mesh.fsdp} x sequence {mesh.sequence} x tensor "
        f"{mesh.tensor} = {others} does not divide {count} devices")
  return count // others


def _check_divides(config: config_lib.ExperimentConfig,
                   shape: dict[str, int]) -> None:
  """Raises where batches or sequences do not divide over the mesh."""
  rows = shape["data"] * shape["fsdp"]
  part, evaluation = _batches(config)
  if part % rows:
    raise config_lib.ConfigError(
        "train.batch_size", f"a part of {part} sequences does not divide "
        f"over {rows} devices (data x fsdp); use a multiple of {rows}, or set "
        "runtime.num_devices or mesh")
  if evaluation % rows:
    raise config_lib.ConfigError(
        "evaluation.batch_size", f"{evaluation} sequences do not divide over "
        f"{rows} devices (data x fsdp); use a multiple of {rows}")
  parts = shape["sequence"]
  lengths = lengths_lib.of(config)
  for stack in ("encoder", "decoder"):
    length = getattr(lengths, stack)
    if length % parts:
      raise config_lib.ConfigError(
          "mesh.sequence", f"{parts} does not divide the {length} tokens of "
          f"the {stack}'s input; choose another mesh.sequence or "
          "model.context_length")


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
  """Devices as a mesh, so that axes lie along the machine's links."""
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  if slices > 1:
    # Between slices the network is slow: best only gradients of `data` cross
    # it, else parameters of `fsdp`.
    between = next((i for i in (0, 1) if shape[i] % slices == 0), None)
    if between is None:
      raise config_lib.ConfigError(
          "mesh.data", f"neither data {shape[0]} nor fsdp {shape[1]} is a "
          f"multiple of the {slices} slices")
    within = [size // slices if i == between else size
              for i, size in enumerate(shape)]
    return mesh_utils.create_hybrid_device_mesh(
        within, [slices if i == between else 1 for i in range(len(shape))],
        devices, allow_split_physical_axes=True)
  return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True)


def mesh_spec(axes: tuple[str | None, ...], where: str) -> P:
  """The partition of an array with these logical axes.

  Raises:
    ValueError: an axis is unknown, or two fall on one mesh axis.
  """
  mapped, used = [], set()
  for axis in axes:
    if axis is not None and axis not in RULES:
      raise ValueError(f"{where}: logical axis {axis!r} has no rule; known: "
                       f"{', '.join(sorted(RULES))}")
    target = None if axis is None else RULES[axis]
    for one in _names(target):
      if one in used:
        raise ValueError(f"{where}: two of the axes {axes} fall on the mesh "
                         f"axis {one!r}")
      used.add(one)
    mapped.append(target)
  return P(*mapped)


def _names(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
  if target is None:
    return ()
  return (target,) if isinstance(target, str) else target


def rules() -> list[tuple[str, Any]]:
  """RULES in Linen's form, checked to cover the closed vocabulary."""
  missing = (layers.PARAMETER_AXES | layers.ACTIVATION_AXES) - set(RULES)
  if missing:
    raise ValueError(f"no rule for the logical axes {sorted(missing)}")
  return list(RULES.items())


def parameter_shardings(boxed: dict, mesh: Mesh) -> Any:
  """A sharding for each parameter of a tree with logical axes.

  Raises:
    ValueError: a parameter has no axes.
    ConfigError: a dimension does not divide over the mesh.
  """
  def one(path, leaf):
    where = "parameter " + "/".join(
        str(getattr(key, "key", key)) for key in path)
    if not isinstance(leaf, nn.LogicallyPartitioned):
      raise ValueError(f"{where} has no logical axes")
    spec = mesh_spec(leaf.names, where)
    for size, axis, target in zip(leaf.value.shape, leaf.names, spec):
      parts = math.prod(mesh.shape[name] for name in _names(target))
      if size % parts:
        raise config_lib.ConfigError(
            f"mesh.{target}", f"{parts} does not divide the {axis!r} "
            f"dimension, {size}, of {where}" + (
                f"; set model.vocab_size to {-(-size // parts) * parts}"
                if axis == "vocab" else ""))
    return NamedSharding(mesh, spec)
  return jax.tree_util.tree_map_with_path(
      one, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P(RULES["batch"]))


def row_parts(mesh: Mesh) -> int:
  """Into how many parts the rows of a batch are cut."""
  return math.prod(mesh.shape[name] for name in _names(RULES["batch"]))


def host_rows(mesh: Mesh, batch_size: int) -> list[int]:
  """The rows of a global batch that lie on this process's devices.

  Where only `sequence` or `tensor` reach over processes, they read the same.
  """
  places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  return sorted({row for (part,) in places.values()
                 for row in range(*part.indices(batch_size))})
