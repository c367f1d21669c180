# SPDX-License-Identifier: Apache-2.0
"""The table by hand; at its base it changes nothing; folded into weights it
computes the same."""

import dataclasses
import functools
import pathlib
import sys
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
# pylint: disable=wrong-import-position
from parametrized import OPTIMIZER, example, gradients, initial, model
sys.path.pop(0)

from tfjax import config as config_lib
from tfjax.models import decoding
from tfjax.models import families
from tfjax.models import parametrization
from tfjax.models import search
from tfjax.models import transformer
from tfjax.objectives import loss as loss_lib
from tfjax.train import optimizers


# --- The table ---------------------------------------------------------------


def rows(config: config_lib.ModelConfig) -> dict[str, parametrization.Row]:
  return {row.name: row for row in parametrization.table(config)}


def test_the_table_by_hand() -> None:
  """Four times the base's width in as many heads, eight times its depth."""
  found = rows(model("complete_p", 256, num_layers=16, init_std=0.2,
                     tie_embedding=False))
  block = "decoder/block_3/"
  # init_std, learning rate, epsilon, decay, product, logits.
  assert {name: (row.role, row.init_std, *dataclasses.astuple(row.scales),
                 row.forward, row.head) for name, row in found.items()
          if "block_" not in name or name.startswith(block)} == {
      "token_embedding/embedding": ("input", 0.2, 1, 1 / 4, 1, 1, None),
      "decoder/position_embedding/embedding": (
          "input", 0.2, 1, 1 / 4, 1, 1, None),
      "untied_head/embedding": ("output", 0.2, 1, 1 / 4, 1, 1 / 4, 1 / 4),
      "decoder/final_norm/scale": ("vector", 0, 1, 1 / 4, 0, 1, None),
      "decoder/final_norm/bias": ("vector", 0, 1, 1 / 4, 0, 1, None),
      **{f"{block}{name}/kernel": (
          "hidden", 0.1, 1 / 4, 1 / 32, 4, 1, None) for name in (
              "attention/key", "attention/value", "feed_forward/up")},
      f"{block}attention/query/kernel": (
          "query", 0.1, 1 / 4, 1 / 32, 4, 1 / 4, None),
      **{f"{block}{name}/kernel": (
          "residual", 0.05, 1 / 4, 1 / 32, 4, 1 / 8, None) for name in (
              "attention/output", "feed_forward/down")},
      **{f"{block}{name}/bias": ("vector", 0, 1, 1 / 32, 0, forward, None)
         for name, forward in {
             "attention/query": 1 / 4, "attention/key": 1,
             "attention/value": 1, "attention/output": 1 / 8,
             "feed_forward/up": 1, "feed_forward/down": 1 / 8}.items()},
      **{f"{block}{norm}_norm/{name}": ("vector", 0, 1, 1 / 32, 0, 1, None)
         for norm in ("attention", "feed_forward")
         for name in ("scale", "bias")}}


def test_heads_that_grow_wider() -> None:
  """Scores are divided by the width, and by its root at the base."""
  wide = model("mup", 256, num_heads=4)
  assert wide.head_dim == 64
  assert parametrization.score_multiplier(wide) == 16 ** -0.5 / 4
  many = model("mup", 256)
  assert parametrization.score_multiplier(many) == 16 ** -0.5
  standard = model("standard", 256, num_heads=4)
  assert parametrization.score_multiplier(standard) == 64 ** -0.5


def test_t5_by_hand() -> None:
  """fan_in: hidden matrices by their own inputs, the head by the base's;
  scores that are not scaled start as the base's."""
  found = rows(model("mup", 256, family="t5v1_1", num_heads=8))
  stds = {name.removesuffix("/kernel"): row.init_std
          for name, row in found.items()}
  block = "decoder/block_1/"
  assert stds["token_embedding/embedding"] == 1
  assert stds["untied_head/embedding"] == 64 ** -0.5
  assert stds[block + "attention/key"] == 256 ** -0.5
  assert stds[block + "attention/query"] == (16 * 256) ** -0.5
  d_ff = model("mup", 256, family="t5v1_1").d_ff
  assert stds[block + "feed_forward/down"] == d_ff ** -0.5
  assert found["untied_head/embedding"].head == 1 / 4
  # Four times as wide, of heads twice as wide: twice as many heads.
  assert found[block + "attention/query/kernel"].forward == 1 / 2
  bias = found["decoder/relative_bias/embedding"]
  assert (bias.role, bias.scales.epsilon) == ("score_bias", 1 / 2)
  tied = rows(model("mup", 256, family="t5"))["token_embedding/embedding"]
  assert (tied.forward, tied.head) == (1, 64 ** -0.5 / 4)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_parameter_of_every_family_has_a_rule(family: str) -> None:
  encoder = families.FAMILIES[family].fields["architecture"] == "encoder"
  config = model("mup", 128, family=family, pooler=encoder)
  found = parametrization.table(config)
  assert sum(np.prod(row.shape) for row in found) == (
      transformer.count_parameters(config).total)
  # What starts at random decays, and the other way round.
  assert all(bool(row.init_std) == bool(row.scales.weight_decay)
             for row in found)
  heads = [row.name for row in found if row.head is not None]
  assert heads == ["token_embedding/embedding" if config.tie_embedding
                   else "untied_head/embedding"]


def test_scanned_layers_have_the_same_rules() -> None:
  flat, scanned = (rows(model("complete_p", 128, family="llama", num_layers=4,
                              scan_layers=scan)) for scan in (False, True))
  for name, row in scanned.items():
    other = flat[name.replace("blocks/block", "block_1")]
    assert dataclasses.replace(
        row, name=other.name, shape=other.shape, axes=other.axes) == other


def test_a_parameter_without_a_rule_is_named() -> None:
  for path in ("decoder/block_0/router/kernel", "decoder/gains/gain"):
    with pytest.raises(ValueError, match=f"covers the parameter {path};"):
      parametrization.role(path.split("/"))


@pytest.mark.parametrize("name, fields, key", [
    ("mup", {"base_d_model": None}, "base_d_model"),
    ("mup", {"base_head_dim": None}, "base_head_dim"),
    ("mup", {"base_num_layers": 2}, "base_num_layers"),
    ("complete_p", {"base_num_layers": None}, "base_num_layers"),
    ("complete_p", {"norm_position": "post"}, "parametrization"),
    ("standard", {"base_d_model": 64}, "base_d_model"),
    ("standard", {"base_head_dim": 16}, "base_head_dim")])
def test_a_base_that_is_missing_or_changes_nothing_is_refused(
    name: str, fields: dict[str, Any], key: str) -> None:
  config = dataclasses.replace(model(name), **fields)
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.complete_model(config)
  assert error.value.key == f"model.{key}"
  assert name in str(error.value)


def test_complete_p_knows_one_depth() -> None:
  with pytest.raises(config_lib.ConfigError, match="must be model.num_layers"):
    model("complete_p", family="t5", num_encoder_layers=3)
  assert model("complete_p", family="t5").num_encoder_layers == 2


# --- At the base -------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def trained(config: config_lib.ModelConfig, params: dict) -> Any:
  """Two updates: parameters, the last update, the logits."""
  values = optimizers.make_hyperparameters(
      dataclasses.replace(OPTIMIZER, epsilon=1e-3), 10)
  optimizer = optimizers.make_optimizer(values, config)
  batch = example(config, jax.random.key(5))
  state = optimizer.init(params)
  for _ in range(2):
    updates, state = optimizer.update(
        gradients(config, params, batch), state, params)
    params = jax.tree.map(lambda p, u: p - 0.01 * u, params, updates)
  return params, state, transformer.create(config).apply(
      {"params": params}, batch.inputs)


@pytest.mark.parametrize("family, name", [
    ("gpt2", "mup"), ("gpt2", "complete_p"), ("llama", "complete_p"),
    ("t5", "mup"), ("transformer", "mup"), ("bert", "mup")])
def test_at_its_base_it_is_standard_to_the_bit(family: str, name: str) -> None:
  """Initial weights, function, update and the optimizer's state."""
  made = []
  for one in ("standard", name):
    config = model(one, family=family, scan_layers=family == "llama")
    params = initial(config, jax.random.key(3))
    last, state, logits = trained(config, params)
    made.append((params, last, jax.tree.leaves(state), logits))
  jax.tree.map(np.testing.assert_array_equal, *made)


# --- One function ------------------------------------------------------------

LARGER = {
    "gpt2": model("complete_p", 128, num_heads=4, num_layers=3),
    "gpt2 untied": model("mup", 128, tie_embedding=False),
    "llama scanned": model("complete_p", 128, family="llama", num_layers=4,
                           scan_layers=True, tie_embedding=True),
    "gpt scanned": model("mup", 128, family="gpt", scan_layers=True),
    "bert": model("mup", 128, family="bert", pooler=True),
    "modernbert": model("complete_p", 128, family="modernbert", num_layers=3,
                        head_transform=False, pooler=True),
    "bart": model("mup", 128, family="bart", num_heads=4),
    "t5": model("mup", 128, family="t5", num_heads=4),
    "t5v1_1": model("complete_p", 128, family="t5v1_1", num_layers=3),
    "transformer": model("mup", 128, family="transformer"),
}


def shaken(config: config_lib.ModelConfig) -> dict:
  """Parameters of which none is constant."""
  params = initial(config, jax.random.key(1))
  return jax.tree.map(lambda x: x + 0.1 * jnp.sin(
      jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), params)


@pytest.mark.parametrize("name", LARGER)
def test_loss_and_logits_agree(name: str) -> None:
  config = LARGER[name]
  module, params = transformer.create(config), shaken(config)
  batch = example(config, jax.random.key(2))
  logits = module.apply({"params": params}, batch.inputs)
  log_p = jnp.take_along_axis(
      jax.nn.log_softmax(logits), batch.targets[..., None], -1)
  total, _ = loss_lib.loss_sum(module, params, batch)
  assert float(total) == pytest.approx(float(-log_p.sum()), rel=1e-5)
  losses, _ = loss_lib.losses(module, params, batch)
  assert float(losses.sum()) == pytest.approx(float(total), rel=1e-5)


@pytest.mark.parametrize("name", LARGER)
def test_folded_weights_compute_the_same(name: str) -> None:
  config = LARGER[name]
  params = shaken(config)
  plain, folded = parametrization.fold(config, params)
  assert plain.parametrization == "standard"
  assert config_lib.complete_model(plain) == plain  # without a base
  inputs = example(config, jax.random.key(2)).inputs

  def run(module):
    hidden = module.hidden(inputs)
    return module.logits(hidden), (
        module.pooled(hidden) if config.pooler else 0)
  expected, got, unfolded = (
      nn.apply(lambda module: run(module), transformer.create(one))(
          {"params": weights})
      for one, weights in ((config, params), (plain, folded),
                           (plain, params)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=2e-4), got, expected)
  assert np.abs(unfolded[0] - expected[0]).max() > 0.02


def test_a_standard_model_is_not_folded() -> None:
  config, params = model("standard"), {"a": 1}
  assert parametrization.fold(config, params) == (config, params)


def test_generation_is_that_of_the_folded_model() -> None:
  config = LARGER["gpt2"]
  params = shaken(config)
  plain, folded = parametrization.fold(config, params)
  made = [decoding.generate(
      transformer.create(one), weights, [[1, 2, 3], [5, 0, 6]],
      search.Settings(max_new_tokens=5))
          for one, weights in ((config, params), (plain, folded))]
  np.testing.assert_array_equal(made[0].tokens, made[1].tokens)
