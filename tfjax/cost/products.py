# SPDX-License-Identifier: Apache-2.0
"""The matrix products of a training step, one by one.

The work of any model is a list of matrix products in the order of the forward
pass. Each has a place and a number of multiplications; how many gradients the
backward pass makes of its operands, and whether it makes the product itself
again, follow from what is trained and from model.remat. What FLOPs come of
it, by component and by convention, is in flops.py. Experts are not here: no
config has any yet.
"""

import dataclasses
import functools

from tfjax import config as config_lib
from tfjax.cost import lengths as lengths_lib
from tfjax.models import transformer


@dataclasses.dataclass(frozen=True)
class Product:
  """One matrix product of the forward pass.

  Attributes:
    component: the part of the model, such as "decoder/feed_forward".
    name: the product's in it, such as "up".
    multiplications: in the forward pass of one example.
    gradients: how many of its two operands the backward pass makes a gradient
      of, each with as many multiplications again.
    recomputed: the backward pass makes the product itself again.
  """

  component: str
  name: str
  multiplications: float
  gradients: int
  recomputed: bool = False


@dataclasses.dataclass(frozen=True)
class Trainable:
  """What is trained, where that is not everything.

  Parts are named as components are ("embedding", "head", "encoder",
  "decoder/feed_forward"), or as the weights in them ("decoder/
  attention_projections/query"); a name stands for all that is below it.
  Biases belong to their weights, and a norm to the component it stands
  before (after, in post-norm models). Gradients flow no further down than
  the lowest part that is trained.

  Attributes:
    frozen: parts that get no gradient. A head that is tied to the embedding
      is frozen with that.
    adapted: parts whose weights get a trained product of two thin matrices
      beside them (Hu et al. 2021, LoRA), in the component "STACK/adapters".
    adapter_rank: how thin.
  """

  frozen: tuple[str, ...] = ()
  adapted: tuple[str, ...] = ()
  adapter_rank: int = 0

  def __post_init__(self) -> None:
    if self.adapter_rank < 0 or bool(self.adapted) != (self.adapter_rank > 0):
      raise ValueError(
          f"adapter_rank is {self.adapter_rank} and adapted {self.adapted}; "
          "adapters need a rank of at least 1 and parts that get them")


EVERYTHING = Trainable()

# How the names of components end whose products have no weights.
ATTENTION = ("attention_scores", "attention_values")


@functools.lru_cache(maxsize=256)
def products(
    model: config_lib.ModelConfig, lengths: lengths_lib.Lengths,
    trainable: Trainable = EVERYTHING, *, seen: bool = False,
) -> tuple[Product, ...]:
  """All products of a step, an example.

  Args:
    model: complete, its vocabulary too.
    lengths: of the objective's examples.
    seen: attention counts only the keys that a query may see, and not the
      full square (in layers with a window: as many keys as that has, for
      every query).

  Raises:
    ConfigError: the model is not complete.
    ValueError: the lengths are not those of such a model, or `trainable`
      names a part that it has not.
  """
  for field in ("architecture", "d_ff", "vocab_size"):
    if getattr(model, field) is None:
      raise config_lib.ConfigError(
          f"model.{field}", "is not known yet, and FLOPs depend on it; "
          "complete the model (tfjax.config.complete_model) and take the "
          "vocabulary from the tokenizer")
  for stack in ("encoder", "decoder"):
    length = getattr(lengths, stack)
    if (length > 0) != (model.architecture in (stack, "encoder_decoder")):
      raise ValueError(f"lengths.{stack} is {length}, and the model's "
                       f"architecture {model.architecture!r}")
  walk = _Walk(model, lengths, trainable, seen)
  walk.everything()
  walk.check_names()
  return tuple(walk.products)


class _Walk:
  """Goes through a model from its inputs up, and lists its products.

  What flows is a truth value: whether a gradient has to come back that way.
  """

  def __init__(self, model: config_lib.ModelConfig,
               lengths: lengths_lib.Lengths, trainable: Trainable, seen: bool):
    self.products: list[Product] = []
    self._model, self._lengths = model, lengths
    self._trainable, self._seen = trainable, seen
    self._parts = {"embedding", "head"}

  def everything(self) -> None:
    """Lists all products of the model."""
    model = self._model
    embedded = flows = memory = self._trained("embedding")
    if model.architecture != "decoder":
      flows = memory = self._stack("encoder", embedded, memory=None)
    if model.architecture != "encoder":
      cross = model.architecture == "encoder_decoder"
      flows = self._stack("decoder", embedded, memory if cross else None)
    count, width = self._lengths.predicted, model.d_model
    if model.head_transform:
      flows = self._dense("head_transform", "kernel", count, width, width,
                          flows)
      flows |= self._trained("head_transform/norm")
    kernel = "embedding" if model.tie_embedding else "head/kernel"
    self._dense("head", "kernel", count, width, model.vocab_size, flows,
                weight=kernel)

  def check_names(self) -> None:
    """Raises if `trainable` names what the model has not."""
    for field in ("frozen", "adapted"):
      for name in getattr(self._trainable, field):
        if not any(_within(part, name) for part in self._parts):
          raise ValueError(
              f"trainable.{field}: the model has no part {name!r}; it has "
              f"{', '.join(sorted(self._parts))}")

  def _trained(self, part: str) -> bool:
    self._parts.add(part)
    return not any(_within(part, name) for name in self._trainable.frozen)

  def _adapted(self, weight: str) -> bool:
    return any(_within(weight, name) for name in self._trainable.adapted)

  def _dense(self, component: str, name: str, length: int, inputs: int,
             outputs: int, flows: bool, weight: str | None = None) -> bool:
    """A product with a weight, and its adapter; whether gradients flow on."""
    weight = weight or f"{component}/{name}"
    trained = self._trained(weight)
    self.products.append(Product(
        component, name, length * inputs * outputs, trained + flows))
    if not self._adapted(weight):
      return flows or trained
    rank = self._trainable.adapter_rank
    adapters = f"{component.partition('/')[0]}/adapters"
    self.products += [
        Product(adapters, f"{name}_in", length * inputs * rank, 1 + flows),
        Product(adapters, f"{name}_out", length * rank * outputs, 2)]
    return True

  def _stack(self, stack: str, flows: bool, memory: bool | None) -> bool:
    """Blocks and the last norm. `memory`: whether gradients flow to what the
    cross-attention reads; None: there is none."""
    model = self._model
    layers = (model.num_encoder_layers if stack == "encoder"
              else model.num_layers)
    for local in transformer.local_layers(model)[:layers]:
      first = len(self.products)
      flows = self._attention(stack, "attention", flows, flows, local)
      if memory is not None:
        flows = self._attention(stack, "cross_attention", flows, memory)
      flows = self._feed_forward(stack, flows)
      if model.remat == "full":
        self._recompute_all(first)
    last_norm = self._trained(f"{stack}/norm")
    return flows or (last_norm and model.norm_position == "pre")

  def _attention(self, stack: str, kind: str, flows: bool, memory: bool,
                 local: bool = False) -> bool:
    model, cross = self._model, kind == "cross_attention"
    name, length = f"{stack}/{kind}", getattr(self._lengths, stack)
    keys = self._lengths.encoder if cross else length
    inner = model.num_heads * model.head_dim
    kv_inner = model.num_kv_heads * model.head_dim
    normed = self._trained(f"{name}_projections/norm")
    if model.norm_position == "pre":
      flows |= normed
      memory |= normed and not cross
    project = functools.partial(self._dense, f"{name}_projections")
    query = project("query", length, model.d_model, inner, flows)
    key = project("key", keys, model.d_model, kv_inner, memory)
    value = project("value", keys, model.d_model, kv_inner, memory)
    scores = query or key
    if model.positions == "relative" and not cross:
      scores |= self._trained(f"{name}_scores/bias")
    pairs = length * keys if cross else self._pairs(stack, local)
    # Products with weights are what remat=dots keeps. Weights of attention
    # are needed for any gradient, what they average for the one of the
    # output's kernel alone.
    dots, output = model.remat == "dots", f"{name}_projections/output"
    self.products += [
        Product(f"{name}_scores", "scores", pairs * inner, query + key,
                dots and (scores or value)),
        Product(f"{name}_values", "values", pairs * inner, scores + value,
                dots and (self._trained(output) or self._adapted(output)))]
    out = project("output", length, inner, model.d_model, scores or value)
    return out or flows or normed

  def _pairs(self, stack: str, local: bool) -> float:
    """Queries times the keys of each, in self-attention."""
    length, window = getattr(self._lengths, stack), self._model.window
    if stack == "encoder":
      before = after = window // 2 if local else length
    else:
      before, after = window - 1 if local else length, 0
    if not self._seen:
      return length * min(length, before + 1 + after)
    return seen_pairs(length, before, after,
                      self._lengths.prefix and stack == "decoder")

  def _feed_forward(self, stack: str, flows: bool) -> bool:
    model, length = self._model, getattr(self._lengths, stack)
    component = f"{stack}/feed_forward"
    normed = self._trained(f"{component}/norm")
    if model.norm_position == "pre":
      flows |= normed
    project = functools.partial(self._dense, component)
    hidden = False
    for name in ("up", "gate") if model.gated else ("up",):
      hidden |= project(name, length, model.d_model, model.d_ff, flows)
    out = project("down", length, model.d_ff, model.d_model, hidden)
    return out or flows or normed

  def _recompute_all(self, first: int) -> None:
    """Marks the products of a block, from `first` on, if it has gradients."""
    block = self.products[first:]
    if not any(product.gradients for product in block):
      return
    # The last product of a pre-norm block is only added to the stream, and no
    # gradient depends on it.
    unused = ("down", "down_out") if self._model.norm_position == "pre" else ()
    self.products[first:] = [
        dataclasses.replace(product, recomputed=product.name not in unused)
        for product in block]


def _within(part: str, name: str) -> bool:
  return part == name or part.startswith(f"{name}/")


@functools.lru_cache(maxsize=1024)
def seen_pairs(length: int, before: int, after: int,
               prefix: bool = False) -> float:
  """Pairs of a query and a key that it sees, in self-attention.

  Args:
    length: queries, and keys.
    before, after: how many places before and after its own a query sees.
    prefix: a query also sees the keys after it, as far as it sees back, that
      lie in a prefix of 1 to length - 1 tokens, each as likely; the mean.
  """
  def near(reach):  # summed over places t: min(t, reach)
    reach = min(reach, length - 1)
    return reach * (reach + 1) // 2 + (length - 1 - reach) * reach
  pairs = length + near(before) + near(after)
  if not prefix:
    return pairs
  # Place s is in the prefix with probability (length - 1 - s) / (length - 1).
  last = length - 1
  return pairs + sum(
      min(s, before) * (last - s) for s in range(1, length)) / last
