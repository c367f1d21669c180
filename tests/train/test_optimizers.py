# SPDX-License-Identifier: Apache-2.0
"""Schedules at points worked by hand, AdamW against optax's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tfjax import config as config_lib
from tfjax.train import optimizers

CONFIG = config_lib.OptimizerConfig(
    learning_rate=2.0, warmup_steps=2, final_fraction=0.1)
STANDARD = config_lib.ModelConfig()


def rates(total: int, **fields) -> np.ndarray:
  schedule = optimizers.make_schedule(
      dataclasses.replace(CONFIG, **fields), total)
  return np.asarray(jax.vmap(lambda step: optimizers.learning_rate(
      schedule, step))(jnp.arange(total)))


def test_linear_by_hand() -> None:
  # Warm in 2 steps, then 4 equal steps from 2 down to 0.2.
  np.testing.assert_allclose(
      rates(6, schedule="linear"), [1, 2, 1.55, 1.1, 0.65, 0.2], rtol=1e-6)


def test_cosine_by_hand() -> None:
  # A third, two thirds and the whole of half a cosine: 3/4, 1/4, 0.
  np.testing.assert_allclose(
      rates(5, schedule="cosine"),
      [1, 2, 0.2 + 1.8 * 0.75, 0.2 + 1.8 * 0.25, 0.2], rtol=1e-6)


def test_wsd_by_hand() -> None:
  np.testing.assert_allclose(
      rates(10, schedule="wsd", decay_fraction=0.3, final_fraction=0.0),
      [1, 2, 2, 2, 2, 2, 2, 4 / 3, 2 / 3, 0], rtol=1e-6, atol=1e-7)


def test_constant_by_hand() -> None:
  np.testing.assert_allclose(rates(4, schedule="constant"), [1, 2, 2, 2])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("total", [3, 7, 1000])
def test_the_last_step_has_the_final_fraction(schedule: str, total: int
                                              ) -> None:
  got = rates(total, schedule=schedule, warmup_steps=1, decay_fraction=0.5)
  assert got[-1] == pytest.approx(0.2, rel=1e-5)
  assert got.max() == pytest.approx(2.0) and got.argmax() == 0


def test_the_decays_are_optaxs() -> None:
  done = np.arange(1, 51)
  cosine = optax.cosine_decay_schedule(2.0, 40, alpha=0.1)
  np.testing.assert_allclose(rates(50, schedule="cosine", warmup_steps=10)[10:],
                             [cosine(n - 10) for n in done[10:]], rtol=1e-5)
  linear = optax.linear_schedule(2.0, 0.2, 40)
  np.testing.assert_allclose(rates(50, schedule="linear", warmup_steps=10)[10:],
                             [linear(n - 10) for n in done[10:]], rtol=1e-5)


def test_a_fraction_of_the_steps_warms_up() -> None:
  got = rates(20, schedule="constant", warmup_steps=None, warmup_fraction=0.25)
  np.testing.assert_allclose(got[:6], [0.4, 0.8, 1.2, 1.6, 2, 2], rtol=1e-6)


def test_a_warmup_that_does_not_fit_is_refused() -> None:
  with pytest.raises(config_lib.ConfigError) as error:
    rates(5, warmup_steps=6)
  assert error.value.key == "optimizer.warmup_steps"
  assert "5 steps" in str(error.value)
  with pytest.raises(config_lib.ConfigError, match="at most 5 is valid"):
    rates(10, schedule="wsd", decay_fraction=0.5, warmup_steps=6)


# --- AdamW -------------------------------------------------------------------

PARAMS = {"up": {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]]),
                 "bias": jnp.array([1.0, -1.0])},
          "norm": {"scale": jnp.array([1.0, 2.0])},
          "token_embedding": {"embedding": jnp.array([[0.3, -0.7]])}}


def test_weight_decay_covers_matrices_and_raises_on_what_it_does_not_know(
) -> None:
  assert optimizers.decay_mask(PARAMS) == {
      "up": {"kernel": True, "bias": False}, "norm": {"scale": False},
      "token_embedding": {"embedding": True}}
  with pytest.raises(ValueError, match="covers the parameter up/kernal; .*"
                     "up/kernel.*scale"):
    optimizers.decay_mask({"up": {"kernal": jnp.ones(2)}})


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_updates_are_those_of_optax_adamw(clip_norm: float | None) -> None:
  config = dataclasses.replace(
      CONFIG, clip_norm=clip_norm, weight_decay=0.3, beta1=0.8, beta2=0.9,
      epsilon=1e-3)
  rate = 0.05
  theirs = optax.adamw(rate, 0.8, 0.9, 1e-3, weight_decay=0.3, mask={
      "up": {"kernel": True, "bias": False}, "norm": {"scale": False},
      "token_embedding": {"embedding": True}})
  if clip_norm:
    theirs = optax.chain(optax.clip_by_global_norm(clip_norm), theirs)
  ours = optimizers.make_optimizer(
      optimizers.make_hyperparameters(config, 10), STANDARD)
  params = expected = PARAMS
  state, their_state = ours.init(params), theirs.init(params)
  for step in range(4):
    gradient = jax.tree.map(lambda p, s=step: jnp.cos(p + s), params)
    updates, state = ours.update(gradient, state, params)
    params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    updates, their_state = theirs.update(
        jax.tree.map(lambda p, s=step: jnp.cos(p + s), expected), their_state,
        expected)
    expected = optax.apply_updates(expected, updates)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
               params, expected)
  assert not np.allclose(params["up"]["kernel"], PARAMS["up"]["kernel"])


def test_the_first_update_by_hand() -> None:
  """Both moments corrected, the first step is the sign of the gradient."""
  config = dataclasses.replace(CONFIG, clip_norm=None, weight_decay=0.1,
                               epsilon=1e-12)
  optimizer = optimizers.make_optimizer(
      optimizers.make_hyperparameters(config, 10), STANDARD)
  params = {"up": {"kernel": jnp.array([4.0, -4.0]),
                   "bias": jnp.array([4.0])}}
  gradient = {"up": {"kernel": jnp.array([0.2, 7.0]),
                     "bias": jnp.array([-3.0])}}
  updates, _ = optimizer.update(gradient, optimizer.init(params), params)
  updates = updates["up"]
  np.testing.assert_allclose(updates["kernel"], [1 + 0.4, 1 - 0.4], rtol=1e-5)
  np.testing.assert_allclose(updates["bias"], [-1.0], rtol=1e-5)


def test_each_parameters_own_numbers_by_hand() -> None:
  """Width four times the base's, depth twice: 1/4 of the rate, 1/8 of epsilon
  and four times the decay for what is hidden."""
  config = dataclasses.replace(CONFIG, clip_norm=None, weight_decay=0.1,
                               epsilon=0.8)
  model = config_lib.complete_model(config_lib.ModelConfig(
      d_model=64, num_layers=4, num_heads=4, parametrization="complete_p",
      base_d_model=16, base_head_dim=16, base_num_layers=2))
  optimizer = optimizers.make_optimizer(
      optimizers.make_hyperparameters(config, 10), model)
  params = {"block_0": {"up": {"kernel": jnp.array([4.0, -4.0]),
                               "bias": jnp.array([4.0])}},
            "token_embedding": {"embedding": jnp.array([2.0])},
            "head_bias": {"bias": jnp.array([5.0])}}
  gradient = {"block_0": {"up": {"kernel": jnp.array([0.3, -0.1]),
                                 "bias": jnp.array([0.4])}},
              "token_embedding": {"embedding": jnp.array([-0.2])},
              "head_bias": {"bias": jnp.array([0.8])}}
  updates, _ = optimizer.update(gradient, optimizer.init(params), params)
  np.testing.assert_allclose(
      updates["block_0"]["up"]["kernel"],
      [0.25 * (0.3 / (0.3 + 0.1) + 0.4 * 4), 0.25 * (-0.1 / 0.2 - 0.4 * 4)],
      rtol=1e-5)
  np.testing.assert_allclose(updates["block_0"]["up"]["bias"],
                             [0.4 / (0.4 + 0.1)], rtol=1e-5)
  np.testing.assert_allclose(updates["token_embedding"]["embedding"],
                             [-0.2 / (0.2 + 0.2) + 0.1 * 2], rtol=1e-5)
  np.testing.assert_allclose(updates["head_bias"]["bias"],
                             [0.8 / (0.8 + 0.8)], rtol=1e-5)


def test_weight_decay_shrinks_by_as_much_at_every_width() -> None:
  """Of a parameter without a gradient: rate x decay, whatever the width."""
  for name in ("standard", "mup"):
    base = {} if name == "standard" else dict(base_d_model=16,
                                              base_head_dim=16)
    model = config_lib.complete_model(config_lib.ModelConfig(
        d_model=64, num_layers=1, num_heads=4, parametrization=name, **base))
    optimizer = optimizers.make_optimizer(optimizers.make_hyperparameters(
        dataclasses.replace(CONFIG, weight_decay=0.1), 10), model)
    params = {"up": {"kernel": jnp.array([3.0])}}
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["up"]["kernel"], [0.3], rtol=1e-6)
