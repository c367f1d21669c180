# SPDX-License-Identifier: Apache-2.0
"""FLOPs against the compiler's count of a step that is compiled, never run.

Layers are unrolled and the head's logits are one chunk, as the compiler counts
the body of a loop once. The reference form of attention computes the full
square, under causality and windows too. What the compiler counts beside matrix
products (norms, softmax, nonlinearities) falls as one over the widths: at
these it is below 1% of a step, and the gradient of one attention operand
would be more than that.
"""

import dataclasses
import types
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax import objectives
from tfjax.cost import flops
from tfjax.cost import lengths as lengths_lib
from tfjax.cost import products
from tfjax.data import batches
from tfjax.models import families
from tfjax.models import layers
from tfjax.models import transformer
from tfjax.objectives import cross_entropy
from tfjax.objectives import loss as loss_lib

VOCABULARY = types.SimpleNamespace(
    separator=0, pad=0, start=0, mask=1, sentinels=range(2000, 2048),
    special=np.zeros(2048, bool), word_starts=None, sentence_ends=None)
# One block a stack, as what one costs all do: compiling takes less long.
SHAPE = {
    "model.d_model": 512, "model.num_layers": 1, "model.num_heads": 4,
    "model.head_dim": 160, "model.context_length": 192,
    "model.attention": "reference", "data.tokenizer.vocab_size": 2048,
    "duration.steps": 1}
PAIRS = {
    "objective.corruption": "pairs", "objective.source_length": 100,
    "data.corpus": "files", "data.files": ("unread.jsonl",),
    "data.target_field": "target"}


def make(family: str, changes: dict[str, Any]) -> config_lib.ExperimentConfig:
  base = config_lib.default()
  config_lib.override(base, {"model.family": family} | SHAPE | changes)
  config = config_lib.resolve(base)
  return dataclasses.replace(config, model=dataclasses.replace(
      config.model, vocab_size=2048))


def make_batch(config: config_lib.ExperimentConfig,
               rows: int) -> loss_lib.Batch:
  lengths = lengths_lib.of(config)
  tokens = np.full((rows, lengths.window + 1), 7, np.int32)
  if config.objective.corruption == "pairs":
    tokens = batches.Pairs(*np.split(tokens[:, :-1], [lengths.encoder], 1))
  batch = objectives.create(config, VOCABULARY).batch(
      tokens, np.ones(rows, np.float32),
      objectives.Generators(0, 0, range(rows)))
  assert batch.targets.size <= cross_entropy.CHUNK_TOKENS["accelerator"]
  return batch


def counted(config: config_lib.ExperimentConfig, rows: int = 4, *,
            trainable: flops.Trainable = flops.EVERYTHING,
            merge: bool = True, backend: str = "tpu") -> float:
  """The compiler's FLOPs of a token read: loss and gradients.

  Not `merge`: without the pass that finds, on CPUs, that some of what is to be
  made again in the backward pass was made before, and so undoes remat.
  """
  module = transformer.create(config.model, backend)
  params = traverse_util.flatten_dict(
      nn.meta.unbox(transformer.abstract_parameters(module)))
  frozen = {path: x for path, x in params.items()
            if is_below(path, trainable.frozen)}
  trained = {path: x for path, x in params.items() if path not in frozen}
  for path, kernel in params.items():
    if path[-1] == "kernel" and is_below(path, trainable.adapted):
      inputs, *outputs = kernel.shape
      rank = trainable.adapter_rank
      trained[*path, "in"] = jax.ShapeDtypeStruct((inputs, rank), kernel.dtype)
      trained[*path, "out"] = jax.ShapeDtypeStruct(
          (rank, int(np.prod(outputs))), kernel.dtype)

  def loss(trained, frozen, batch):
    known = trained | frozen

    def adapted(projection, args, kwargs, context):
      y = projection(*args, **kwargs)
      path = (*context.module.path, "kernel")
      if (*path, "in") not in known or context.method_name != "__call__":
        return y
      thin = layers.project(args[0], known[*path, "in"], backend)
      return y + layers.project(thin, known[*path, "out"], backend)
    with nn.intercept_methods(adapted):
      return loss_lib.loss_sum(module, traverse_util.unflatten_dict(
          {path: x for path, x in known.items()
           if path[-1] not in ("in", "out")}), batch)[0]
  lowered = jax.jit(jax.value_and_grad(loss)).lower(
      trained, frozen, make_batch(config, rows))
  merge = merge and config.model.remat == "none"
  options = None if merge else {"xla_disable_hlo_passes": "cse"}
  compiled = lowered.compile(compiler_options=options)
  return compiled.cost_analysis()["flops"] / (
      rows * lengths_lib.of(config).window)


def is_below(path: tuple[str, ...], names: tuple[str, ...]) -> bool:
  """Whether a parameter is in one of the parts that are named."""
  part = part_of(path)
  return any(f"{part}/".startswith(f"{name}/") for name in names)


def part_of(path: tuple[str, ...]) -> str:
  """A parameter's place in the names of flops.Trainable."""
  if any("embedding" in name for name in path[:-1]):
    return "embedding"
  if path[0].startswith("head_"):
    return f"head_transform/{path[0]}"
  if not path[1].startswith("block_"):
    return {"untied_head": "head/kernel", "pooler": "pooler"}.get(path[0]) or {
        "final_norm": f"{path[0]}/norm",
        "relative_bias": f"{path[0]}/attention_scores/bias"}[path[1]]
  sublayer = path[2].removesuffix("_norm")
  component = sublayer + ("" if sublayer == "feed_forward" else "_projections")
  name = "norm" if path[2].endswith("_norm") else path[3]
  return f"{path[0]}/{component}/{name}"


def ours(config: config_lib.ExperimentConfig,
         trainable: flops.Trainable = flops.EVERYTHING, **changes) -> float:
  """With what is recomputed; without a window, which `reference` has not."""
  model = dataclasses.replace(
      config.model, **{"window": 0, "global_every": 0} | changes)
  found = flops.training_flops_per_token(
      model, lengths_lib.of(config), trainable)
  return found.total + found.recompute


# With remat these differ from none of the others in what is made again.
ALIKE = ("gpt3", "roberta", "distilbert", "t5v1_1", "transformer")


@pytest.mark.parametrize("family, remat", [
    pytest.param(family, remat, marks=[pytest.mark.slow] if (
        family in ALIKE and remat != "none") else [])
    for family in families.FAMILIES for remat in ("none", "dots", "full")])
def test_every_family_and_remat(family: str, remat: str) -> None:
  # The first of ModernBERT's blocks is unlike the others.
  depth = 2 if family == "modernbert" else 1
  config = make(family, {"model.remat": remat, "model.num_layers": depth})
  assert 1 <= counted(config) / ours(config) < 1.01


@pytest.mark.parametrize("family, changes", [
    ("gpt2", {"objective.prefix_lm": True}),
    ("gpt2", {"model.window": 64, "model.num_kv_heads": 1,
              "model.gated": True, "objective.separate_documents": True}),
    ("bert", {"objective.mask_rate": 0.3, "model.pooler": True}),
    ("bart", {"objective.corruption": "infilling"}),
    ("t5v1_1", PAIRS),
], ids=["prefix", "windows", "masked", "infilling", "pairs"])
def test_every_objective(family: str, changes: dict[str, Any]) -> None:
  config = make(family, changes)
  assert 1 <= counted(config) / ours(config) < 1.01


@pytest.mark.parametrize("family, window, computed", [
    # Before a block of 64 lies one, and behind it, without causality, one.
    ("gpt2", 65, 128), ("modernbert", 128, 191)])
def test_windows_count_their_keys(
    family: str, window: int, computed: int) -> None:
  """The banded form computes whole blocks, as long as the window reaches."""
  config = make(family, {
      "model.window": window, "model.global_every": 2, "model.num_layers": 2,
      "model.context_length": 512, "model.attention": "dot_product"})
  expected = ours(config, window=computed, global_every=2)
  assert 1 <= counted(config, rows=2) / expected < 1.012
  # A window that did not count would be as much as this.
  assert ours(config) / expected > 1.025


def test_blocks_compute_the_causal_half() -> None:
  """The form for CPUs: T (T + 64) / 2 pairs in blocks of 64, for T^2, and of
  seven products the scores twice."""
  config = make("gpt2", {"model.attention": "blocks"})
  model, length = config.model, config.model.context_length
  # One row: a loop that runs once.
  count = counted(config, rows=1, merge=False, backend="cpu")
  pairs = length * (length + 64) // 2
  inner, layers_ = model.num_heads * model.head_dim, model.num_layers
  found = flops.training_flops_per_token(model, lengths_lib.of(config))
  expected = found.matmul + found.head + (
      7 * 2 * layers_ * pairs * inner / length)
  assert 1 <= count / expected < 1.01
  # The convention has the pairs without the corners of the blocks.
  by_name = flops.by_convention(model, lengths_lib.of(config))
  causal = by_name["matmul+attention_causal"] - found.matmul - found.head
  assert causal == pytest.approx(
      6 * 2 * layers_ * inner * (length + 1) / 2, rel=1e-12)
  assert products.seen_pairs(length, length, 0) == pairs - length * 63 // 2


LORA = flops.Trainable(
    frozen=("embedding", "decoder", "head"), adapter_rank=16,
    adapted=("decoder/attention_projections/query",
             "decoder/attention_projections/value"))
ATTENTION = ("decoder/attention_projections", "decoder/attention_scores")


@pytest.mark.parametrize("family, remat, trainable", [
    ("gpt2", "none", flops.Trainable(("embedding",))),
    ("llama", "full", flops.Trainable(("embedding", "decoder"))),
    ("t5", "none", flops.Trainable(("encoder",))),
    ("t5", "none", flops.Trainable(("embedding", "encoder"))),
    ("t5", "dots", flops.Trainable(
        ("embedding", "encoder", "decoder/feed_forward", *ATTENTION))),
    ("bert", "full", flops.Trainable(
        ("embedding", "encoder/attention_projections"))),
    ("gpt2", "dots", flops.Trainable(
        ("embedding", "decoder/attention_projections"))),
    ("gpt2", "dots", LORA), ("gpt2", "full", LORA),
    ("t5v1_1", "none", flops.Trainable(
        ("embedding", "encoder", "decoder", "head"),
        ("encoder/feed_forward", "decoder/cross_attention_projections/key"),
        64)),
])
def test_what_is_frozen_or_adapted(
    family: str, remat: str, trainable: flops.Trainable) -> None:
  config = make(family, {"model.remat": remat, "model.num_layers": 2})
  count = counted(config, trainable=trainable)
  assert 1 <= count / ours(config, trainable) < 1.01
  assert ours(config, trainable) < 0.97 * ours(config)
