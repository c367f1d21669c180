# SPDX-License-Identifier: Apache-2.0
"""Memory of one device, from a config alone: a training step's, and a cache's.

Nothing is compiled, so that a sweep can be planned in a blink. What a step
holds when is in moments.py, what it keeps of a batch in activations.py; what
the compiler really makes of a step is in `tfjax.train.ahead`.
"""

import dataclasses
import math
from typing import Mapping

from tfjax import config as config_lib
from tfjax.cost import lengths as lengths_lib
from tfjax.cost import moments
from tfjax.models import parametrization

BACKENDS = ("cpu", "gpu", "tpu")
MESH_AXES = ("data", "fsdp", "sequence", "tensor")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device while a training step runs, by kind.

  Attributes:
    parameters, optimizer: the state, float32, exactly.
    batch: the device's rows of it, and the step's few other numbers.
    gradients: of the parameters, where they are alive at the peak, with the
      clipped copies and the sums over the parts of a batch.
    activations: what the backward pass needs of the forward pass, and what one
      layer has beside that while it is at work.
    logits: of a chunk of tokens, their softmax, and the head's gradient.
    copies: of parameters: gathered over fsdp, or in the type that is computed
      in.
  """

  parameters: int
  optimizer: int
  batch: int
  gradients: int
  activations: int
  logits: int
  copies: int

  @property
  def total(self) -> int:
    """Bytes of all kinds together."""
    return sum(dataclasses.astuple(self))


# --- A step ------------------------------------------------------------------


def estimate(config: config_lib.ExperimentConfig,
             mesh_shape: Mapping[str, int], backend: str) -> Memory:
  """Bytes of one device in a training step: the moment that needs most.

  There are three: the loss, when all activations are kept and no gradient is
  there; the backward pass of one layer, in a scan; the update, when all
  gradients are there and no activation.

  How good it is: for CPUs it was compared with XLA's memory_analysis (jaxlib
  0.10.2) of some seventy steps on simulated devices: decoders, encoders and
  encoder-decoders of 1 to 45 million parameters, every remat policy, scanned
  or not, both types, every axis of the mesh. All are within 9%, most within
  3%; tests/cost/test_memory.py asserts 10% of 22. Not compared: bfloat16 in
  models with a relative position bias, scans of layers with and without a
  window, a step that skips bad updates. For TPUs the counts were set by five
  steps of one decoder in bfloat16, compiled for a v5e chip, whose peaks it
  gives to -14% to +6%; a sixth, not used for that, to -5%. Nothing else of
  TPUs (float32, other models, meshes) has been compared, and nothing of GPUs,
  which are taken to be like them.

  Args:
    config: complete, with model.vocab_size set.
    mesh_shape: devices along the axes data, fsdp, sequence and tensor; 1 where
      one is left out.
    backend: cpu, gpu or tpu.

  Raises:
    ConfigError: the vocabulary is not known, or the batch, the lengths or the
      model do not divide over the mesh.
    ValueError: an axis, its size or the backend is none.
  """
  mesh = _checked_mesh(mesh_shape)
  if backend not in BACKENDS:
    raise ValueError(
        f"backend {backend!r} is none of {', '.join(BACKENDS)}")
  if config.model.vocab_size is None:
    raise config_lib.ConfigError(
        "model.vocab_size", "is not known yet; take it from the tokenizer "
        "(tfjax.cost.estimates.with_vocabulary)")
  lengths = lengths_lib.of(config)
  _check_divides(config, mesh, lengths)
  step = moments.Step(config, mesh, backend, lengths)
  peak = max(step.moments(), key=lambda kinds: sum(kinds.values()))
  return Memory(
      parameters=4 * step.parameters, optimizer=8 * step.parameters + 4,
      batch=step.batch_bytes(), **{
          kind: round(peak.get(kind, 0)) for kind in (
              "gradients", "activations", "logits", "copies")})


def _checked_mesh(mesh_shape: Mapping[str, int]) -> dict[str, int]:
  for axis, size in mesh_shape.items():
    if axis not in MESH_AXES:
      raise ValueError(f"mesh_shape has the axis {axis!r}; the axes are "
                       f"{', '.join(MESH_AXES)}")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
      raise ValueError(f"mesh_shape[{axis!r}] is {size!r}; it must be a whole "
                       "number of devices, at least 1")
  return {axis: mesh_shape.get(axis, 1) for axis in MESH_AXES}


def _check_divides(config: config_lib.ExperimentConfig, mesh: dict[str, int],
                   lengths: lengths_lib.Lengths) -> None:
  train, shards = config.train, mesh["data"] * mesh["fsdp"]
  for key, value in (("train.batch_size", train.batch_size),
                     ("train.accumulation_steps", train.accumulation_steps)):
    if value < 1:
      raise config_lib.ConfigError(key, f"is {value}; it must be at least 1")
  unit = shards * train.accumulation_steps
  if train.batch_size % unit:
    raise config_lib.ConfigError(
        "train.batch_size", f"{train.batch_size} sequences do not divide over "
        f"{shards} devices (data x fsdp) and {train.accumulation_steps} parts; "
        f"use a multiple of {unit}")
  for stack in ("encoder", "decoder"):
    if getattr(lengths, stack) % mesh["sequence"]:
      raise config_lib.ConfigError(
          "mesh.sequence", f"{mesh['sequence']} does not divide the "
          f"{getattr(lengths, stack)} tokens of the {stack}'s input")
  for one in parametrization.parameters(config.model):
    for size, axis in zip(one.shape, one.axes):
      target = moments.PARAMETER_AXES.get(axis)
      if target and size % mesh[target]:
        raise config_lib.ConfigError(
            f"mesh.{target}", f"{mesh[target]} does not divide the {axis!r} "
            f"dimension, {size}, of parameter {one.name}")


# --- Generation --------------------------------------------------------------


def cache_bytes(model: config_lib.ModelConfig, batch_size: int, length: int,
                dtype: str, source_length: int | None = None) -> int:
  """Bytes of the keys and values that generation keeps.

  Args:
    batch_size: sequences, beams counted each.
    length: places of the decoder's cache: prompt and new tokens.
    dtype: float32 or bfloat16.
    source_length: tokens of an encoder-decoder's source, as they are padded.

  Raises:
    ValueError: a size is less than 1, the type is none, or a source's length
      is missing, or given where there is no encoder.
    ConfigError: the model is an encoder, which generates nothing.
  """
  if model.architecture == "encoder":
    raise config_lib.ConfigError(
        "model.architecture", "an encoder generates nothing and has no cache")
  if (source_length is None) == (model.architecture == "encoder_decoder"):
    raise ValueError(
        "source_length must be given for an encoder-decoder, and for nothing "
        f"else; the architecture is {model.architecture!r}")
  sizes = dict(batch_size=batch_size, length=length)
  if source_length is not None:
    sizes["source_length"] = source_length
  for name, size in sizes.items():
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
      raise ValueError(f"{name} is {size!r}; it must be a whole number, at "
                       "least 1")
  if dtype not in DTYPE_BYTES:
    raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPE_BYTES)}")
  places = length + (source_length or 0)
  return (2 * DTYPE_BYTES[dtype] * model.num_layers * batch_size * places *
          model.num_kv_heads * model.head_dim)


# --- How large a batch -------------------------------------------------------


def largest_batch(config: config_lib.ExperimentConfig,
                  mesh_shape: Mapping[str, int], available_bytes: int,
                  backend: str) -> int | None:
  """The largest train.batch_size whose estimate fits a device.

  It is a multiple of what the mesh and the accumulation need; None: not even
  that fits. The config's own batch does not matter. Memory is taken to grow
  with the batch. Where a CPU computes a batch in more parts than are asked for
  (runtime.cpu_tuning) it need not: what is returned fits then, and a larger
  batch may, too. An estimate may be wrong: leave it some room.

  Raises:
    ConfigError, ValueError: as `estimate` does, and where available_bytes is
      not a number of bytes.
  """
  if not 0 < available_bytes < math.inf:
    raise ValueError(f"available_bytes is {available_bytes!r}; it must be "
                     "more than 0, and finite")
  mesh = _checked_mesh(mesh_shape)
  unit = mesh["data"] * mesh["fsdp"] * config.train.accumulation_steps

  def fits(units: int) -> bool:
    train = dataclasses.replace(config.train, batch_size=units * unit)
    return estimate(dataclasses.replace(config, train=train), mesh,
                    backend).total <= available_bytes
  if not fits(1):
    return None
  low, high = 1, 2
  while fits(high):
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return low * unit
