# SPDX-License-Identifier: Apache-2.0
"""The train step: what it computes, over how many devices, how it is cut."""

import types
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tfjax import config as config_lib
from tfjax.models import inputs as inputs_lib
from tfjax.models import transformer
from tfjax.objectives import causal
from tfjax.objectives import loss as loss_lib
from tfjax.train import optimizers
from tfjax.train import sharding
from tfjax.train import step as step_lib

VOCAB, LENGTH, BATCH = 257, 16, 8
VOCABULARY = types.SimpleNamespace(separator=256)
RANDOM = np.random.default_rng(0)
WINDOWS = [RANDOM.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
           for _ in range(4)]
ONES = np.ones(BATCH, np.float32)
# Padding in uneven numbers: a part of a batch has rows i and i + 4.
UNEVEN = np.array([1, 0, 1, 1, 0, 0, 0.5, 1], np.float32)


def batch_of(windows: np.ndarray, weights: np.ndarray) -> loss_lib.Batch:
  """The causal objective's batch."""
  return causal.Causal(config_lib.ExperimentConfig(), VOCABULARY).batch(
      windows, weights, ())


def steps_of(config: config_lib.ExperimentConfig, devices: int = 1
             ) -> step_lib.Steps:
  config = config_lib.replace(config, model__vocab_size=VOCAB,
                              runtime__num_devices=devices)
  return step_lib.steps_for(config, sharding.make_mesh(config))


def train(steps: step_lib.Steps, config: config_lib.ExperimentConfig,
          weights: np.ndarray = ONES, count: int = 4
          ) -> tuple[Any, list[dict[str, float]]]:
  """The state after some steps, and each one's metrics."""
  state = steps.init(jax.random.key(3), optimizers.make_hyperparameters(
      config.optimizer, 20))
  step = steps.compiled_train(batch_of(WINDOWS[0], weights))
  rows = []
  for windows in WINDOWS[:count]:
    state, metrics = step(state, step_lib.put(
        steps.mesh, batch_of(windows, weights)))
    rows.append({name: float(value) for name, value in metrics.items()})
  return state, rows


def assert_close(left: Any, right: Any, **tolerance: float) -> None:
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      np.asarray(a), np.asarray(b), **tolerance), left, right)


def test_steps_are_the_plain_ones_of_jax_and_optax(make_config) -> None:
  """Logits and log-softmax as written, jax.grad, optax.adamw."""
  config = make_config({"optimizer.clip_norm": 0.5,
                        "optimizer.learning_rate": 0.01})
  steps = steps_of(config)
  values = optimizers.make_hyperparameters(config.optimizer, 20)
  params = jax.device_get(steps.init(jax.random.key(3), values).params)
  model = transformer.create(config_lib.replace(
      config, model__vocab_size=VOCAB, model__attention="reference").model,
                             backend="tpu")

  def loss(params, windows, weights):
    logits = model.apply(
        {"params": params}, inputs_lib.Inputs(windows[:, :-1]))
    log_p = jnp.take_along_axis(
        jax.nn.log_softmax(logits), windows[:, 1:, None], -1)[..., 0]
    weights = jnp.broadcast_to(weights[:, None], (BATCH, LENGTH))
    return -(log_p * weights).sum() / weights.sum()
  gradient = jax.jit(jax.value_and_grad(loss))
  state, rows = train(steps, config, UNEVEN)
  optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(
      lambda count: optimizers.learning_rate(values.schedule, count), 0.9, 0.95,
      1e-8, weight_decay=0.1, mask=optimizers.decay_mask))
  optimizer_state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  for row, windows in zip(rows, WINDOWS):
    value, gradients = gradient(params, windows, UNEVEN)
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(gradients)))
    assert row["loss"] == pytest.approx(float(value), rel=2e-5)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert norm > 0.5  # so that it is clipped
    updates, optimizer_state = update(gradients, optimizer_state, params)
    params = optax.apply_updates(params, updates)
  assert int(state.step) == 4
  # Adam divides by the gradient's own size, so where that is nearly nothing
  # rounding shows at up to the learning rate.
  different = [np.abs(np.asarray(a) - np.asarray(b)) for a, b in zip(
      jax.tree.leaves(state.params), jax.tree.leaves(params))]
  everything = np.concatenate([d.ravel() for d in different])
  assert np.quantile(everything, 0.99) < 1e-5 and everything.max() < 2e-3


@pytest.mark.parametrize("weights", [ONES, UNEVEN], ids=["full", "padded"])
def test_accumulation_equals_the_large_batch(
    weights: np.ndarray, make_config) -> None:
  # Plain gradient descent would be linear in the gradient; a large epsilon
  # makes Adam nearly so, and differences show at their own size.
  changes = {"optimizer.epsilon": 1.0, "optimizer.learning_rate": 1.0}
  whole_config = make_config(changes)
  state, rows = train(steps_of(whole_config), whole_config, weights, 3)
  config = make_config(changes | {"train.accumulation_steps": 4})
  cut_state, cut_rows = train(steps_of(config), config, weights, 3)
  for row, cut_row in zip(rows, cut_rows):
    assert cut_row == pytest.approx(row, rel=1e-5)
  assert_close(cut_state.params, state.params, atol=2e-6, rtol=1e-4)


def test_padding_changes_nothing(make_config) -> None:
  """What stands in rows of weight 0 does not matter, in loss or update."""
  config = make_config()
  steps = steps_of(config)
  state, rows = train(steps, config, UNEVEN, 1)
  before = WINDOWS[0].copy()
  try:
    WINDOWS[0][UNEVEN == 0] = 5
    other, other_rows = train(steps, config, UNEVEN, 1)
  finally:
    WINDOWS[0] = before
  assert rows == other_rows
  jax.tree.map(np.testing.assert_array_equal, state.params, other.params)


def test_a_batch_of_padding_alone_moves_nothing_but_decay(make_config) -> None:
  config = make_config({"optimizer.weight_decay": 0.0})
  steps = steps_of(config)
  fresh = jax.device_get(steps.init(
      jax.random.key(3),
      optimizers.make_hyperparameters(config.optimizer, 20)).params)
  state, rows = train(steps, config, 0 * ONES, 1)
  assert rows[0]["loss"] == rows[0]["grad_norm"] == 0
  jax.tree.map(np.testing.assert_array_equal, state.params, fresh)


def test_any_number_of_devices_gives_the_same_run(make_config) -> None:
  config = make_config()
  (state, rows), *others = (
      train(steps_of(config, devices), config) for devices in (1, 2, 8))
  for other_state, other_rows in others:
    # Each device sums its own rows first.
    assert other_rows[0]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-6)
    for row, other in zip(rows[1:], other_rows[1:]):
      assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
    assert_close(other_state.params, state.params, atol=1e-4)
  assert len(others[1][0].step.sharding.device_set) == 8


def test_any_number_of_devices_starts_from_the_same_bits(make_config) -> None:
  config = make_config()
  values = optimizers.make_hyperparameters(config.optimizer, 20)
  one, eight = (jax.device_get(steps_of(config, devices).init(
      jax.random.key(3), values).params) for devices in (1, 8))
  jax.tree.map(np.testing.assert_array_equal, one, eight)


def test_activations_are_constrained_over_the_mesh(make_config) -> None:
  """Under the wrong kind of mesh context Linen would drop this in silence."""
  text = steps_of(make_config(), 8).lower_train(
      batch_of(WINDOWS[0], ONES)).as_text()
  assert "sharding_constraint" in text
  # Batch, length, stream.
  assert '[{"data", "fsdp"}, {"sequence"}, {}]>' in text


def test_a_step_takes_its_own_batch_only(make_config) -> None:
  steps = steps_of(make_config())
  state = steps.init(jax.random.key(0), optimizers.make_hyperparameters(
      make_config().optimizer, 20))
  with pytest.raises(TypeError):
    steps.compiled_train(batch_of(WINDOWS[0], ONES))(state, step_lib.put(
        steps.mesh, batch_of(WINDOWS[0][:4], ONES[:4])))


def test_runs_that_differ_in_numbers_share_their_code(make_config) -> None:
  base = steps_of(make_config())
  assert base is steps_of(make_config({
      "optimizer.learning_rate": 0.5, "optimizer.warmup_steps": 3,
      "optimizer.final_fraction": 0.0, "optimizer.beta1": 0.8,
      "optimizer.epsilon": 1e-6, "optimizer.weight_decay": 0.0,
      "optimizer.clip_norm": 2.0, "duration.steps": 50, "seed": 4,
      "data.shuffle_seed": 2}))
  assert base is not steps_of(make_config({"optimizer.schedule": "linear"}))
  assert base is not steps_of(make_config({"optimizer.clip_norm": None}))
  assert base is not steps_of(make_config({"model.norm_epsilon": 1e-3}))


def test_the_state_lies_as_it_is_said_to(make_config) -> None:
  steps = steps_of(make_config(), 2)
  state = steps.init(jax.random.key(0), optimizers.make_hyperparameters(
      make_config().optimizer, 20))
  jax.tree.map(lambda x, a: (
      np.testing.assert_equal((x.shape, x.dtype), (a.shape, a.dtype)),
      np.testing.assert_(x.sharding == a.sharding)),
               state, steps.abstract_state)
  assert not any(isinstance(x, nn.LogicallyPartitioned)
                 for x in jax.tree.leaves(state.params))
