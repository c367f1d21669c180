# SPDX-License-Identifier: Apache-2.0
"""Where arrays live: the mesh, and the rules from logical axes to its axes.

Today's mesh has one axis, `data`; a new one is an entry in MESH_AXES and new
right-hand sides in RULES.
"""

import math
from typing import Any

from flax import linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from tfjax import config as config_lib
from tfjax.models import layers

MESH_AXES = ("data",)

# Logical axis -> mesh axis, or None for a dimension that is not cut.
RULES = {
    "batch": "data",
    "length": None,
    "vocab": None,
    "position": None,
    "token_type": None,
    "buckets": None,
    "embed": None,
    "heads": None,
    "kv_heads": None,
    "head_dim": None,
    "mlp": None,
    "layers": None,
}


def make_mesh(runtime: config_lib.RuntimeConfig, batch_size: int,
              evaluation_batch_size: int | None = None) -> Mesh:
  """All local devices (or runtime.num_devices of them) along `data`.

  Of a CPU's devices, which are as many as the process happens to have cores,
  it takes as many as divide the batches. An accelerator that would stand idle
  is an error.
  """
  devices = jax.devices()
  count = runtime.num_devices or len(devices)
  if runtime.num_devices is None and devices[0].platform == "cpu":
    rows = math.gcd(batch_size, evaluation_batch_size or batch_size)
    count = max(n for n in range(1, count + 1) if rows % n == 0)
  if count > len(devices):
    raise config_lib.ConfigError(
        "runtime.num_devices", f"{count} is more than the {len(devices)} "
        f"{devices[0].platform} device(s) here")
  if batch_size % count:
    raise config_lib.ConfigError(
        "train.batch_size", f"a part of {batch_size} sequences does not divide "
        f"over {count} devices; use a multiple of {count}, or set "
        "runtime.num_devices")
  if evaluation_batch_size and evaluation_batch_size % count:
    raise config_lib.ConfigError(
        "evaluation.batch_size", f"{evaluation_batch_size} sequences do not "
        f"divide over {count} devices; use a multiple of {count}")
  return Mesh(np.array(devices[:count]), MESH_AXES)


def mesh_spec(axes: tuple[str | None, ...], where: str) -> P:
  """The partition of an array with these logical axes.

  Raises:
    ValueError: an axis is unknown, or two fall on one mesh axis.
  """
  mapped = []
  for axis in axes:
    if axis is not None and axis not in RULES:
      raise ValueError(f"{where}: logical axis {axis!r} has no rule; known: "
                       f"{', '.join(sorted(RULES))}")
    target = None if axis is None else RULES[axis]
    if target is not None and target in mapped:
      raise ValueError(f"{where}: two of the axes {axes} fall on the mesh axis "
                       f"{target!r}")
    mapped.append(target)
  return P(*mapped)


def rules() -> list[tuple[str, str | None]]:
  """RULES in Linen's form, checked to cover the closed vocabulary."""
  missing = (layers.PARAMETER_AXES | layers.ACTIVATION_AXES) - set(RULES)
  if missing:
    raise ValueError(f"no rule for the logical axes {sorted(missing)}")
  return list(RULES.items())


def parameter_shardings(boxed: dict, mesh: Mesh) -> Any:
  """A sharding for each parameter of a tree with logical axes.

  Raises:
    ValueError: a parameter has no axes, or its dimension does not divide.
  """
  def one(path, leaf):
    where = "parameter " + "/".join(
        str(getattr(key, "key", key)) for key in path)
    if not isinstance(leaf, nn.LogicallyPartitioned):
      raise ValueError(f"{where} has no logical axes")
    spec = mesh_spec(leaf.names, where)
    for size, target in zip(leaf.value.shape, spec):
      if target is not None and size % mesh.shape[target]:
        raise ValueError(f"{where}: {size} does not divide over the "
                         f"{mesh.shape[target]} devices of {target!r}")
    return NamedSharding(mesh, spec)
  return jax.tree_util.tree_map_with_path(
      one, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P(RULES["batch"]))
