# SPDX-License-Identifier: Apache-2.0
"""Parts that every model shares: parameters with named axes, projections,
norms, feed-forward, positions. Attention is in attention.py.

Shape letters: B batch, T length, S memory or cache length, D model width,
F feed-forward width, N heads, H head width, V vocabulary.
"""

import functools
import math
from typing import Any, Callable, Sequence

from flax import linen as nn
from flax import struct
import jax
from jax import ad_checkpoint
from jax.sharding import PartitionSpec as P
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from tfjax import config as config_lib
from tfjax.models import parametrization

# The closed vocabulary of logical axes. `tfjax.train.sharding` maps each one
# to a mesh axis; a name that is not here raises where it is used, as Linen
# itself would silently replicate it.
PARAMETER_AXES = frozenset({
    "vocab", "position", "token_type", "buckets", "embed", "stream", "heads",
    "kv_heads", "head_dim", "mlp", "layers"})
ACTIVATION_AXES = frozenset(
    {"batch", "length", "stream", "heads", "kv_heads", "mlp"})


@struct.dataclass
class Context:
  """What a stack's blocks know beside the stream itself.

  Attributes:
    segments, positions, prefix: as in `tfjax.models.inputs.Inputs`.
    memory, memory_segments: what the encoder made, and its segments.
    start: with a cache, the place that its first new token takes. Several
      tokens in one call are the first ones, from place 0.
    key_segments: with a cache, the segments of all its places.
  """

  segments: Int[Array, "B T"] | None = None
  positions: Int[Array, "B T"] | None = None
  prefix: Int[Array, "B"] | None = None
  memory: Float[Array, "B S D"] | None = None
  memory_segments: Int[Array, "B S"] | None = None
  start: Int[Array, ""] | None = None
  key_segments: Int[Array, "B S"] | None = None


def parameter(
    module: nn.Module,
    name: str,
    init: Callable[..., Array],
    shape: Sequence[int],
    axes: Sequence[str],
) -> Array:
  """A parameter whose every dimension has a logical axis."""
  unknown = [axis for axis in axes if axis not in PARAMETER_AXES]
  if unknown or len(axes) != len(shape):
    path = "/".join((*module.path, name))
    raise ValueError(
        f"parameter {path} of shape {tuple(shape)} has the axes {tuple(axes)}; "
        f"each dimension needs one of {sorted(PARAMETER_AXES)}")
  return module.param(
      name, nn.with_logical_partitioning(init, tuple(axes)), tuple(shape))


def constrain(x: Array, *axes: str | None) -> Array:
  """Asks for an activation's sharding; a no-op without a mesh."""
  unknown = [a for a in axes if a is not None and a not in ACTIVATION_AXES]
  if unknown or len(axes) != x.ndim:
    raise ValueError(
        f"an activation of shape {x.shape} has the axes {axes}; each dimension "
        f"needs one of {sorted(ACTIVATION_AXES)} or None")
  return nn.with_logical_constraint(x, axes)


def scaled(x: Array, multiplier: float) -> Array:
  """x * multiplier; nothing where that is 1."""
  return x if multiplier == 1 else x * multiplier


def mesh_axes(*axes: str | None) -> tuple[str, ...]:
  """The mesh axes of more than one device that logical axes are cut over."""
  return tuple(name for names in _mesh_axes(axes) for name in names)


def parts(*axes: str) -> int:
  """Into how many parts the mesh at hand cuts logical axes."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[name] for name in mesh_axes(*axes))


def _mesh_axes(axes: Sequence[str | None]) -> list[tuple[str, ...]]:
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return [()] * len(axes)
  found = []
  for target in nn.logical_to_mesh_axes(axes):
    names = target if isinstance(target, tuple) else (target,)
    found.append(tuple(
        name for name in names if name and mesh.shape[name] > 1))
  return found


def manual(
    function: Callable[..., Any], inputs: Sequence[Sequence[str | None]],
    outputs: Sequence[Sequence[str | None]], *, check: bool = False,
) -> Callable[..., Any]:
  """`function` on each device's parts of arrays with these logical axes.

  It does its own communication, by `mesh_axes`. An input may be None.
  `check`: JAX keeps account of what varies over which axis, as it must to
  differentiate through the communication.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function
  # Without the axes of one device, over which nothing needs to be summed.
  specs, results = ([P(*_mesh_axes(axes)) for axes in some]
                    for some in (inputs, outputs))

  def call(*arrays):
    return jax.shard_map(
        function, in_specs=tuple(
            None if x is None else spec for x, spec in zip(arrays, specs)),
        out_specs=tuple(results) if len(results) > 1 else results[0],
        check_vma=check)(*arrays)
  return call


def lookup(table_VD: Float[Array, "V D"], ids_BT: Int[Array, "B T"]) -> Float[
    Array, "B T D"]:
  """table[ids] of a table with the axes ("vocab", "embed").

  Each device looks up the rows that it has: left to itself, the compiler
  replicates the whole result of a table that is cut along both axes.
  """
  vocab, embed = mesh_axes("vocab"), mesh_axes("embed")
  if not vocab and not embed:
    return table_VD[ids_BT]

  def local(table_VD, ids_BT):
    if embed:
      table_VD = jax.lax.all_gather(table_VD, embed, axis=1, tiled=True)
    if not vocab:
      return table_VD[ids_BT]
    rows = len(table_VD)
    ids_BT = ids_BT - jax.lax.axis_index(vocab) * rows
    here_BT = (ids_BT >= 0) & (ids_BT < rows)
    found_BTD = table_VD[jnp.clip(ids_BT, 0, rows - 1)]
    return jax.lax.psum(jnp.where(here_BT[..., None], found_BTD, 0), vocab)
  return manual(local, [("vocab", "embed"), ("batch", "length")],
                [("batch", "length", "stream")], check=True)(table_VD, ids_BT)


# --- Projections -------------------------------------------------------------


@jax.custom_vjp
def _cpu_matmul(x_BTD: Array, kernel_DF: Array) -> Array:
  return jnp.einsum("btd,df->btf", x_BTD, kernel_DF)


def _cpu_matmul_forward(x_BTD: Array, kernel_DF: Array):
  return _cpu_matmul(x_BTD, kernel_DF), (x_BTD, kernel_DF)


def _cpu_matmul_backward(residuals, dy_BTF: Array):
  x_BTD, kernel_DF = residuals
  dx_BTD = jnp.einsum("btf,df->btd", dy_BTF, kernel_DF)
  return dx_BTD, weight_gradient(x_BTD, dy_BTF)


def weight_gradient(x_BTD: Array, dy_BTF: Array) -> Array:
  """The D x F gradient of a projection's kernel, in a layout fast on CPUs.

  XLA's CPU backend makes a naive transposed copy of the left operand; its
  cost grows with that operand's width, so the narrower one goes to the left.
  """
  if x_BTD.shape[-1] <= dy_BTF.shape[-1]:
    return jnp.einsum("btd,btf->df", x_BTD, dy_BTF)
  # The barrier keeps XLA from folding the transpose back into the product.
  gradient_FD = jax.lax.optimization_barrier(
      jnp.einsum("btf,btd->fd", dy_BTF, x_BTD))
  return gradient_FD.T


_cpu_matmul.defvjp(_cpu_matmul_forward, _cpu_matmul_backward)


# The name of what `project` returns, for remat=dots: the policies that look for
# products themselves do not see into a custom derivative.
PRODUCT = "product"


def project(x_BTD: Array, kernel_DF: Array, backend: str) -> Array:
  """x @ kernel, differentiated in the form that suits the backend."""
  kernel_DF = kernel_DF.astype(x_BTD.dtype)
  if backend == "cpu":
    y_BTF = _cpu_matmul(x_BTD, kernel_DF)
  else:
    y_BTF = jnp.einsum("btd,df->btf", x_BTD, kernel_DF)
  return ad_checkpoint.checkpoint_name(y_BTF, PRODUCT)


# --- Modules -----------------------------------------------------------------


class Norm(nn.Module):
  """Layer norm (Ba et al. 2016) or RMS norm (Zhang & Sennrich 2019)."""

  config: config_lib.ModelConfig

  @nn.compact
  def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    config = self.config
    d_model = x_BTD.shape[-1]
    # Vectors are not cut: to gather one takes as long as a matrix.
    scale_D = parameter(self, "scale", nn.initializers.ones, (d_model,),
                        ("stream",))
    dtype = x_BTD.dtype
    x_BTD = x_BTD.astype(jnp.float32)
    if config.norm == "layer_norm":
      x_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
    variance_BT1 = jnp.square(x_BTD).mean(-1, keepdims=True)
    x_BTD = x_BTD * jax.lax.rsqrt(variance_BT1 + config.norm_epsilon)
    x_BTD = x_BTD * scale_D
    if config.norm == "layer_norm" and config.use_bias:
      x_BTD += parameter(self, "bias", nn.initializers.zeros, (d_model,),
                         ("stream",))
    return x_BTD.astype(dtype)


def gelu(x: Array) -> Array:
  """GELU as it is defined, x times the normal distribution's integral.

  By erf, which compiles four times faster than the erfc of `jax.nn.gelu`.
  """
  return x * (0.5 + 0.5 * jax.lax.erf(x * 2**-0.5))


def gelu_tanh(x: Array) -> Array:
  """GELU in its tanh form (Hendrycks & Gimpel 2016), as GPT-2 has it.

  Written with the logistic function, (1 + tanh u) / 2 = sigmoid(2 u), which
  XLA computes faster than tanh.
  """
  return x * jax.nn.sigmoid(1.5957691216057308 * (x + 0.044715 * x**3))


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class FeedForward(nn.Module):
  """Two projections around a nonlinearity, or three with a gate."""

  config: config_lib.ModelConfig
  backend: str

  @nn.compact
  def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    config = self.config
    project_to = functools.partial(
        Projection, config=config, backend=self.backend)
    shape, axes = (config.d_model, config.d_ff), ("embed", "mlp")
    activate = ACTIVATIONS[config.activation]
    up_BTF = project_to(shape=shape, axes=axes, name="up")(x_BTD)
    if config.gated:
      gate_BTF = project_to(shape=shape, axes=axes, name="gate")(x_BTD)
      hidden_BTF = activate(gate_BTF) * up_BTF
    else:
      hidden_BTF = activate(up_BTF)
    hidden_BTF = constrain(hidden_BTF, "batch", "length", "mlp")
    return project_to(shape=shape[::-1], axes=axes[::-1], name="down")(
        hidden_BTF)


class Projection(nn.Module):
  """A dense layer; `shape` is (inputs, outputs).

  Outputs may have several dimensions, such as heads and head width, so that
  each can be sharded; the result has them as one.
  """

  config: config_lib.ModelConfig
  backend: str
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  use_bias: bool | None = None  # None: as the config says

  @nn.compact
  def __call__(self, x_BTD: Array) -> Array:
    config = self.config
    init = parametrization.initializer(
        config, (*self.path, "kernel"), self.shape[0])
    kernel = parameter(self, "kernel", init, self.shape, self.axes)
    y_BTF = project(x_BTD, kernel.reshape(self.shape[0], -1), self.backend)
    if config.use_bias if self.use_bias is None else self.use_bias:
      axes = [{"embed": "stream"}.get(axis, axis) for axis in self.axes[1:]]
      bias = parameter(self, "bias", nn.initializers.zeros,
                       self.shape[1:], axes)
      y_BTF += bias.reshape(-1).astype(y_BTF.dtype)
    return y_BTF


# --- Positions ---------------------------------------------------------------


def rotate(
    x_BNTH: Float[Array, "B N T H"], positions_BT: Int[Array, "B T"] | None,
    base: float | Float[Array, ""],
) -> Float[Array, "B N T H"]:
  """Rotary positions (Su et al. 2021), halves of the head width paired."""
  length, width = x_BNTH.shape[-2:]
  frequency = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
  if positions_BT is None:
    positions_BT = jnp.arange(length)[None]
  angle = positions_BT[:, None, :, None].astype(jnp.float32) * frequency
  cosine, sine = jnp.cos(angle), jnp.sin(angle)
  first, second = jnp.split(x_BNTH.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
      [first * cosine - second * sine, second * cosine + first * sine], -1)
  return rotated.astype(x_BNTH.dtype)


def sinusoids(positions_BT: Int[Array, "B T"], width: int) -> Float[
    Array, "B T D"]:
  """Sine and cosine in turn, wavelengths 2 pi to 10,000 x 2 pi (Vaswani et
  al. 2017, §3.5)."""
  frequency = 10000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
  angle = positions_BT[..., None].astype(jnp.float32) * frequency
  pairs = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
  return pairs.reshape(*positions_BT.shape, width)


def relative_buckets(length: int, num_buckets: int, max_distance: int, *,
                     bidirectional: bool) -> np.ndarray:
  """The bucket of each place of a key minus that of its query, from
  1 - length to length - 1 (Raffel et al. 2020, §2.1, as released).

  Half of the buckets are for single distances, the others for ranges that
  grow by a constant factor up to max_distance; bidirectional, half of all are
  for keys behind.
  """
  offset = np.arange(1 - length, length)
  bucket = np.zeros_like(offset)
  if bidirectional:
    num_buckets //= 2
    bucket += num_buckets * (offset > 0)
    distance = np.abs(offset)
  else:
    distance = np.maximum(-offset, 0)
  exact = num_buckets // 2
  # A hair more, so that a power that is exact does not fall below itself.
  far = exact + (np.log(np.maximum(distance, exact) / exact) /
                 np.log(max_distance / exact) * (num_buckets - exact) +
                 1e-9).astype(int)
  return bucket + np.where(distance < exact, distance,
                           np.minimum(far, num_buckets - 1))
