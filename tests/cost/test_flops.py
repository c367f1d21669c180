# SPDX-License-Identifier: Apache-2.0
"""FLOPs against numbers worked by hand, the compiler's count and papers."""

import dataclasses
import json
import pathlib
import types

from flax import linen as nn
import jax
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax import objectives
from tfjax.cost import flops
from tfjax.cost import hardware
from tfjax.cost import lengths as lengths_lib
from tfjax.models import families
from tfjax.models import transformer
from tfjax.objectives import cross_entropy
from tfjax.objectives import loss as loss_lib

GPT2 = config_lib.complete_model(
    config_lib.ModelConfig(**families.published("gpt2", "small")))
FIXTURES = (pathlib.Path(__file__).parents[3] / "shared" / "refdata" /
            "cost_fixtures" / "flops.json")


def count(model: config_lib.ModelConfig) -> flops.Flops:
  """Of causal modelling at the full context length."""
  length = model.context_length
  return flops.training_flops_per_token(
      model, lengths_lib.Lengths(length, 0, length, length, length))


def make(**fields) -> config_lib.ModelConfig:
  return config_lib.complete_model(config_lib.ModelConfig(**fields))


def test_gpt2_by_hand() -> None:
  # A block's kernels: 4 * 768^2 + 2 * 768 * 3072 = 7,077,888. Twice that a
  # token forward, three times with the backward, times 12 blocks.
  got = count(GPT2)
  assert got.matmul == 6 * 12 * 7_077_888 == 509_607_936
  # Scores and values: 2 * 2 * 1024 * 768 a block forward.
  assert got.attention == 3 * 12 * 4 * 1024 * 768 == 113_246_208
  assert got.head == 6 * 768 * 50257 == 231_584_256
  assert got.recompute == 0
  assert got.total == 854_438_400
  assert (got * 1024).total == 1024 * got.total


def test_a_gate_has_three_products_and_d_ff_of_its_own() -> None:
  model = dataclasses.replace(GPT2, activation="silu", gated=True, d_ff=2048)
  assert count(model).matmul == 6 * 12 * (
      4 * 768 ** 2 + 3 * 768 * 2048)


def test_what_is_recomputed_is_told_apart() -> None:
  plain = count(GPT2)
  dots, full = (count(
      dataclasses.replace(GPT2, remat=name)) for name in ("dots", "full"))
  assert dots.total == full.total == plain.total
  assert dots.recompute == plain.attention / 3
  assert full.recompute == (plain.matmul + plain.attention) / 3


def test_grouped_queries_have_smaller_keys_and_values() -> None:
  # Queries and outputs 2 * 768^2, keys and values 2 * 768 * 256.
  model = dataclasses.replace(GPT2, num_kv_heads=4)
  assert count(model).matmul == 6 * 12 * (
      2 * 768 ** 2 + 2 * 768 * 256 + 2 * 768 * 3072)
  assert count(model).attention == count(GPT2).attention


def test_windowed_layers_count_what_they_see() -> None:
  # Layers 0, 2, ... see 1024 keys, the other six 256.
  model = dataclasses.replace(GPT2, window=256, global_every=2)
  assert count(model).attention == 6 * 2 * 768 * 6 * (1024 + 256)
  # Without causality 128 on either side, and its own.
  encoder = make(family="modernbert", d_model=64, num_layers=3, num_heads=2,
                 window=256, vocab_size=99, context_length=1024)
  lengths = lengths_lib.Lengths(1024, 1024, 0, 154, 154)
  assert flops.training_flops_per_token(encoder, lengths).attention == (
      6 * 2 * 64 * (1024 + 2 * 257))


def test_an_encoder_decoder_by_hand() -> None:
  # A window of 20 tokens: 18 go in, 8 come out, all predicted. D 16, inner
  # width 2 * 12 = 24, F 40, V 50, 3 encoder layers and 2 of the decoder.
  model = make(family="t5", d_model=16, num_layers=2, num_encoder_layers=3,
               num_heads=2, head_dim=12, d_ff=40, vocab_size=50)
  got = flops.training_flops_per_token(
      model, lengths_lib.Lengths(20, 18, 8, 8, 8)) * 20
  block = 4 * 16 * 24 + 2 * 16 * 40
  encoder = 3 * (18 * block + 2 * 18 * 18 * 24)
  decoder = 2 * (8 * block + 2 * 8 * 8 * 24 +  # itself, then the encoder's
                 8 * 2 * 16 * 24 + 18 * 2 * 16 * 24 + 2 * 8 * 18 * 24)
  assert got.encoder == pytest.approx(6 * encoder, rel=1e-12)
  assert got.decoder == pytest.approx(6 * decoder, rel=1e-12)
  assert got.head == pytest.approx(6 * 8 * 16 * 50, rel=1e-12)
  assert got.matmul + got.attention == pytest.approx(
      got.encoder + got.decoder, rel=1e-12)


CASES = {
    "gpt2": (dict(), dict()),
    "llama": (dict(), dict()),
    # The error function is no product, and takes as much as one.
    "bert": (dict(objective__mask_rate=0.25), dict(activation="relu")),
    "t5": (dict(), dict(num_encoder_layers=1)),
}


@pytest.mark.parametrize("family", CASES)
def test_the_compiler_counts_the_same(family: str) -> None:
  """Unrolled, as its count takes the body of a loop once; every product of
  the loss that the step takes the gradient of."""
  objective, fields = CASES[family]
  base = config_lib.default()
  config_lib.override(base, {
      **{key.replace("__", "."): value for key, value in objective.items()},
      **{f"model.{key}": value for key, value in dict(
          family=family, d_model=128, num_layers=2, num_heads=4,
          context_length=128, attention="reference", **fields).items()},
      "data.tokenizer.vocab_size": 640, "duration.steps": 1})
  config = config_lib.resolve(base)
  vocabulary = types.SimpleNamespace(
      separator=0, pad=0, start=0, mask=1, sentinels=range(600, 640),
      special=np.zeros(640, bool), word_starts=None, sentence_ends=None)
  batch = objectives.create(config, vocabulary).batch(
      np.zeros((4, 129), np.int32) + 7, np.ones(4, np.float32),
      objectives.Generators(0, 0, range(4)))
  model = dataclasses.replace(config.model, vocab_size=640)
  module = transformer.create(model, backend="tpu")
  params = nn.meta.unbox(transformer.abstract_parameters(module))

  def loss(params, batch):
    return loss_lib.loss_sum(module, params, batch)[0]
  gradient = jax.jit(jax.grad(loss))
  # One chunk: the loop over chunks of the logits runs once.
  assert batch.targets.size <= cross_entropy.CHUNK_TOKENS["cpu"]
  counted = gradient.lower(params, batch).compile().cost_analysis()["flops"]
  ours = flops.training_flops_per_token(
      model, lengths_lib.of(config)).total * 4 * 128
  # The rest is norms, softmax and the nonlinearity, more at these widths
  # than at real ones; a forgotten product would be 5% and up.
  assert 1.0 <= counted / ours < 1.045


def published(name: str) -> dict:
  if not FIXTURES.is_file():
    pytest.skip(f"no published figures to compare with at {FIXTURES}")
  return json.loads(FIXTURES.read_text(encoding="utf-8"))[name]


def test_a_published_count_of_gpt2() -> None:
  entry = published("gpt2_124M_nanoGPT")
  forward = entry["fwd_flops_seq"]
  got = count(GPT2) * 1024
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
  got = count(GPT2).total * 1024
  assert got == pytest.approx(entry["palm_6N+12LHQT_per_seq"], rel=2e-4)
  mfu = got * example["batch_seqs"] / example["seconds"] / example["peak"]
  assert mfu == pytest.approx(example["mfu"], abs=2e-4)


def test_palms_attention_term() -> None:
  """12 L H Q T of appendix B, out of the published MFU with and without."""
  entry = published("palm_mfu")
  size = entry["config"]
  width = size["H"] * size["Q"]
  model = make(
      d_model=width, num_layers=size["L"], num_heads=size["H"],
      context_length=size["T"], vocab_size=2)
  attention = count(model).attention
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
