# SPDX-License-Identifier: Apache-2.0
"""Whole models of every family, small: what sees what, scanned and not."""

import dataclasses
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax.models import families
from tfjax.models import inputs as inputs_lib
from tfjax.models import transformer

VOCAB = 31
LENGTH, SOURCE = 10, 8


def small(family: str, **fields: object) -> config_lib.ModelConfig:
  usual = dict(d_model=16, num_layers=2, num_heads=4, d_ff=24,
               context_length=12, vocab_size=VOCAB)
  if families.FAMILIES[family].fields["initializer"] == "normal":
    usual["init_std"] = 0.2
  return config_lib.complete_model(config_lib.ModelConfig(
      **dict(family=family) | usual | fields))


# Each family; with windows that matter at this length, and layers of both
# kinds among those that are scanned. "... near" are windows in all layers.
OWN = {
    "gpt3": dict(window=3),
    "llama": dict(num_kv_heads=2),
    "modernbert": dict(window=4, global_every=2, num_layers=3),
}
MODELS = {family: small(family, **OWN.get(family, {}))
          for family in families.FAMILIES} | {
    "gpt3 near": small("gpt3", window=3, global_every=0),
    "modernbert near": small("modernbert", window=2, global_every=0),
    "t5 uneven": small("t5", num_encoder_layers=3),
}
CAUSAL = [family for family in families.FAMILIES
          if MODELS[family].architecture != "encoder"]
FORMS = ("reference", "blocks", "dot_product")
# One layer tells where all have one mask; those with windows need their all.
SHALLOW = {name: config if config.window else
           dataclasses.replace(config, num_layers=1, num_encoder_layers=1)
           for name, config in MODELS.items()}


def change(name: str, **fields: object) -> config_lib.ModelConfig:
  return dataclasses.replace(MODELS[name], **fields)


@functools.cache
def abstract(config: config_lib.ModelConfig) -> dict:
  return nn.meta.unbox(transformer.abstract_parameters(
      transformer.create(config)))


def weights(config: config_lib.ModelConfig) -> dict:
  """Random weights, biases and scales too: faster made than an init is."""
  return _weights(dataclasses.replace(config, attention="auto", remat="none"))


@functools.cache
def _weights(config: config_lib.ModelConfig) -> dict:
  random = np.random.default_rng(0)
  return jax.tree_util.tree_map_with_path(
      lambda path, x: (0.2 * random.standard_normal(x.shape) +
                       (path[-1].key == "scale")).astype(np.float32),
      abstract(config))


def some_inputs(config: config_lib.ModelConfig, length: int = LENGTH,
                **others: object) -> inputs_lib.Inputs:
  """Two sequences; an encoder-decoder's source too."""
  random = np.random.default_rng(1)
  tokens = random.integers(0, VOCAB, (2, 12)).astype(np.int32)
  source = random.integers(0, VOCAB, (2, SOURCE)).astype(np.int32)
  return inputs_lib.Inputs(
      tokens[:, :length], source=inputs_lib.Inputs(source) if
      config.architecture == "encoder_decoder" else None, **others)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def logits(config: config_lib.ModelConfig, params: dict,
           inputs: inputs_lib.Inputs, backend: str = "cpu",
           dtype: str = "float32") -> jax.Array:
  return transformer.create(config, backend, dtype).apply(
      {"params": params}, inputs)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(config: config_lib.ModelConfig, params: dict):
  weight = jax.random.normal(jax.random.key(9), (2, LENGTH, VOCAB))
  module = transformer.create(config)
  return jax.value_and_grad(lambda p: (module.apply(
      {"params": p}, some_inputs(config)) * weight).mean())(params)


def assert_close(got, expected) -> None:
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=2e-6), got, expected)


# --- Parameters --------------------------------------------------------------

# By hand, with D 16, F 24, T 12, V 31, two layers in each stack:
#   attention 4 D^2 = 1024 (+ biases 4 D = 64); feed-forward 2 D F = 768
#   (+ F + D = 40), or gated 3 D F = 1152; a norm D = 16 (+ 16); embeddings of
#   tokens V D = 496, of positions T D = 192, of two types 32.
COUNTS = {
    "gpt2": (496 + 192, 2 * (1024 + 64 + 768 + 40 + 64) + 32, 0),
    # Post-norm: no last norm.
    "gpt": (496 + 192, 2 * (1024 + 64 + 768 + 40 + 64), 0),
    # Half as many keys and values save D^2.
    "llama": (496, 2 * (1024 - 256 + 1152 + 32) + 16, 496),
    # A norm of the embeddings; a dense layer, a norm, a bias in the head.
    "bert": (496 + 192 + 32, 2 * (1024 + 64 + 768 + 40 + 64) + 32,
             256 + 16 + 32 + 31),
    # Cross-attention and its norm; each stack's 32 x 4 biases, last norm.
    # Three layers in the encoder.
    "t5 uneven": (496, 3 * (1024 + 768 + 32) + 2 * (2048 + 768 + 48) +
                  2 * (128 + 16), 0),
    "t5": (496, 2 * (1024 + 768 + 32) + 2 * (2048 + 768 + 48) +
           2 * (128 + 16), 0),
    # Of three layers the first attention has no norm; a norm of the
    # embeddings, a last one; no biases but the head's.
    "modernbert": (496, 3 * (1024 + 1152 + 32) - 16 + 16 + 16,
                   256 + 16 + 31),
}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_parameter_counts_by_hand(name: str, scan_layers: bool) -> None:
  counts = transformer.count_parameters(change(name, scan_layers=scan_layers))
  assert (counts.embedding, counts.non_embedding, counts.head) == COUNTS[name]
  assert counts.total == sum(COUNTS[name])


def initial(config: config_lib.ModelConfig) -> dict:
  return nn.meta.unbox(jax.jit(transformer.create(config).init)(
      jax.random.key(0), some_inputs(config))["params"])


def test_normal_initial_weights_are_as_large_as_said() -> None:
  made = initial(change("llama", init_std=0.3))
  assert jax.tree.map(jnp.shape, made) == jax.tree.map(
      jnp.shape, abstract(MODELS["llama"]))
  # 500 draws know their deviation to 3%.
  assert float(made["token_embedding"]["embedding"].std()) == pytest.approx(
      0.3, rel=0.1)
  assert float(made["decoder"]["block_1"]["attention"]["output"]["kernel"]
               .std()) == pytest.approx(0.3 / 4 ** 0.5, rel=0.15)
  assert np.all(made["decoder"]["final_norm"]["scale"] == 1)


def test_fan_in_initial_weights_are_as_large_as_said() -> None:
  """T5's: unscaled queries start smaller; the head is scaled or starts so."""
  made = initial(change("t5v1_1", d_model=64, head_dim=16, d_ff=96))
  block = made["decoder"]["block_1"]
  stds = {
      "token_embedding": made["token_embedding"]["embedding"],
      "untied_head": made["untied_head"]["embedding"],
      **{k: v["kernel"] for k, v in block["attention"].items()},
      "cross query": block["cross_attention"]["query"]["kernel"],
      "up": block["feed_forward"]["up"]["kernel"],
      "down": block["feed_forward"]["down"]["kernel"]}
  # 2,000 to 6,000 draws know their deviation to 1.6%.
  assert {k: float(v.std()) for k, v in stds.items()} == pytest.approx({
      "token_embedding": 1, "untied_head": 64 ** -0.5,
      "query": (64 * 16) ** -0.5, "key": 64 ** -0.5, "value": 64 ** -0.5,
      "output": 64 ** -0.5, "cross query": (64 * 16) ** -0.5,
      "up": 64 ** -0.5, "down": 96 ** -0.5}, rel=0.06)


def test_scaled_embeddings_start_smaller() -> None:
  """Vaswani et al. 2017: times sqrt(D) they are of size one."""
  made = initial(change("transformer", d_model=64, head_dim=16))
  assert float(made["token_embedding"]["embedding"].std()) == pytest.approx(
      1 / 8, rel=0.06)


# --- What sees what ----------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def reach(config: config_lib.ModelConfig, params: dict,
          inputs: inputs_lib.Inputs) -> jax.Array:
  """[T, V]: do the logits at a place have a gradient in a token's embedding?

  The head keeps the table that it has, where it is tied.
  """
  module = transformer.create(config)

  def of_table(table_VD):
    changed = params | {"token_embedding": {"embedding": table_VD}}
    hidden = module.apply({"params": changed}, inputs, method="hidden")
    return module.apply({"params": params}, hidden, method="logits")
  out, pull = jax.vjp(of_table, params["token_embedding"]["embedding"])
  weight = jax.random.normal(jax.random.key(0), out.shape)
  return jax.vmap(lambda t: (pull(jnp.where(
      (jnp.arange(out.shape[1]) == t)[:, None], weight, 0))[0] != 0).any(-1)
                  )(jnp.arange(out.shape[1]))


def expected_reach(config: config_lib.ModelConfig,
                   inputs: inputs_lib.Inputs) -> np.ndarray:
  """What the masks let through, layer after layer; tokens are 0, 1, 2, ...
  and the source's follow them."""
  def ids(part):
    return (np.ones(part.tokens.shape[1]) if part.segments is None
            else part.segments[0])

  def stack(reached, segments, layers, causal, memory=None):
    t, s = np.indices((len(segments), len(segments)))
    for i in range(layers):
      seen = segments[:, None] == segments
      if causal:
        prefix = 0 if inputs.prefix is None else inputs.prefix[0]
        seen &= (s <= t) | (s < prefix)
      near = config.window and not (
          config.global_every and i % config.global_every == 0)
      if near:
        seen &= abs(t - s) <= (
            config.window - 1 if causal else config.window // 2)
      reached = reached | (seen @ reached)
      if memory is not None:
        theirs, of_memory = memory
        reached = reached | ((segments[:, None] == theirs) @ of_memory)
    return reached

  segments = ids(inputs)
  rows = np.eye(VOCAB, dtype=bool)
  own = rows[:len(segments)]
  if config.architecture == "encoder":
    return stack(own, segments, config.num_layers, causal=False)
  memory = None
  if inputs.source is not None:
    theirs = ids(inputs.source)
    of_memory = stack(rows[len(segments):][:len(theirs)], theirs,
                      config.num_encoder_layers, causal=False)
    memory = theirs, of_memory
  return stack(own, segments, config.num_layers, True, memory)


def row(*values: int) -> np.ndarray:
  return np.array([values], np.int32)


def distinct(config: config_lib.ModelConfig, segments: np.ndarray | None,
             source_segments: np.ndarray | None, prefix: int | None = None
             ) -> inputs_lib.Inputs:
  """One sequence, no token twice."""
  source = None
  if config.architecture == "encoder_decoder":
    source = inputs_lib.Inputs(row(*range(LENGTH, LENGTH + SOURCE)),
                               source_segments)
  elif config.architecture == "decoder" and prefix is not None:
    return inputs_lib.Inputs(row(*range(LENGTH)), segments,
                             prefix=np.array([prefix], np.int32))
  return inputs_lib.Inputs(row(*range(LENGTH)), segments, source=source)


def check_reach(config: config_lib.ModelConfig, *others) -> np.ndarray:
  inputs = distinct(config, *others)
  got = np.asarray(reach(config, weights(config), inputs))
  np.testing.assert_array_equal(got, expected_reach(config, inputs))
  return got


ONE = row(*[1] * LENGTH), row(*[1] * SOURCE)
# Two documents and padding. In the source the second comes first, and a third
# one is no target's.
PACKED = row(1, 1, 1, 1, 2, 2, 2, 2, 0, 0), row(2, 2, 1, 1, 1, 3, 0, 0)


@pytest.mark.parametrize("name, form", [
    *((name, form) for name in [*CAUSAL, "gpt3 near"] for form in FORMS),
    ("bert", "reference"), ("roberta", "blocks"), ("distilbert", "dot_product"),
    ("modernbert", "blocks"), ("modernbert near", "dot_product")])
def test_gradients_reach_what_is_seen_and_nothing_else(
    name: str, form: str) -> None:
  """With strict zeros, and ones elsewhere: not the future, but for a prefix;
  not another document or padding, nor another one's source."""
  config = dataclasses.replace(SHALLOW[name], attention=form)
  whole = check_reach(config, *ONE, 0)[:, :LENGTH]
  packed = check_reach(config, *PACKED, 0)
  if config.architecture != "encoder":
    assert not np.triu(whole, 1).any() and np.diag(whole).all()
  if "near" not in name:
    assert whole[-1].all()
  # In words, lest the expectation be wrong: see PACKED.
  assert not packed[4:8, :4].any() and not packed[:4, 4:10].any()
  if config.architecture == "encoder_decoder":
    source = packed[:, LENGTH:LENGTH + SOURCE]
    assert source[:4].any(0).tolist() == [0, 0, 1, 1, 1, 0, 0, 0]
    assert source[4:8].any(0).tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
  if config.architecture == "decoder":
    seen = check_reach(config, *ONE, 4)
    assert np.all(seen[:4, :3]) or "near" in name
    assert not seen[:4, 4:].any()
    check_reach(config, *PACKED, 6)


@pytest.mark.parametrize("name", [*CAUSAL, "bert", "modernbert"])
def test_scanned_layers_see_the_same(name: str) -> None:
  config = change(name, scan_layers=True)
  check_reach(config, *ONE, 0)
  check_reach(config, *PACKED, 0)


@pytest.mark.parametrize("name, form", [
    ("gpt3", "blocks"), ("gpt3 near", "dot_product"), ("t5", "blocks"),
    ("llama", "dot_product")])
def test_without_segments_the_future_is_as_far(name: str, form: str) -> None:
  bare = check_reach(dataclasses.replace(SHALLOW[name], attention=form),
                     None, None)[:, :LENGTH]
  assert not np.triu(bare, 1).any() and np.diag(bare).all()


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_targets_without_segments_see_a_source_without_its_padding(
    name: str) -> None:
  padded = row(1, 1, 1, 1, 1, 0, 0, 0)
  inputs = distinct(SHALLOW[name], None, padded)
  got = np.asarray(reach(SHALLOW[name], weights(SHALLOW[name]), inputs))
  np.testing.assert_array_equal(
      got[:, LENGTH:LENGTH + SOURCE], np.repeat(padded == 1, LENGTH, 0))


@pytest.mark.parametrize("name", ["gpt2", "t5", "llama"])
def test_packed_documents_are_what_they_are_alone(name: str) -> None:
  """With positions that start anew, up to rounding."""
  config = SHALLOW[name]
  both = some_inputs(config)
  cut, source_cut = LENGTH // 2, SOURCE // 2
  own = np.array([[1] * cut + [2] * (LENGTH - cut)] * 2)
  theirs = np.array([[1] * source_cut + [2] * (SOURCE - source_cut)] * 2)

  def anew(segments):
    return np.array([[list(r)[:i].count(r[i]) for i in range(len(r))]
                     for r in segments])
  packed = both.replace(segments=own, positions=anew(own))
  if both.source is not None:
    packed = packed.replace(source=both.source.replace(
        segments=theirs, positions=anew(theirs)))
  got = logits(config, weights(config), packed)
  for part, part_source in ((slice(0, cut), slice(0, source_cut)),
                            (slice(cut, None), slice(source_cut, None))):
    alone = both.replace(tokens=both.tokens[:, part])
    if both.source is not None:
      alone = alone.replace(source=both.source.replace(
          tokens=both.source.tokens[:, part_source]))
    np.testing.assert_allclose(
        got[:, part], logits(config, weights(config), alone), atol=2e-5)


# --- One model in many forms -------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_layers_stack_and_unstack(name: str) -> None:
  unrolled, scanned = MODELS[name], change(name, scan_layers=True)
  params = weights(unrolled)
  stacked = transformer.stack_layers(params, unrolled)
  assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(
      jnp.shape, abstract(scanned))
  again = transformer.unstack_layers(stacked, scanned)
  assert jax.tree.structure(again) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("name", [
    "gpt3", "t5 uneven", "bart", "modernbert"])
def test_scanned_layers_compute_what_unrolled_ones_do(name: str) -> None:
  unrolled, scanned = MODELS[name], change(name, scan_layers=True)
  params = weights(unrolled)
  value, gradient = value_and_gradient(
      scanned, transformer.stack_layers(params, unrolled))
  assert_close((value, transformer.unstack_layers(gradient, scanned)),
               value_and_gradient(unrolled, params))


def test_more_than_ten_layers_stack_in_order() -> None:
  config = small("gpt2", num_layers=11)
  stacked = transformer.stack_layers(weights(config), config)
  scales = stacked["decoder"]["blocks"]["block"]["attention_norm"]["scale"]
  for i in range(11):
    np.testing.assert_array_equal(
        scales[i],
        weights(config)["decoder"][f"block_{i}"]["attention_norm"]["scale"])


def test_scanned_layers_start_different_from_each_other() -> None:
  made = jax.jit(transformer.create(change("gpt2", scan_layers=True)).init)(
      jax.random.key(0), some_inputs(MODELS["gpt2"]))["params"]
  boxed = made["decoder"]["blocks"]["block"]["feed_forward"]["up"]["kernel"]
  assert boxed.names == ("layers", "embed", "mlp")
  assert boxed.value.shape == (2, 16, 24)
  assert not np.array_equal(boxed.value[0], boxed.value[1])
  assert float(boxed.value.std()) == pytest.approx(0.2, rel=0.15)


@pytest.mark.parametrize("name, scan_layers, policies", [
    ("gpt", False, ["dots", "full"]), ("modernbert", True, ["full"])])
def test_what_is_rematerialised_changes_no_number(
    name: str, scan_layers: bool, policies: list[str]) -> None:
  config = change(name, scan_layers=scan_layers)
  plain = value_and_gradient(config, weights(config))
  for remat in policies:
    changed = dataclasses.replace(config, remat=remat)
    assert jax.tree.map(jnp.shape, abstract(changed)) == jax.tree.map(
        jnp.shape, abstract(config))
    assert_close(value_and_gradient(changed, weights(config)), plain)


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_rematerialisation_computes_again_what_it_says(backend: str) -> None:
  """Products in the gradient, with one forward pass's being 17: in each of
  two layers 6 projections and 2 of attention, and the head."""
  def products(remat):
    config = change("gpt2", remat=remat, attention="reference")
    module = transformer.create(config, backend)
    gradient = jax.grad(lambda p: module.apply(
        {"params": p}, some_inputs(config)).mean())
    return str(jax.make_jaxpr(gradient)(weights(config))).count("dot_general")
  plain = products("none")
  assert plain == 3 * 17
  # Attention's scores and weighted sums, and nothing of the rest.
  assert products("dots") == plain + 2 * 2
  # All but each block's last product, which no gradient needs.
  assert products("full") == plain + 2 * 7


@pytest.mark.parametrize("name", ["gpt3", "t5", "modernbert"])
def test_attention_and_backend_change_no_number(name: str) -> None:
  params, inputs = weights(MODELS[name]), some_inputs(MODELS[name])
  expected = logits(change(name, attention="reference"), params, inputs)
  for form in ("blocks", "dot_product"):
    np.testing.assert_allclose(
        logits(change(name, attention=form), params, inputs, "tpu"),
        expected, atol=2e-5)


@pytest.mark.parametrize("name", ["t5", "modernbert"])
def test_bfloat16_computes_near_float32_and_keeps_float32_parameters(
    name: str) -> None:
  config = MODELS[name]
  params, inputs = weights(config), some_inputs(config)
  module = transformer.create(config, dtype="bfloat16")
  hidden = jax.eval_shape(lambda p: module.apply(
      {"params": p}, inputs, method="hidden"), params)
  assert hidden.dtype == jnp.bfloat16
  low = logits(config, params, inputs, "cpu", "bfloat16")
  high = logits(config, params, inputs)
  assert low.dtype == jnp.float32
  assert 1e-5 < float(jnp.abs(low - high).max()) < 0.2
  assert {x.dtype for x in jax.tree.leaves(nn.meta.unbox(
      transformer.abstract_parameters(module)))} == {jnp.dtype("float32")}


# --- Parts -------------------------------------------------------------------


def test_a_tied_head_is_the_embedding() -> None:
  def head(name, **fields):
    config = change(name, **fields)
    params = weights(config)
    return params, transformer.create(config).apply(
        {"params": params}, method="head")
  params, (kernel, bias) = head("gpt2")
  assert "untied_head" not in params and bias is None
  np.testing.assert_array_equal(
      kernel, params["token_embedding"]["embedding"])
  params, (kernel, bias) = head("bert", tie_embedding=False)
  np.testing.assert_array_equal(kernel, params["untied_head"]["embedding"])
  np.testing.assert_array_equal(bias, params["head_bias"]["bias"])


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_logits_are_features_times_the_head(name: str) -> None:
  module, params = transformer.create(MODELS[name]), weights(MODELS[name])
  hidden = np.random.default_rng(2).standard_normal((2, 3, 16)).astype("f4")
  call = functools.partial(module.apply, {"params": params})
  features = np.asarray(call(hidden, method="features"))
  kernel, bias = call(method="head")
  np.testing.assert_allclose(
      call(hidden, method="logits"),
      features @ kernel.T + (0 if bias is None else bias), atol=1e-5)
  if name == "gpt2":
    np.testing.assert_array_equal(features, hidden)
  elif name == "t5":
    np.testing.assert_allclose(features, hidden / 4, rtol=1e-6)  # sqrt(16)
  else:
    dense, norm = params["head_dense"], params["head_norm"]
    x = np.asarray(hidden @ dense["kernel"] + dense["bias"], np.float64)
    x *= 0.5 * (1 + np.vectorize(math.erf)(x / 2 ** 0.5))
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    np.testing.assert_allclose(
        features, x * norm["scale"] + norm["bias"], atol=1e-4)


def test_the_pooler_reads_the_first_token() -> None:
  config = change("bert", pooler=True)
  params = weights(config)
  assert "pooler" not in weights(MODELS["bert"])
  hidden = np.random.default_rng(2).standard_normal((2, 3, 16)).astype("f4")
  np.testing.assert_allclose(
      transformer.create(config).apply(
          {"params": params}, hidden, method="pooled"),
      np.tanh(hidden[:, 0] @ params["pooler"]["kernel"] +
              params["pooler"]["bias"]), atol=1e-5)


@pytest.mark.parametrize("name", ["gpt", "bert", "bart"])
def test_post_norm_streams_leave_each_block_normalised(name: str) -> None:
  config = MODELS[name]
  params = jax.tree.map(lambda x: x, weights(config))
  stack = params["encoder" if name == "bert" else "decoder"]
  assert "final_norm" not in stack
  stack["block_1"]["feed_forward_norm"] = {
      "scale": np.ones(16, "f4"), "bias": np.zeros(16, "f4")}
  hidden = transformer.create(config).apply(
      {"params": params}, some_inputs(config), method="hidden")
  np.testing.assert_allclose(hidden.mean(-1), 0, atol=1e-5)
  np.testing.assert_allclose(hidden.std(-1), 1, atol=1e-3)


def test_pre_norm_streams_are_sums() -> None:
  """Blocks that add nothing leave the embeddings, normalised at the end."""
  config = MODELS["llama"]
  params = jax.tree.map(lambda x: x, weights(config))
  for i in range(2):
    block = params["decoder"][f"block_{i}"]
    for part, name in (("attention", "output"), ("feed_forward", "down")):
      block[part][name] = jax.tree.map(np.zeros_like, block[part][name])
  inputs = some_inputs(config)
  x = params["token_embedding"]["embedding"][inputs.tokens]
  root = np.sqrt(np.square(x).mean(-1, keepdims=True) + config.norm_epsilon)
  np.testing.assert_allclose(
      transformer.create(config).apply(
          {"params": params}, inputs, method="hidden"),
      x / root * params["decoder"]["final_norm"]["scale"], atol=1e-5)


def test_token_types_and_positions_are_rows_that_are_added() -> None:
  """Type 0 where none is given; positions from the family's offset on."""
  config = small("roberta", num_token_types=2)
  params, inputs = weights(config), some_inputs(config)
  assert params["encoder"]["position_embedding"]["embedding"].shape == (14, 16)

  def with_table(name, table):
    encoder = params["encoder"] | {name: {"embedding": table}}
    return logits(config, params | {"encoder": encoder}, inputs)
  plain = np.asarray(logits(config, params, inputs))
  types = params["encoder"]["token_type_embedding"]["embedding"]
  np.testing.assert_allclose(
      with_table("token_type_embedding", types[::-1].copy()),
      logits(config, params, inputs.replace(
          token_types=np.ones((2, LENGTH), np.int32))), atol=1e-5)
  np.testing.assert_array_equal(plain, logits(
      config, params, inputs.replace(token_types=np.zeros((2, LENGTH), int))))
  # Rows 0 and 1 are nobody's, and the last two are of longer inputs.
  rows = params["encoder"]["position_embedding"]["embedding"].copy()
  rows[[0, 1, 12, 13]] = 100
  np.testing.assert_array_equal(with_table("position_embedding", rows), plain)
  rows[2] = 100
  assert not np.array_equal(with_table("position_embedding", rows), plain)
  np.testing.assert_allclose(
      logits(config, params, inputs.replace(
          positions=np.tile(np.arange(LENGTH), (2, 1)))), plain, atol=1e-6)


def test_shorter_inputs_give_the_beginning() -> None:
  for name in ("gpt2", "t5"):
    config = MODELS[name]
    np.testing.assert_allclose(
        logits(config, weights(config), some_inputs(config, 5)),
        logits(config, weights(config), some_inputs(config))[:, :5],
        atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
  def run(name, inputs):
    transformer.create(MODELS[name]).apply(
        {"params": weights(MODELS[name])}, inputs)
  long = inputs_lib.Inputs(np.zeros((1, 13), np.int32))
  with pytest.raises(ValueError, match="13 tokens .*context_length 12"):
    run("gpt2", long)
  with pytest.raises(ValueError, match="13 tokens .*context_length 12"):
    run("bart", some_inputs(MODELS["bart"]).replace(source=long))
  with pytest.raises(ValueError, match="'encoder_decoder' takes a source"):
    run("t5", some_inputs(MODELS["gpt2"]))
  with pytest.raises(ValueError, match="'decoder' takes no source"):
    run("gpt2", some_inputs(MODELS["t5"]))
  with pytest.raises(ValueError, match="a prefix is for decoders"):
    run("bert", some_inputs(MODELS["bert"], prefix=np.array([1, 2])))
  with pytest.raises(config_lib.ConfigError, match="model.vocab_size"):
    transformer.create(change("gpt2", vocab_size=None))
  with pytest.raises(config_lib.ConfigError,
                     match="model.architecture.*complete_model"):
    transformer.create(config_lib.ModelConfig(vocab_size=5))
