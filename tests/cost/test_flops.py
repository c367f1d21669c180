# SPDX-License-Identifier: Apache-2.0
"""FLOPs worked out by hand, conventions, and what is refused.

Against the compiler: test_flops_compiled.py; against papers:
test_flops_published.py.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax.cost import flops
from tfjax.cost import lengths as lengths_lib
from tfjax.cost import products
from tfjax.models import families
from tfjax.models import masks
from tfjax.models import transformer

GPT2 = config_lib.complete_model(
    config_lib.ModelConfig(**families.published("gpt2", "small")))


def count(model: config_lib.ModelConfig) -> flops.Flops:
  """Of causal modelling at the full context length."""
  return flops.training_flops_per_token(model, whole(model.context_length))


def whole(length: int) -> lengths_lib.Lengths:
  """Of a decoder that predicts every token."""
  return lengths_lib.Lengths(length, 0, length, length, length)


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


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_components_by_hand(remat: str) -> None:
  model = dataclasses.replace(GPT2, remat=remat)
  got = {part.name: part for part in flops.components(model, whole(1024))}
  # Layers times 2 times multiplications a token, forward.
  forward = {
      "decoder/attention_projections": 12 * 2 * 4 * 768 * 768,
      "decoder/attention_scores": 12 * 2 * 1024 * 768,
      "decoder/attention_values": 12 * 2 * 1024 * 768,
      "decoder/feed_forward": 12 * 2 * 2 * 768 * 3072,
      "head": 2 * 768 * 50257}
  again = dict.fromkeys(forward, 0.0)
  if remat != "none":
    again |= {name: forward[name] for name in forward
              if name.endswith(("scores", "values"))}
  if remat == "full":
    # The second product of a feed-forward is only added to the stream.
    again["decoder/attention_projections"] = 12 * 2 * 4 * 768 * 768
    again["decoder/feed_forward"] = 12 * 2 * 768 * 3072
  assert list(got) == list(forward)
  for name, part in got.items():
    assert (part.forward, part.backward) == (forward[name], 2 * forward[name])
    assert part.recompute == again[name]
  found = count(model)
  assert found.total == count(GPT2).total == sum(p.total for p in got.values())
  assert found.recompute == sum(again.values())


def test_a_post_norm_block_is_recomputed_whole() -> None:
  model = make(family="bert", size="tiny", vocab_size=99, context_length=64,
               remat="full")
  got = flops.training_flops_per_token(
      model, lengths_lib.Lengths(64, 64, 0, 10, 10))
  assert got.recompute == (got.matmul + got.attention) / 3


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


# --- Conventions -------------------------------------------------------------


@pytest.mark.parametrize("length, window", [(9, 0), (9, 1), (9, 4), (5, 7)])
@pytest.mark.parametrize("kind", ["causal", "prefix", "bidirectional"])
def test_pairs_are_those_of_the_mask(
    length: int, window: int, kind: str) -> None:
  mask = masks.Mask(causal=kind != "bidirectional", window=window)
  before, after = mask.reach() if window else (
      length, length if kind == "bidirectional" else 0)
  if kind == "prefix":
    mask = mask.replace(prefix=jnp.arange(1, length))  # each once
  places = jnp.arange(length)
  seen = mask.allowed(places, places)
  expected = length**2 if seen is None else np.sum(seen) / len(seen)
  got = products.seen_pairs(length, before, after, prefix=kind == "prefix")
  assert got == pytest.approx(float(expected), rel=1e-12)


def test_conventions_of_a_decoder_by_hand() -> None:
  got = flops.by_convention(GPT2, whole(1024))
  assert tuple(got) == flops.CONVENTIONS
  # Kernels, biases (9 D and D of d_ff's 4) and two norms of a block; a norm.
  blocks = 12 * (7_077_888 + (4 + 4 + 1) * 768 + 4 * 768) + 2 * 768
  assert got["6N_non_embedding"] == 6 * blocks
  assert got["6N_total"] == 6 * (blocks + (50257 + 1024) * 768)
  assert got["matmul+attention_full"] == 854_438_400
  # (1024 + 1) / 2 keys for 1024.
  assert got["matmul+attention_causal"] == (
      854_438_400 - 113_246_208 + 12 * 12 * 768 * 512.5)


def test_conventions_of_windows_and_prefixes() -> None:
  model = dataclasses.replace(GPT2, window=256, global_every=2)
  got = flops.by_convention(model, whole(1024))
  dense = count(model).matmul + count(model).head
  # The first 256 queries see fewer.
  local = 1024 * 256 - 256 * 255 // 2
  assert got["matmul+attention_causal"] == dense + (
      12 * 768 * 6 * (1024 * 1025 // 2 + local) / 1024)
  prefix = dataclasses.replace(whole(1024), prefix=True)
  got = flops.by_convention(GPT2, prefix)["matmul+attention_causal"]
  assert got == pytest.approx(
      dense + 12 * 12 * 768 * (4 * 1024 + 1) / 6, rel=1e-12)


def test_what_has_no_causality_is_full() -> None:
  bert = make(family="bert", size="tiny", vocab_size=99, context_length=64)
  got = flops.by_convention(bert, lengths_lib.Lengths(64, 64, 0, 10, 10))
  assert got["matmul+attention_causal"] == got["matmul+attention_full"]
  counts = transformer.count_parameters(bert)
  assert got["6N_total"] == 6 * counts.total
  assert got["6N_non_embedding"] == 6 * counts.non_embedding


@pytest.mark.parametrize("source, target, window, share", [
    (64, 64, 128, 1 / 2),  # pairs: each token is in one of the two
    (64, 64, 64, 1)])  # infilling: each is in both
def test_6n_of_an_encoder_decoder(
    source: int, target: int, window: int, share: float) -> None:
  model = make(family="bart", d_model=16, num_layers=2, num_heads=2,
               vocab_size=50, context_length=64)
  counts = transformer.count_parameters(model)
  got = flops.by_convention(
      model, lengths_lib.Lengths(window, source, target, target, None))
  assert got["6N_total"] == 6 * share * counts.total
  assert got["6N_non_embedding"] == 6 * share * counts.non_embedding


def test_6n_of_stacks_that_differ() -> None:
  model = make(family="t5", d_model=16, num_layers=2, num_encoder_layers=3,
               num_heads=2, head_dim=12, d_ff=40, vocab_size=50)
  # Kernels, a block's norms, the last one, and 32 relative biases a head.
  encoder = 3 * (4 * 16 * 24 + 2 * 16 * 40 + 2 * 16) + 16 + 64
  decoder = 2 * (8 * 16 * 24 + 2 * 16 * 40 + 3 * 16) + 16 + 64
  got = flops.by_convention(model, lengths_lib.Lengths(20, 18, 8, 8, 8))
  assert got["6N_non_embedding"] == 6 * (18 * encoder + 8 * decoder) / 20
  assert got["6N_total"] == (
      6 * (18 * encoder + 8 * (decoder + 50 * 16)) / 20)


# --- What is not trained -----------------------------------------------------


def test_only_the_head_by_hand() -> None:
  model = make(family="llama", size="98k", vocab_size=512)
  trainable = flops.Trainable(frozen=("embedding", "decoder"))
  got = flops.components(model, whole(256), trainable)
  # No gradient goes below the head, not even to what it is applied to.
  assert {part.backward for part in got[:-1]} == {0.0}
  assert got[-1].backward == got[-1].forward == 2 * 64 * 512
  # The last norm is trained where the decoder as a whole is not frozen.
  blocks = ("embedding", "decoder/attention_projections",
            "decoder/feed_forward")
  got = flops.components(model, whole(256), flops.Trainable(frozen=blocks))
  assert got[-1].backward == 2 * got[-1].forward
  # A norm between them is trained where only the kernel below is frozen.
  model = make(family="bert", size="tiny", vocab_size=99, context_length=64)
  got = flops.components(
      model, lengths_lib.Lengths(64, 64, 0, 10, 10),
      flops.Trainable(frozen=("embedding", "encoder", "head_transform/kernel")))
  assert (got[-2].name, got[-2].backward) == ("head_transform", 0)
  assert got[-1].backward == got[-1].forward


def test_adapters_by_hand() -> None:
  model = make(family="llama", size="98k", vocab_size=512)  # D 64, 2 layers
  trainable = flops.Trainable(
      frozen=("embedding", "decoder", "head"), adapter_rank=4,
      adapted=("decoder/attention_projections/query",))
  got = {part.name: part
         for part in flops.components(model, whole(256), trainable)}
  adapters = got["decoder/adapters"]
  assert adapters.forward == 2 * 2 * 2 * 64 * 4
  # Of the lower layer's there is no gradient of its input.
  assert adapters.backward == 2 * adapters.forward - 2 * 64 * 4
  assert got["head"].backward == got["head"].forward
  assert got["decoder/feed_forward"].backward == (
      got["decoder/feed_forward"].forward)


@pytest.mark.parametrize("field, values", [
    ("frozen", dict(frozen=("decodr",))),
    ("frozen", dict(frozen=("encoder",))),
    ("adapted", dict(adapted=("decoder/feed_forward/gate",), adapter_rank=2))])
def test_parts_that_the_model_has_not(field: str, values: dict) -> None:
  with pytest.raises(ValueError, match=f"trainable.{field}: .*no part.*it has "
                     ".*decoder/attention_projections/key"):
    flops.components(GPT2, whole(1024), flops.Trainable(**values))


@pytest.mark.parametrize("values", [
    dict(adapter_rank=-1), dict(adapter_rank=4), dict(adapted=("decoder",))])
def test_adapters_need_a_rank_and_a_place(values: dict) -> None:
  with pytest.raises(ValueError, match="adapter_rank"):
    flops.Trainable(**values)


# --- What is refused ---------------------------------------------------------


def test_a_model_that_is_not_complete() -> None:
  with pytest.raises(config_lib.ConfigError) as error:
    count(dataclasses.replace(GPT2, vocab_size=None))
  assert error.value.key == "model.vocab_size"
  with pytest.raises(config_lib.ConfigError) as error:
    count(config_lib.ModelConfig(size="98k", vocab_size=512))
  assert error.value.key == "model.architecture"


@pytest.mark.parametrize("values", [
    (16, 16, 0, 16, 16), (16, 16, 16, 16, 16)])
def test_lengths_of_another_model(values: tuple) -> None:
  with pytest.raises(ValueError, match="lengths.encoder is 16.*'decoder'"):
    flops.components(GPT2, lengths_lib.Lengths(*values))


@pytest.mark.parametrize("field, values", [
    ("window", (0, 0, 16, 16, 16)), ("encoder", (16, -1, 16, 16, 16)),
    ("decoder", (16, 0, float("nan"), 16, 16)),
    ("predicted", (16, 0, 16, float("inf"), 16))])
def test_lengths_that_are_none(field: str, values: tuple) -> None:
  with pytest.raises(ValueError, match=f"lengths.{field} is "):
    lengths_lib.Lengths(*values)


def test_utilisation() -> None:
  # 10 tokens of 6 FLOPs a second, of 2 times 100.
  assert flops.model_flops_utilization(10, 6, 2, 100) == 0.3
  assert flops.model_flops_utilization(10, 6, 2, None) is None


@pytest.mark.parametrize("field, values", [
    ("tokens_per_second", (-1, 6, 2, 100)),
    ("tokens_per_second", (float("nan"), 6, 2, None)),
    ("flops_per_token", (10, float("inf"), 2, 100)),
    ("num_devices", (10, 6, 0, 100)),
    ("peak_flops_per_second", (10, 6, 2, 0))])
def test_absurd_utilisation(field: str, values: tuple) -> None:
  with pytest.raises(ValueError, match=f"^{field} is "):
    flops.model_flops_utilization(*values)


@pytest.mark.parametrize("field, values", [
    ("params", (-1, 1)), ("tokens", (1, float("nan")))])
def test_absurd_6n(field: str, values: tuple) -> None:
  with pytest.raises(ValueError, match=f"^{field} is "):
    flops.six_n_flops(*values)
