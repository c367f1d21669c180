# SPDX-License-Identifier: Apache-2.0
"""Members of one compiled step: each its own, on a device of its own."""

import re
from typing import Any

import jax
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax.models import inputs as inputs_lib
from tfjax.objectives import loss as loss_lib
from tfjax.train import ensemble_step
from tfjax.train import optimizers
from tfjax.train import sharding
from tfjax.train import step as step_lib

VOCAB, LENGTH, BATCH = 64, 16, 8
COLLECTIVES = re.compile(
    r"all-reduce|all-gather|all-to-all|reduce-scatter|collective|"
    r"\bsend\b|\brecv\b")
RANDOM = np.random.default_rng(0)


def batch_of() -> loss_lib.Batch:
  tokens = RANDOM.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
  return loss_lib.Batch(inputs_lib.Inputs(tokens[:, :-1]), tokens[:, 1:],
                        np.ones((BATCH, LENGTH), np.float32))


def complete(config: config_lib.ExperimentConfig
             ) -> config_lib.ExperimentConfig:
  return config_lib.replace(config, model__vocab_size=VOCAB)


def states_of(config: config_lib.ExperimentConfig, count: int
              ) -> tuple[step_lib.Steps, list[step_lib.TrainState]]:
  """Steps of one, and the first states of several with other seeds and
  rates."""
  steps = step_lib.steps_for(config, sharding.make_mesh(config))
  states = []
  for seed in range(count):
    values = optimizers.make_hyperparameters(config_lib.replace(
        config, optimizer__learning_rate=0.01 * (seed + 1)).optimizer, 20)
    states.append(steps.init(jax.random.key(seed), values))
  return steps, states


@pytest.mark.parametrize("form", ["map", "vmap"])
@pytest.mark.parametrize("shared", [True, False])
def test_no_device_talks_to_another(form: str, shared: bool,
                                    make_config) -> None:
  config = complete(make_config())
  _, states = states_of(config, 16)
  ensemble = ensemble_step.steps_for(config, jax.devices(), 16, form, shared)
  stacked = ensemble.stack(states)
  batch = ensemble.put([batch_of()] if shared else [batch_of()] * 16)
  text = ensemble.lower_train(stacked, batch).compile().as_text()
  assert len(text) > 10_000 and not COLLECTIVES.findall(text)
  assert ensemble.mesh.shape == {"run": 8}
  assert {s.data.shape[0] for s in jax.tree.leaves(stacked)[0]
          .addressable_shards} == {2}
  losses = jax.jit(lambda *x: ensemble.evaluate(*x)).lower(
      stacked.params, batch_of(), ensemble.active(range(16))).compile()
  assert not COLLECTIVES.findall(losses.as_text())
  # They are found where there are any.
  spread = config_lib.replace(config, runtime__num_devices=8)
  data_parallel = step_lib.steps_for(
      spread, sharding.make_mesh(spread)).lower_train(batch_of())
  assert COLLECTIVES.findall(data_parallel.compile().as_text())


@pytest.mark.parametrize("form", ["map", "vmap"])
@pytest.mark.parametrize("devices", [1, 2])
def test_members_step_as_alone_or_not_at_all(
    form: str, devices: int, make_config) -> None:
  """Three members, of which the second does not step, on batches of their
  own; on two devices a copy fills up the last."""
  config = complete(make_config({"train.accumulation_steps": 2}))
  steps, states = states_of(config, 3)
  ensemble = ensemble_step.steps_for(
      config, jax.devices()[:devices], 3, form, False)
  assert ensemble.size == {1: 3, 2: 4}[devices]
  stacked = ensemble.stack(states)
  before = ensemble.unstack(stacked, range(3))
  batches = [batch_of() for _ in range(3)]
  placed = ensemble.put(batches)
  state, metrics = ensemble.compiled_train(stacked, placed)(
      stacked, placed, ensemble.active([0, 2]))
  after = ensemble.unstack(state, range(3))
  jax.tree.map(np.testing.assert_array_equal, after[1], before[1])
  for index in (0, 2):
    own = step_lib.put(steps.mesh, batches[index])
    expected, told = steps.compiled_train(own)(states[index], own)
    assert_close(after[index], expected)
    assert_close({name: value[index] for name, value in metrics.items()}, told)
    params = ensemble.unstack(state.params, [index])[0]
    mine = steps.evaluate(jax.tree.map(jax.numpy.asarray, params), own)
    found = ensemble.evaluate(state.params, batches[index],
                              ensemble.active([index]))
    assert_close([x[index] for x in found], list(mine))
    assert not np.asarray(found[0][1]).any()


def assert_close(left: Any, right: Any) -> None:
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5), left, right)


def test_a_member_s_part_is_its_own_and_no_other_leaves_the_devices(
    make_config, monkeypatch: pytest.MonkeyPatch) -> None:
  config = complete(make_config())
  _, states = states_of(config, 4)
  ensemble = ensemble_step.steps_for(config, jax.devices()[:2], 4, "map", True)
  stacked = ensemble.stack(states)
  fetched = []
  get = jax.device_get
  monkeypatch.setattr(jax, "device_get", lambda tree: (
      fetched.append(tree), get(tree))[1])
  for index in (3, 0):
    part, = ensemble.unstack(stacked, [index])
    jax.tree.map(np.testing.assert_array_equal, part, get(states[index]))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(part))
  assert [sum(x.size for x in jax.tree.leaves(tree)) for tree in fetched] == [
      sum(x.size for x in jax.tree.leaves(states[0]))] * 2


def test_who_acts_is_put_on_the_devices_once(make_config) -> None:
  ensemble = ensemble_step.steps_for(
      complete(make_config()), jax.devices()[:2], 3, "map", True)
  mask = ensemble.active([0, 2])
  np.testing.assert_array_equal(mask, [True, False, True, False])
  assert ensemble.active(range(0, 3, 2)) is mask
  assert ensemble.active([0]) is not mask


def test_members_share_a_batch_without_copies(make_config) -> None:
  config = complete(make_config())
  shared = ensemble_step.steps_for(config, jax.devices()[:2], 4, "map", True)
  batch = batch_of()
  assert shared.put([batch] * 4).targets.shape == batch.targets.shape
  own = ensemble_step.steps_for(config, jax.devices()[:2], 4, "map", False)
  assert own.put([batch] * 4).targets.shape == (4, *batch.targets.shape)


def test_code_is_shared_by_all_that_differ_in_values(make_config) -> None:
  def of(changes: dict[str, Any]) -> ensemble_step.EnsembleSteps:
    return ensemble_step.steps_for(
        complete(make_config(changes)), jax.devices()[:1], 2, "map", True)
  assert of({}) is of({"model.init_std": 0.1, "seed": 3,
                       "optimizer.learning_rate": 1.0,
                       "train.log_every_steps": 7})
  assert of({}) is not of({"model.norm_epsilon": 1e-3})


def test_a_cpu_takes_large_members_in_turn() -> None:
  small, large = (ensemble_step.CPU_VMAP_FLOPS * x for x in (0.5, 2))
  assert ensemble_step.form("cpu", small) == "vmap"
  assert ensemble_step.form("cpu", large) == "map"
  assert ensemble_step.form("gpu", large) == "vmap"
