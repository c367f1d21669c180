# SPDX-License-Identifier: Apache-2.0
"""Training FLOPs: by component, by kind and place, and in every convention.

They come from the list of matrix products in products.py. Only these count (a
multiplication and an addition are 2 FLOPs), as in Kaplan et al. 2020 §2.1,
Hoffmann et al. 2022 appendix F and Chowdhery et al. 2022 appendix B: embedding
look-ups, norms, softmax, nonlinearities and the optimizer are left out. So is
what a form of attention makes twice within itself.

FLOPs are a token read: the work of an example over the length of its window,
padding included, as that is computed. Objectives may read more tokens than
they compute on or predict.
"""

import dataclasses
import functools
import math

from flax import linen as nn
import jax

from tfjax import config as config_lib
from tfjax.cost import lengths as lengths_lib
from tfjax.cost import products as products_lib
from tfjax.models import transformer

EVERYTHING = products_lib.EVERYTHING
Trainable = products_lib.Trainable

# Attention counts the full square of queries and keys whatever causality
# skips, as PaLM's MFU and Chinchilla's appendix F do; layers with a window
# count as many keys as that has. The head counts where it runs.
CONVENTION = "matmul+attention_full"
CONVENTIONS = ("6N_non_embedding", "6N_total", CONVENTION,
               "matmul+attention_causal")

# 10^15 FLOP/s for a day.
PF_DAY_FLOPS = 8.64e19


@dataclasses.dataclass(frozen=True)
class Component:
  """FLOPs a token read of a part of the model, in the default convention.

  `recompute` is what rematerialisation adds to forward and backward.
  """

  name: str
  forward: float
  backward: float
  recompute: float

  @property
  def total(self) -> float:
    """What the model needs, however it is computed: without `recompute`."""
    return self.forward + self.backward


@dataclasses.dataclass(frozen=True)
class Flops:
  """FLOPs of some work.

  By kind: dense products, attention scores and values, head, and what
  rematerialisation computes again (not part of `total`). By place: encoder
  and decoder, which make up matmul + attention.
  """

  matmul: float
  attention: float
  head: float
  recompute: float
  encoder: float
  decoder: float

  @property
  def total(self) -> float:
    """What the model needs, however it is computed."""
    return self.matmul + self.attention + self.head

  def __mul__(self, factor: float) -> "Flops":
    return Flops(*(factor * getattr(self, entry.name)
                   for entry in dataclasses.fields(self)))


def components(
    model: config_lib.ModelConfig, lengths: lengths_lib.Lengths,
    trainable: Trainable = EVERYTHING,
) -> tuple[Component, ...]:
  """FLOPs a token read of every part of the model, in forward order.

  Args:
    model: complete, its vocabulary too.
    lengths: of the objective's examples (`lengths.of`).
    trainable: what is trained; by default everything, where the backward pass
      is twice the forward.

  Raises:
    ConfigError: the model is not complete.
    ValueError: the lengths are not those of such a model, or `trainable`
      names a part that it has not.
  """
  counted: dict[str, list[float]] = {}
  for product in products_lib.products(model, lengths, trainable):
    sums = counted.setdefault(product.component, [0, 0, 0])
    sums[0] += product.multiplications
    sums[1] += product.multiplications * product.gradients
    sums[2] += product.multiplications * product.recomputed
  # A multiplication and an addition.
  return tuple(Component(name, *(2 * one / lengths.window for one in sums))
               for name, sums in counted.items())


def training_flops_per_token(
    model: config_lib.ModelConfig, lengths: lengths_lib.Lengths,
    trainable: Trainable = EVERYTHING,
) -> Flops:
  """Forward and backward FLOPs a token read, in the default convention.

  Arguments and errors are those of `components`.
  """
  parts = components(model, lengths, trainable)
  of_place = dict(encoder=0.0, decoder=0.0, head=0.0)
  attention = 0.0
  for part in parts:
    place = part.name.partition("/")[0].removesuffix("_transform")
    of_place[place] += part.total
    if part.name.endswith(products_lib.ATTENTION):
      attention += part.total
  return Flops(
      matmul=of_place["encoder"] + of_place["decoder"] - attention,
      attention=attention, recompute=sum(part.recompute for part in parts),
      **of_place)


def by_convention(model: config_lib.ModelConfig,
                  lengths: lengths_lib.Lengths) -> dict[str, float]:
  """Training FLOPs a token read in each of `CONVENTIONS`.

  6N_non_embedding: 6 N of Kaplan et al. 2020, §2.1. N: all parameters of the
    blocks and their norms, biases too (the paper leaves those out, less than
    0.1% of a GPT-2); not the tables of tokens, positions and token types, nor
    anything of the head.
  6N_total: N is every parameter, a tied head's once.
  matmul+attention_full: the default, as appendix B of Chowdhery et al. 2022
    (PaLM) and appendix F of Hoffmann et al. 2022 (Chinchilla) count.
  matmul+attention_causal: the same, and of attention only the keys that a
    query may see: T (T + 1) / 2 of T^2 pairs under causality, fewer under a
    window. What has no causality has the full square, cross-attention too.
    Borders of documents and padding are not known here and do not count.

  In the first two a parameter counts 6 FLOPs for each token that passes it. So
  it is 6 N a token read of decoders, and of encoders, whose every token passes
  whether it is predicted or not. In encoder-decoders the encoder's parameters
  count for the positions of its inputs and all others for those of the
  decoder's, padding included. That is 6 N where both read the same text, and
  3 N, as Brown et al. 2020 (Table D.1) count T5, where each token is either in
  the source or in the target.

  Raises:
    ConfigError, ValueError: as `components`.
  """
  seen = products_lib.products(model, lengths, seen=True)
  full = training_flops_per_token(model, lengths).total
  counts = transformer.count_parameters(model)
  encoder = _encoder_parameters(model)
  main = lengths.decoder or lengths.encoder

  def six_n(name: str, total: int) -> float:
    inside = encoder[name]
    return (six_n_flops(inside, lengths.encoder) +
            six_n_flops(total - inside, main)) / lengths.window
  return {
      "6N_non_embedding": six_n("non_embedding", counts.non_embedding),
      "6N_total": six_n("total", counts.total),
      CONVENTION: full,
      "matmul+attention_causal": 2 / lengths.window * sum(
          p.multiplications * (1 + p.gradients) for p in seen),
  }


def six_n_flops(params: float, tokens: float) -> float:
  """6 N D: training FLOPs of parameters that so many tokens pass.

  Two forward and four backward for each (Kaplan et al. 2020, §2.1).

  Raises:
    ValueError: a number is negative or not finite.
  """
  for name, value in (("params", params), ("tokens", tokens)):
    if not 0 <= value < math.inf:
      raise ValueError(f"{name} is {value}; it must be 0 or more, and finite")
  return 6 * params * tokens


def model_flops_utilization(
    tokens_per_second: float, flops_per_token: float, num_devices: int,
    peak_flops_per_second: float | None) -> float | None:
  """MFU: the model's FLOPs that are done over those that the devices could do.

  The MFU of Chowdhery et al. 2022, appendix B, from 0 to 1.

  Args:
    tokens_per_second: read by all devices together.
    flops_per_token: of training, without what is recomputed (with it: the
      hardware's utilisation, HFU).
    num_devices: devices as JAX counts them.
    peak_flops_per_second: of one of them; None where it is not known, and
      then so is the MFU.

  Raises:
    ValueError: a number is negative or not finite, or there is no device.
  """
  for name, value, least in (
      ("tokens_per_second", tokens_per_second, 0.0),
      ("flops_per_token", flops_per_token, 0.0),
      ("num_devices", num_devices, 1)):
    if not least <= value < math.inf:
      raise ValueError(
          f"{name} is {value}; it must be at least {least:g}, and finite")
  if peak_flops_per_second is None:
    return None
  if not 0 < peak_flops_per_second < math.inf:
    raise ValueError(f"peak_flops_per_second is {peak_flops_per_second}; it "
                     "must be more than 0 and finite, or None if not known")
  return tokens_per_second * flops_per_token / (
      num_devices * peak_flops_per_second)


@functools.lru_cache(maxsize=256)
def _encoder_parameters(model: config_lib.ModelConfig) -> dict[str, int]:
  """Of the encoder alone: total and non_embedding."""
  if model.architecture == "decoder":
    return {"total": 0, "non_embedding": 0}
  module = transformer.create(model)
  tree = nn.meta.unbox(transformer.abstract_parameters(module))["encoder"]
  sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(part))
           for name, part in tree.items()}
  tables = sum(size for name, size in sizes.items()
               if name.endswith(("position_embedding", "token_type_embedding")))
  total = sum(sizes.values())
  return {"total": total, "non_embedding": total - tables}
