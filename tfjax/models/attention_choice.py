# SPDX-License-Identifier: Apache-2.0
"""Which form of attention computes a call, and why.

A call is judged by its shapes, types and mask: nothing is computed. The model
asks at every call, so that a prompt of seven tokens or a step with a cache
takes a form that can; `explain` says beforehand what training will take.

Shape letters: B batch, N heads, K heads of keys and values, T length, S keys,
H head width.
"""

from typing import Iterator

import jax
import jax.numpy as jnp

from tfjax import config as config_lib
from tfjax.models import attention_forms
from tfjax.models import attention_shards
from tfjax.models import blocks
from tfjax.models import inputs as inputs_lib
from tfjax.models import kernels
from tfjax.models import masks

# Those that the compiler cuts over devices, which take any call; and those
# that `attention_shards.attend` runs, which have no bias.
ANYWHERE = {
    "reference": attention_forms.reference,
    "dot_product": attention_forms.dot_product,
}
PER_SHARD = {
    "blocks": blocks.blocks,
    "cudnn": kernels.cudnn,
    "splash": kernels.splash,
}
# What is fastest where, and what follows where that cannot.
_ORDER = {
    "cpu": ("blocks", "reference"),
    "gpu": ("cudnn", "dot_product"),
    "tpu": ("splash", "dot_product"),
}
# Between them where the length is cut: the others' scores are T x T / devices.
_LONG = "blocks"

Shaped = jax.Array | jax.ShapeDtypeStruct


def choose(name: str, backend: str, q_BNTH: Shaped, k_BKSH: Shaped,
           mask: masks.Mask, bias: bool = False) -> tuple[str, str]:
  """The form of a call, and why. `name` is config.model.attention; where the
  form named cannot, it is as if it were `auto`."""
  cut = attention_shards.cut()
  first, last = _ORDER.get(backend, ("dot_product", "dot_product"))
  order = [first] if name == "auto" else [name, first]
  order += [_LONG, last] if cut.length > 1 else [last]
  against = []
  for candidate in order:
    problem = _problem(candidate, backend, q_BNTH, k_BKSH, mask, bias, cut)
    if problem is None:
      break
    if (found := f"not {candidate}: {problem}") not in against:
      against.append(found)
  reason = "named in the config" if candidate == name else f"on {backend}"
  if cut.length > 1 and candidate in PER_SHARD:
    reason += (", in a ring of" if candidate == "blocks" else
               ", heads exchanged for length over")
    reason += f" {cut.length} devices"
  return candidate, "; ".join([reason, *against])


def _problem(name: str, backend: str, q_BNTH: Shaped, k_BKSH: Shaped,
             mask: masks.Mask, bias: bool,
             cut: attention_shards.Cut) -> str | None:
  """Why a form cannot compute a call; None: it can."""
  if name in ANYWHERE:
    return None
  if problem := _unlike_training(mask, bias):
    return problem
  for length in (q_BNTH.shape[2], k_BKSH.shape[2]):
    if length % cut.length:
      return (f"a length of {length} does not divide over the {cut.length} "
              "devices of mesh.sequence")
  if name == "blocks":
    return None
  if mask.prefix is not None:
    return "it has no prefix masks"
  heads = q_BNTH.shape[1]
  if heads % (cut.heads * cut.length):
    return (f"{heads} heads do not divide over the {cut.heads} x {cut.length} "
            "devices of mesh.tensor and mesh.sequence")
  if name == "splash":
    return kernels.splash_problem(backend, q_BNTH, k_BKSH)
  return kernels.cudnn_problem(backend, q_BNTH, mask,
                               kernels.cuda_capability())


def _unlike_training(mask: masks.Mask, bias: bool) -> str | None:
  if bias:
    return "it has no relative position bias"
  if mask.start is not None:
    return "it has no cache of keys"
  return None


def explain(config: config_lib.ModelConfig, backend: str, dtype: str,
            inputs: inputs_lib.Inputs) -> tuple[str, str]:
  """The form that a model's attention takes on a batch, and why.

  Where parts of the model take different ones, the name says which takes
  which: "splash (encoder, decoder), dot_product (cross)". To be called in the
  mesh's context; `inputs` may be shapes alone.

  Raises:
    ConfigError: the form that the config names cannot compute the attention
      of a stack to itself.
  """
  asked, cut = config.attention, attention_shards.cut()
  takers: dict[tuple[str, str], list[str]] = {}
  for part, *call in _calls(config, dtype, inputs):
    chosen = choose(asked, backend, *call)
    if asked not in ("auto", chosen[0]) and part != "cross":
      raise config_lib.ConfigError(
          "model.attention", f"{asked} cannot compute the {part}'s attention "
          f"on {backend}: {_problem(asked, backend, *call, cut)}; use auto, "
          f"which would take {choose('auto', backend, *call)[0]}")
    takers.setdefault(chosen, []).append(part)
  if len(takers) == 1:
    return next(iter(takers))
  names: dict[str, list[str]] = {}
  for (name, _), parts in takers.items():
    names.setdefault(name, []).extend(parts)
  return (next(iter(names)) if len(names) == 1 else
          ", ".join(f"{name} ({', '.join(p)})" for name, p in names.items()),
          "; ".join(f"{', '.join(parts)}: {why}"
                    for (_, why), parts in takers.items()))


def _calls(config: config_lib.ModelConfig, dtype: str,
           inputs: inputs_lib.Inputs) -> Iterator[
               tuple[str, Shaped, Shaped, masks.Mask, bool]]:
  """Each kind of attention in a model: a part's name, and what `choose` is
  given."""
  def heads(count: int, tokens) -> Shaped:
    return jax.ShapeDtypeStruct(
        (tokens.shape[0], count, tokens.shape[1], config.head_dim),
        jnp.dtype(dtype))

  def call(mask, queries, keys, bias=False):
    return (heads(config.num_heads, queries), heads(config.num_kv_heads, keys),
            mask, bias)

  stacks = {"encoder": inputs.source or inputs, "decoder": inputs}
  for stack, its in stacks.items():
    if config.architecture not in (stack, "encoder_decoder"):
      continue
    mask = masks.Mask(
        causal=stack == "decoder", segments=its.segments,
        key_segments=its.segments,
        prefix=its.prefix if stack == "decoder" else None)
    windows = {"": 0} if config.global_every or not config.window else {}
    if config.window and config.global_every != 1:
      windows |= {" in a window": config.window}
    for name, window in windows.items():
      yield (stack + (name if len(windows) > 1 else ""),
             *call(mask.replace(window=window), its.tokens, its.tokens,
                   config.positions == "relative"))
  if config.architecture == "encoder_decoder":
    ids = inputs.source.segments
    yield "cross", *call(masks.Mask(segments=ids, key_segments=ids),
                         inputs.tokens, inputs.source.tokens)
