# SPDX-License-Identifier: Apache-2.0
"""FLOPs against numbers worked by hand, the compiler's count and papers."""

import dataclasses
import json
import pathlib

from flax import linen as nn
import jax
import jax.numpy as jnp
import pytest

from tfjax import config as config_lib
from tfjax.cost import flops
from tfjax.cost import hardware
from tfjax.models import transformer
from tfjax.objectives import cross_entropy

GPT2 = config_lib.ModelConfig(
    d_model=768, num_layers=12, num_heads=12, d_ff=3072, context_length=1024,
    vocab_size=50257)
FIXTURES = (pathlib.Path(__file__).parents[3] / "shared" / "refdata" /
            "cost_fixtures" / "flops.json")


def test_gpt2_by_hand() -> None:
  # A block's kernels: 4 * 768^2 + 2 * 768 * 3072 = 7,077,888. Twice that a
  # token forward, three times with the backward, times 12 blocks.
  got = flops.training_flops_per_token(GPT2)
  assert got.matmul == 6 * 12 * 7_077_888 == 509_607_936
  # Scores and values: 2 * 2 * 1024 * 768 a block forward.
  assert got.attention == 3 * 12 * 4 * 1024 * 768 == 113_246_208
  assert got.head == 6 * 768 * 50257 == 231_584_256
  assert got.recompute == 0
  assert got.total == 854_438_400
  assert (got * 1024).total == 1024 * got.total


def test_swiglu_has_three_products_and_d_ff_of_its_own() -> None:
  model = dataclasses.replace(GPT2, activation="swiglu", d_ff=2048)
  assert flops.training_flops_per_token(model).matmul == 6 * 12 * (
      4 * 768 ** 2 + 3 * 768 * 2048)


def test_what_is_recomputed_is_told_apart() -> None:
  plain = flops.training_flops_per_token(GPT2)
  dots, full = (flops.training_flops_per_token(
      dataclasses.replace(GPT2, remat=name)) for name in ("dots", "full"))
  assert dots.total == full.total == plain.total
  assert dots.recompute == plain.attention / 3
  assert full.recompute == (plain.matmul + plain.attention) / 3


@pytest.mark.parametrize("changes", [
    {}, dict(activation="swiglu", norm="rms_norm", positions="rotary",
             tie_embedding=False, use_bias=False)], ids=["gpt2", "modern"])
def test_the_compiler_counts_the_same(changes: dict) -> None:
  """Unrolled, as its count takes the body of a loop once."""
  model = dataclasses.replace(
      GPT2, d_model=128, num_layers=2, num_heads=4, d_ff=384,
      context_length=128, vocab_size=640, attention="reference", **changes)
  batch, length = 4, model.context_length
  module = transformer.create(model, backend="tpu")
  params = nn.meta.unbox(transformer.abstract_parameters(module))

  def loss(params, tokens, targets):
    hidden = module.apply({"params": params}, tokens, method="hidden")
    head = module.apply({"params": params}, method="head_kernel")
    return cross_entropy.reference(
        hidden, head, targets, jnp.ones(targets.shape)).sum()
  tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
  compiled = jax.jit(jax.grad(loss)).lower(params, tokens, tokens).compile()
  counted = compiled.cost_analysis()["flops"]
  ours = flops.training_flops_per_token(model).total * batch * length
  # The rest is norms, softmax and the nonlinearity, more at these widths
  # than at real ones; a forgotten product would be 5% and up.
  assert 1.0 <= counted / ours < 1.03


def published(name: str) -> dict:
  if not FIXTURES.is_file():
    pytest.skip(f"no published figures to compare with at {FIXTURES}")
  return json.loads(FIXTURES.read_text(encoding="utf-8"))[name]


def test_a_published_count_of_gpt2() -> None:
  entry = published("gpt2_124M_nanoGPT")
  forward = entry["fwd_flops_seq"]
  got = flops.training_flops_per_token(GPT2) * 1024
  assert got.total == forward["total"] == 3 * forward["forward_total"]
  assert got.head == 3 * forward["logits"]
  assert got.attention == 3 * 12 * (forward["attention/scores"] +
                                    forward["attention/reduce"])
  counts = transformer.count_parameters(
      dataclasses.replace(GPT2, use_bias=False))
  assert counts.total == entry["params_total"]


def test_the_papers_utilisation_of_gpt2() -> None:
  entry = published("gpt2_124M_nanoGPT")
  example = entry["mfu_example"]
  # The published formula counts norms and biases as products: 6 N + 12 L T D.
  got = flops.training_flops_per_token(GPT2).total * 1024
  assert got == pytest.approx(entry["palm_6N+12LHQT_per_seq"], rel=2e-4)
  mfu = got * example["batch_seqs"] / example["seconds"] / example["peak"]
  assert mfu == pytest.approx(example["mfu"], abs=2e-4)


def test_palms_attention_term() -> None:
  """12 L H Q T of appendix B, out of the published MFU with and without."""
  entry = published("palm_mfu")
  size = entry["config"]
  width = size["H"] * size["Q"]
  model = dataclasses.replace(
      GPT2, d_model=width, num_layers=size["L"], num_heads=size["H"],
      d_ff=4 * width, context_length=size["T"])
  attention = flops.training_flops_per_token(model).attention
  peak = entry["chips"] * entry["peak_per_chip"]
  rate = entry["tokens_per_s"] / peak
  assert rate * (6 * size["N"] + attention) == pytest.approx(
      entry["mfu"], abs=5e-4)
  assert rate * 6 * size["N"] == pytest.approx(
      entry["mfu_without_attention"], abs=5e-4)


def test_an_unknown_device_has_no_peak() -> None:
  assert hardware.peak_flops("NVIDIA H200", "bfloat16") == 989.4e12
  assert hardware.peak_flops("NVIDIA H200", "float32") is None
  assert hardware.peak_flops("NVIDIA A100", "bfloat16") is None
  assert hardware.peak_flops("cpu", "bfloat16") is None
