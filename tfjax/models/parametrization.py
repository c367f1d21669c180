# SPDX-License-Identifier: Apache-2.0
"""How everything that depends on a model's size follows from it: one table.

From a parameter's role to its initial standard deviation, what its learning
rate, Adam's epsilon and the weight decay are multiplied by, and what the model
multiplies its product by. Modules ask for the initial weights and the forward
multipliers, `tfjax.train.optimizers` for the rest; nothing is trained here.

  standard    what the family says; nothing else depends on the size.
  mup         Yang et al. 2022 (Tensor Programs V), Table 8, column Adam: the
              form whose output weights start as large at every width, with a
              multiplier of 1 / width, so that tied heads need no rule of their
              own. Attention scores are divided by the head width (Definition
              4.1), not by its root.
  complete_p  mup, and Dey et al. 2025, Table 1, alpha = 1, for the depth.

All of it is relative to a base, the model that learning rate, init_std and the
rest are given for: of width base_d_model, head width base_head_dim and (for
complete_p) depth base_num_layers. At the base, mup and complete_p are standard.
With m = d_model / base_d_model, h = head_dim / base_head_dim and, for
complete_p, l = num_layers / base_num_layers (otherwise l = 1):

  role        initial std        learning rate  epsilon     decay  product
  input       base's             1              1/m         1      base's
  hidden      base's / sqrt(m)   1/m            1/(m l)     m      1
  query       base's / sqrt(m)   1/m            1/(m l)     m      scores: 1/h
  residual    base's / sqrt(m)   1/m            1/(m l)     m      1/l
  output      base's             1              1/m         1      1/m
  vector      constant           1              1/m, 1/(m l) in a block   -    1
  score_bias  base's             1              h/m         1      1
  output_bias constant           1              1           -      1

Every matrix's inputs and outputs, d_ff and num_heads x head_dim too, are taken
to be in the same proportion to d_model as the base's: then the fan-in of every
hidden matrix is m times the base's. Heads may grow in number, in width or both;
h says which. A fan_in initializer already is mup's for hidden matrices. The
key and value of a fixed number of heads of a fixed width are not hidden
matrices but outputs; no rule here is for them.

Weight decay. AdamW multiplies the decay by the learning rate. Where mup divides
the rate by m, the decay is multiplied by m, so that a step shrinks a weight by
the same part, learning_rate x weight_decay, at every width (Dey et al. 2025,
Table 1; Wang & Aitchison 2024).

Epsilon. All gradients but that of the head's bias fall as 1/m, those within
blocks as 1/(m l), and epsilon with them (Dey et al. 2025, Table 1). A score
bias's falls with the number of heads, m / h.
"""

import dataclasses
import functools
from typing import Callable, Sequence

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array

from tfjax import config as config_lib

# Of each parameter, by the name of its module and its own.
_ROLES = {
    ("token_embedding", "embedding"): "input",
    ("position_embedding", "embedding"): "input",
    ("token_type_embedding", "embedding"): "input",
    ("untied_head", "embedding"): "output",
    ("relative_bias", "embedding"): "score_bias",
    ("query", "kernel"): "query",
    ("key", "kernel"): "hidden",
    ("value", "kernel"): "hidden",
    ("output", "kernel"): "residual",
    ("up", "kernel"): "hidden",
    ("gate", "kernel"): "hidden",
    ("down", "kernel"): "residual",
    ("pooler", "kernel"): "hidden",
    ("head_dense", "kernel"): "hidden",
    ("head_bias", "bias"): "output_bias",
}
# Of any other module.
_VECTORS = ("bias", "scale")
_HIDDEN = ("hidden", "query", "residual")
_CONSTANT = ("vector", "output_bias")


@dataclasses.dataclass(frozen=True)
class Scales:
  """What the optimizer's numbers are multiplied by for one parameter; a
  weight_decay of 0: it does not decay."""

  learning_rate: float
  epsilon: float
  weight_decay: float


@dataclasses.dataclass(frozen=True)
class Row:
  """All about one parameter.

  Attributes:
    name: its path.
    shape, axes: with scanned layers, of all of them.
    role: as in the table above.
    init_std: of its initial weights, which are normal; 0: they are constant.
    scales: what the optimizer's numbers are multiplied by.
    forward: what its product is multiplied by; of a query: the scores.
    head: what logits are multiplied by where this is the head's kernel, tied
      or not; None: it is not.
  """

  name: str
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  role: str
  init_std: float
  scales: Scales
  forward: float
  head: float | None


@dataclasses.dataclass(frozen=True)
class Parameter:
  """The path, shape and logical axes of one; with scanned layers, of all of
  them."""

  path: tuple[str, ...]
  shape: tuple[int, ...]
  axes: tuple[str, ...]

  @property
  def name(self) -> str:
    return "/".join(self.path)


@dataclasses.dataclass(frozen=True)
class _Base:
  """The model that numbers are given for, and how much larger this one is."""

  d_model: int
  head_dim: int
  num_layers: int
  width: float  # m
  head: float  # h
  depth: float  # l


def _base(config: config_lib.ModelConfig) -> _Base:
  width, head, layers = config.d_model, config.head_dim, config.num_layers
  if config.parametrization != "standard":
    width, head = config.base_d_model, config.base_head_dim
  if config.parametrization == "complete_p":
    layers = config.base_num_layers
  return _Base(width, head, layers, config.d_model / width,
               config.head_dim / head, config.num_layers / layers)


# --- What the model multiplies by --------------------------------------------


def embedding_multiplier(config: config_lib.ModelConfig) -> float:
  """Of token embeddings, as they enter the stream."""
  return _base(config).d_model ** 0.5 if config.scale_embedding else 1.0


def score_multiplier(config: config_lib.ModelConfig) -> float:
  """Of the products of queries and keys."""
  base = _base(config)
  scale = base.head_dim ** -0.5 if config.scale_scores else 1.0
  return scale / base.head


def residual_multiplier(config: config_lib.ModelConfig) -> float:
  """Of what a sublayer adds to the stream."""
  return 1 / _base(config).depth


def head_multiplier(config: config_lib.ModelConfig) -> float:
  """Of the head's input, and so of all logits but their bias."""
  base = _base(config)
  scale = base.d_model ** -0.5 if config.scale_head else 1.0
  return scale / base.width


# By the name of a module: its bias is multiplied, too.
_FORWARD = {
    "token_embedding": embedding_multiplier, "query": score_multiplier,
    "output": residual_multiplier, "down": residual_multiplier,
    "untied_head": head_multiplier}


# --- Rules -------------------------------------------------------------------


def role(path: Sequence[str]) -> str:
  """The role of the parameter at a path.

  Raises:
    ValueError: it has none, and so no initial weights, no learning rate and
      no weight decay.
  """
  found = _ROLES.get(tuple(path[-2:]))
  if found is None and path[-1] in _VECTORS:
    found = "vector"
  if found is None:
    known = ", ".join("/".join(names) for names in _ROLES)
    raise ValueError(
        f"no rule of tfjax.models.parametrization covers the parameter "
        f"{'/'.join(path)}; those that it knows end in {known}, "
        f"{', '.join(_VECTORS)}")
  return found


def decays(path: Sequence[str]) -> bool:
  """Whether weight decay pulls on a parameter: matrices and tables."""
  return role(path) not in _CONSTANT


def scales(config: config_lib.ModelConfig, path: Sequence[str]) -> Scales:
  """What is the parameter's own in the optimizer.

  Raises:
    ValueError: as `role`.
  """
  kind, base = role(path), _base(config)
  growth = base.width if kind in _HIDDEN else 1.0
  epsilon = {"output_bias": 1.0, "score_bias": base.head / base.width}.get(
      kind, 1 / base.width)
  if any(name.startswith("block") for name in path):
    epsilon /= base.depth
  return Scales(1 / growth, epsilon, growth if decays(path) else 0.0)


def init_std(config: config_lib.ModelConfig, path: Sequence[str],
             inputs: int) -> float:
  """Of the initial weights of a matrix with so many inputs, or a table; 0 of
  what starts constant.

  Raises:
    ValueError: as `role`.
  """
  kind, base = role(path), _base(config)
  if kind in _CONSTANT:
    return 0.0
  if config.initializer == "fan_in":
    if kind in _HIDDEN:
      # Scores that are not divided by sqrt(head_dim) start as if they were.
      unscaled = kind == "query" and not config.scale_scores
      return (base.head_dim ** -0.5 if unscaled else 1.0) * inputs ** -0.5
    scaled = kind == "output" or (
        path[-2] == "token_embedding" and config.scale_embedding)
    return base.d_model ** -0.5 if scaled else 1.0
  std = config.init_std
  if kind == "residual" and config.norm_position == "pre":
    # GPT-2 §2.3. Post-norm streams do not grow.
    std = std / (2 * base.num_layers) ** 0.5
  return std * base.width ** -0.5 if kind in _HIDDEN else std


def initializer(config: config_lib.ModelConfig, path: Sequence[str],
                inputs: int) -> Callable[..., Array]:
  """Makes the initial weights of a matrix or table."""
  return nn.initializers.normal(init_std(config, path, inputs))


def fold(config: config_lib.ModelConfig,
         params: dict) -> tuple[config_lib.ModelConfig, dict]:
  """The same function as a standard model: its config and parameters.

  What the model multiplies by goes into the weights, that of the logits into
  the last norm where the head is tied. For weights that others will read; to
  train on, learning rates would differ.
  """
  plain = dataclasses.replace(
      config, parametrization="standard", base_d_model=None,
      base_head_dim=None, base_num_layers=None)
  if config.parametrization == "standard":
    return config, params
  embedding, scores, residual, head = (
      multiplier(config) / multiplier(plain) for multiplier in (
          embedding_multiplier, score_multiplier, residual_multiplier,
          head_multiplier))
  factors = {"token_embedding": embedding, "query": scores,
             "output": residual, "down": residual}
  stack = "encoder" if config.architecture == "encoder" else "decoder"
  last = None  # the norm in the last block, which has the stack's name
  if not config.tie_embedding:
    factors["untied_head"] = head
  elif config.head_transform:
    factors["head_norm"] = head / embedding
  else:
    factors["pooler"] = embedding / head
    last = "final_norm" if config.norm_position == "pre" else (
        "feed_forward_norm")

  def change(path, x):
    module = path[-2] if len(path) > 1 else None
    if last and path[0] == stack and module == last:
      if last == "final_norm" or path[1] == f"block_{config.num_layers - 1}":
        return x * (head / embedding)
      if path[1] == "blocks":
        return jnp.asarray(x).at[-1].multiply(head / embedding)
    if path[-2:] == ("pooler", "bias"):
      return x
    factor = factors.get(module, 1.0)
    return x if factor == 1 else x * factor
  return plain, traverse_util.path_aware_map(change, params)


@functools.lru_cache(maxsize=256)
def parameters(config: config_lib.ModelConfig) -> tuple[Parameter, ...]:
  """All of a complete model's; made once."""
  from tfjax.models import transformer  # whose modules ask this one
  boxed = transformer.abstract_parameters(transformer.create(config))
  leaves, _ = jax.tree_util.tree_flatten_with_path(
      boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  return tuple(Parameter(tuple(key.key for key in keys),
                         tuple(leaf.value.shape), tuple(leaf.names))
               for keys, leaf in leaves)


def table(config: config_lib.ModelConfig) -> list[Row]:
  """What is said of every parameter of a model.

  Args:
    config: complete, with its vocabulary.
  """
  rows = []
  for one in parameters(config):
    path, shape, axes = one.path, one.shape, one.axes
    head = "token_embedding" if config.tie_embedding else "untied_head"
    rows.append(Row(
        one.name, shape, axes, role(path),
        init_std(config, path, shape[1 if axes[0] == "layers" else 0]),
        scales(config, path), _FORWARD.get(path[-2], lambda _: 1.0)(config),
        head_multiplier(config) if path[-2] == head else None))
  return rows
