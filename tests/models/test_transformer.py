# SPDX-License-Identifier: Apache-2.0
"""The decoder whole: counts, variants, causality, another's logits."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax import ladder
from tfjax.models import transformer

CONFIG = config_lib.ModelConfig(
    d_model=16, num_layers=2, num_heads=2, d_ff=24, context_length=12,
    vocab_size=31, init_std=0.2)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 12)).astype(np.int32)

VARIANTS = {
    "gpt2": {},
    "untied": dict(tie_embedding=False),
    "rotary": dict(positions="rotary"),
    "modern": dict(positions="rotary", activation="swiglu", norm="rms_norm",
                   use_bias=False, tie_embedding=False),
    "scanned": dict(scan_layers=True),
}


def change(**fields) -> config_lib.ModelConfig:
  return dataclasses.replace(CONFIG, **fields)


def abstract(config: config_lib.ModelConfig) -> dict:
  return nn.meta.unbox(transformer.abstract_parameters(
      transformer.create(config)))


def weights(config: config_lib.ModelConfig) -> dict:
  """Random weights, biases and scales too: faster made than an init is."""
  random = np.random.default_rng(0)
  return jax.tree_util.tree_map_with_path(
      lambda path, x: (0.2 * random.standard_normal(x.shape) +
                       (path[-1].key == "scale")).astype(np.float32),
      abstract(config))


def logits(config: config_lib.ModelConfig, params: dict,
           tokens: np.ndarray = TOKENS, **options) -> jax.Array:
  return jax.jit(transformer.create(config, **options).apply)(
      {"params": params}, tokens)


def sum_and_gradient(config: config_lib.ModelConfig, params: dict):
  weight = jax.random.normal(jax.random.key(9), (2, 12, 31))
  module = transformer.create(config)
  return jax.jit(jax.value_and_grad(lambda p: (
      module.apply({"params": p}, TOKENS) * weight).sum()))(params)


# By hand, with D 16, F 24, T 12, V 31, 2 layers:
#   attention 4 D^2 = 1024 (+ biases 4 D = 64); feed-forward 2 D F = 768
#   (+ F + D = 40), or 3 D F = 1152 with swiglu; norms 2 D = 32 (+ 32);
#   the last norm D = 16 (+ 16); embeddings V D = 496 and T D = 192.
COUNTS = {
    "gpt2": (496 + 192, 2 * (1024 + 64 + 768 + 40 + 64) + 32, 0),
    "untied": (496 + 192, 2 * (1024 + 64 + 768 + 40 + 64) + 32, 496),
    "rotary": (496, 2 * (1024 + 64 + 768 + 40 + 64) + 32, 0),
    "modern": (496, 2 * (1024 + 1152 + 32) + 16, 496),
    "scanned": (496 + 192, 2 * (1024 + 64 + 768 + 40 + 64) + 32, 0),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts_by_hand_and_as_made(name: str) -> None:
  config = change(**VARIANTS[name])
  counts = transformer.count_parameters(config)
  assert (counts.embedding, counts.non_embedding, counts.head) == COUNTS[name]
  assert counts.total == sum(COUNTS[name])


def test_the_initial_weights_are_as_many_and_as_large_as_said() -> None:
  config = change(**VARIANTS["modern"])
  made = nn.meta.unbox(jax.jit(transformer.create(config).init)(
      jax.random.key(0), TOKENS)["params"])
  assert sum(x.size for x in jax.tree.leaves(made)) == sum(COUNTS["modern"])
  # 500 draws know their deviation to 3%.
  assert float(made["token_embedding"]["embedding"].std()) == pytest.approx(
      0.2, rel=0.1)
  assert float(made["block_1"]["attention"]["output"]["kernel"].std()) == (
      pytest.approx(0.2 / 4 ** 0.5, rel=0.15))
  assert np.all(made["final_norm"]["scale"] == 1)


def test_gpt2_has_its_published_size() -> None:
  config = config_lib.ModelConfig(
      d_model=768, num_layers=12, num_heads=12, d_ff=3072,
      context_length=1024, vocab_size=50257)
  counts = transformer.count_parameters(config)
  assert counts.total == 124_439_808  # Radford et al. 2019's 124M, released
  assert counts.embedding == (50257 + 1024) * 768


@pytest.mark.parametrize("name", ["3k", "98k", "1.8M", "85M"])
def test_the_ladders_names_are_non_embedding_parameters(name: str) -> None:
  d_model, num_layers, _ = ladder.LADDER[name]
  exact = 12 * num_layers * d_model ** 2
  scale = {"k": 1e3, "M": 1e6}[name[-1]]
  assert abs(float(name[:-1]) - exact / scale) <= 0.5 * (
      0.1 if "." in name else 1.0)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_causal(name: str) -> None:
  config = change(**VARIANTS[name])
  params = weights(config)
  before = np.asarray(logits(config, params))
  changed = TOKENS.copy()
  changed[:, 7:] = (changed[:, 7:] + 1) % 31
  after = np.asarray(logits(config, params, changed))
  assert before.dtype == np.float32 and before.shape == (2, 12, 31)
  np.testing.assert_array_equal(before[:, :7], after[:, :7])
  assert np.all(np.abs(before - after)[:, 7:].max((0, 2)) > 1e-3)


def test_no_gradient_flows_back_from_the_future() -> None:
  module = transformer.create(change(tie_embedding=False))
  params = weights(change(tie_embedding=False))
  tokens = np.arange(12, dtype=np.int32)[None]  # each its own embedding row

  def early(params):
    return module.apply({"params": params}, tokens)[:, :5].sum()
  rows = np.asarray(jax.jit(jax.grad(early))(params)[
      "token_embedding"]["embedding"])
  assert np.all(rows[5:] == 0)
  assert np.all(np.abs(rows[:5]).max(1) > 0)


def test_a_tied_head_is_the_embedding() -> None:
  params = weights(CONFIG)
  assert "head" not in params
  module = transformer.create(CONFIG)
  head = module.apply({"params": params}, method="head_kernel")
  np.testing.assert_array_equal(head, params["token_embedding"]["embedding"])
  untied = weights(change(tie_embedding=False))
  head = transformer.create(change(tie_embedding=False)).apply(
      {"params": untied}, method="head_kernel")
  np.testing.assert_array_equal(head, untied["head"]["embedding"])
  assert not np.array_equal(head, untied["token_embedding"]["embedding"])


def test_scanned_layers_equal_unrolled_ones() -> None:
  unrolled, scanned = CONFIG, change(scan_layers=True)
  params = weights(unrolled)
  blocks = [params[f"block_{i}"] for i in range(2)]
  stacked = {k: v for k, v in params.items() if not k.startswith("block_")}
  stacked["blocks"] = {"block": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}
  assert (jax.tree.map(jnp.shape, stacked) ==
          jax.tree.map(jnp.shape, abstract(scanned)))
  value, gradient = sum_and_gradient(unrolled, params)
  scan_value, scan_gradient = sum_and_gradient(scanned, stacked)
  np.testing.assert_allclose(value, scan_value, rtol=1e-5, atol=1e-4)
  for i in range(2):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        a, b[i], rtol=1e-4, atol=1e-4),
                 gradient[f"block_{i}"], scan_gradient["blocks"]["block"])


def test_scanned_layers_start_different_from_each_other() -> None:
  made = jax.jit(transformer.create(change(scan_layers=True)).init)(
      jax.random.key(0), TOKENS)["params"]
  boxed = made["blocks"]["block"]["feed_forward"]["up"]["kernel"]
  assert boxed.names == ("layers", "embed", "mlp")
  assert boxed.value.shape == (2, 16, 24)
  assert not np.array_equal(boxed.value[0], boxed.value[1])
  assert float(boxed.value.std()) == pytest.approx(0.2, rel=0.15)


@pytest.mark.parametrize("scan_layers, policies", [
    (False, ["dots", "full"]), (True, ["full"])])
def test_what_is_rematerialised_changes_no_number(
    scan_layers: bool, policies: list[str]) -> None:
  params = weights(change(scan_layers=scan_layers))
  plain = sum_and_gradient(change(scan_layers=scan_layers), params)
  for remat in policies:
    config = change(scan_layers=scan_layers, remat=remat)
    assert (jax.tree.map(jnp.shape, abstract(config)) ==
            jax.tree.map(jnp.shape, params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-4, atol=1e-4), plain, sum_and_gradient(config, params))


def test_full_rematerialisation_recomputes() -> None:
  """The backward pass has the forward's products in it once more."""
  def products(remat):
    module = transformer.create(change(remat=remat))
    text = str(jax.make_jaxpr(jax.grad(lambda p: module.apply(
        {"params": p}, TOKENS).sum()))(weights(CONFIG)))
    return text.count("dot_general")
  assert products("full") > products("none")


@pytest.mark.parametrize("name", ["reference", "block_causal", "dot_product"])
def test_attention_and_backend_change_no_number(name: str) -> None:
  params = weights(CONFIG)
  np.testing.assert_allclose(
      logits(change(attention=name), params, backend="tpu"),
      logits(change(attention="reference"), params, backend="cpu"), atol=2e-5)


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters() -> None:
  params = weights(CONFIG)
  module = transformer.create(CONFIG, dtype="bfloat16")
  hidden = jax.eval_shape(
      lambda p: module.apply({"params": p}, TOKENS, method="hidden"), params)
  assert hidden.dtype == jnp.bfloat16
  low, high = logits(CONFIG, params, dtype="bfloat16"), logits(CONFIG, params)
  assert low.dtype == jnp.float32
  assert 1e-5 < float(jnp.abs(low - high).max()) < 0.2
  assert {x.dtype for x in jax.tree.leaves(nn.meta.unbox(
      transformer.abstract_parameters(module)))} == {jnp.dtype("float32")}


def test_what_does_not_fit_is_refused() -> None:
  with pytest.raises(ValueError, match="13 tokens .*context_length 12"):
    logits(CONFIG, weights(CONFIG), np.zeros((1, 13), np.int32))
  with pytest.raises(config_lib.ConfigError, match="model.vocab_size"):
    transformer.create(change(vocab_size=None))


def test_shorter_inputs_give_the_prefix() -> None:
  params = weights(CONFIG)
  np.testing.assert_allclose(logits(CONFIG, params, TOKENS[:, :5]),
                             logits(CONFIG, params)[:, :5], atol=1e-5)


def test_logits_are_those_of_another_gpt2() -> None:
  """Random weights of transformers' GPT-2, copied over."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  width, layers, length, vocab = 48, 3, 24, 61
  theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
      vocab_size=vocab, n_positions=length, n_embd=width, n_layer=layers,
      n_head=4, attn_implementation="eager")).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for weight in theirs.parameters():  # biases and scales too
      weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
  state = {k: v.numpy() for k, v in theirs.state_dict().items()}

  def dense(name):
    return {"kernel": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

  def norm(name):
    return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

  def block(name):
    qkv = dense(f"{name}.attn.c_attn")
    attention = {
        part: {"kernel": kernel.reshape(width, 4, width // 4),
               "bias": bias.reshape(4, width // 4)}
        for part, kernel, bias in zip(
            ("query", "key", "value"), np.split(qkv["kernel"], 3, 1),
            np.split(qkv["bias"], 3))}
    return {
        "attention_norm": norm(f"{name}.ln_1"),
        "attention": attention | {"output": dense(f"{name}.attn.c_proj")},
        "feed_forward_norm": norm(f"{name}.ln_2"),
        "feed_forward": {"up": dense(f"{name}.mlp.c_fc"),
                         "down": dense(f"{name}.mlp.c_proj")}}
  params = {
      "token_embedding": {"embedding": state["transformer.wte.weight"]},
      "position_embedding": {"embedding": state["transformer.wpe.weight"]},
      "final_norm": norm("transformer.ln_f"),
      **{f"block_{i}": block(f"transformer.h.{i}") for i in range(layers)}}
  config = config_lib.ModelConfig(
      d_model=width, num_layers=layers, num_heads=4, d_ff=4 * width,
      context_length=length, vocab_size=vocab)
  assert (jax.tree.map(jnp.shape, params) ==
          jax.tree.map(jnp.shape, abstract(config)))
  tokens = np.random.default_rng(1).integers(0, vocab, (3, length))
  with torch.no_grad():
    expected = theirs(torch.from_numpy(tokens)).logits.numpy()
  assert expected.std() > 0.5
  error = np.abs(np.asarray(logits(config, params, tokens.astype(np.int32)))
                 - expected).max()
  assert error < 2e-5
