# SPDX-License-Identifier: Apache-2.0
"""One step on every kind of mesh: what one device computes, in its share of
the memory, and by no more communication than the axes ask for."""

import functools
import math
import re
from typing import Any

import jax
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax.cost import hlo
from tfjax.cost import lengths as lengths_lib
from tfjax.cost import traffic
from tfjax.models import inputs as inputs_lib
from tfjax.objectives import loss as loss_lib
from tfjax.train import optimizers
from tfjax.train import sharding
from tfjax.train import step as step_lib

BATCH, VOCAB, STEPS = 16, 480, 20
# Infilling leaves both lengths of the encoder-decoder at 32, which divide.
FAMILIES = {
    "decoder": {"model.family": "llama", "model.num_kv_heads": 2,
                "model.context_length": 32, "optimizer.learning_rate": 1.0},
    "encoder": {"model.family": "bert", "model.context_length": 32},
    "encoder_decoder": {"model.family": "t5", "model.context_length": 32,
                        "objective.corruption": "infilling",
                        "optimizer.learning_rate": 0.2},
}
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2), (2, 1, 4, 1)]
# With it Adam is nearly plain gradient descent, and differences show at their
# own size. Without it they are divided by gradients that are nearly nothing.
PLAIN = {"optimizer.epsilon": 1.0, "optimizer.learning_rate": 3.0,
         "optimizer.weight_decay": 0.0}


@functools.lru_cache
def make(make_config, family: str, mesh: tuple[int, ...]) -> step_lib.Steps:
  axes = {f"mesh.{name}": size
          for name, size in zip(sharding.MESH_AXES, mesh)}
  config = make_config({
      "model.d_model": 64, "model.num_layers": 2, "model.num_heads": 6,
      "model.head_dim": 12, "model.vocab_size": VOCAB, "train.batch_size": BATCH,
      "runtime.num_devices": None, "runtime.cpu_tuning": "off",
      "duration.steps": STEPS, **axes, **PLAIN, **FAMILIES[family]})
  steps = step_lib.steps_for(config, sharding.make_mesh(config))
  steps.config = config
  return steps


def batch(config: config_lib.ExperimentConfig, seed: int) -> loss_lib.Batch:
  """Random tokens in the objective's form, some of weight 0."""
  rng, lengths = np.random.default_rng(seed), lengths_lib.of(config)

  def tokens(length: int) -> np.ndarray:
    return rng.integers(0, VOCAB, (BATCH, length), np.int32)
  source = predicted = None
  if config.objective.name == "seq2seq":
    source = inputs_lib.Inputs(tokens(lengths.encoder))
  if config.objective.name == "masked":
    predicted = rng.integers(
        0, lengths.encoder, (BATCH, lengths.predicted), np.int32)
  return loss_lib.Batch(
      inputs_lib.Inputs(tokens(lengths.decoder or lengths.encoder),
                        source=source),
      tokens(lengths.predicted),
      (rng.random((BATCH, lengths.predicted)) < 0.9).astype(np.float32),
      predicted)


def train(steps: step_lib.Steps) -> tuple[np.ndarray, Any, Any]:
  """Losses and gradient norms, the mean of the gradients, parameters."""
  config = steps.config
  state = steps.init(jax.random.key(0),
                     optimizers.make_hyperparameters(config.optimizer, STEPS))
  step, rows = steps.compiled_train(batch(config, 0)), []
  for i in range(STEPS):
    state, metrics = step(state, step_lib.put(
        steps.mesh, batch(config, i % 2)))
    rows.append((metrics["loss"], metrics["grad_norm"]))
  adam = next(s for s in state.optimizer_state if hasattr(s, "mu"))
  return np.array(rows, np.float64), jax.device_get(adam.mu), jax.device_get(
      state.params)


@functools.lru_cache
def alone(make_config, family: str):
  """The same on one device; kept."""
  return train(make(make_config, family, (1, 1, 1, 1)))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mesh_trains_as_one_device_does(
    family: str, mesh: tuple[int, ...], make_config) -> None:
  rows, gradients, params = train(make(make_config, family, mesh))
  rows_alone, gradients_alone, params_alone = alone(make_config, family)
  assert rows_alone[0, 0] - rows_alone[-2, 0] > 0.01  # it learns something
  np.testing.assert_allclose(rows, rows_alone, rtol=1e-5)
  for got, expected in ((gradients, gradients_alone), (params, params_alone)):
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
      other = functools.reduce(lambda t, k: t[k.key], path, got)
      # Keys' biases have no gradient but rounding: softmax does not see them.
      np.testing.assert_allclose(
          other, leaf, atol=1e-5 * max(np.abs(leaf).max(), 1e-3),
          err_msg=jax.tree_util.keystr(path))


def matrices(steps: step_lib.Steps, axis: str) -> set[tuple[int, ...]]:
  """Whole shapes of the parameters that a mesh axis is to cut, as 2-D too."""
  shapes = set()
  for leaf in jax.tree.leaves(steps.abstract_state.params):
    if axis in leaf.sharding.spec:
      shapes |= {leaf.shape, (leaf.shape[0], math.prod(leaf.shape[1:])),
                 (math.prod(leaf.shape[:-1]), leaf.shape[-1])}
  return {shape[::sign] for shape in shapes for sign in (1, -1)
          if len(shape) > 1 and 1 not in shape}


def communicated(text: str) -> list[tuple[str, tuple[int, ...]]]:
  """Kind and shape of every array that comes out of a collective."""
  found = []
  for computation in hlo.parse(text).computations.values():
    for one in computation.values():
      kind = one.opcode.removesuffix("-start")
      if kind in traffic.KINDS:
        found += [(kind, tuple(map(int, re.findall(r"\d+", re.sub(
            r"\{.*", "", array[array.index("["):])))))
                  for array in hlo.arrays(one.shape)]
  return found


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_communication_is_what_the_axes_ask_for(
    family: str, mesh: tuple[int, ...], make_config) -> None:
  steps = make(make_config, family, mesh)
  found = communicated(
      steps.compiled_train(batch(steps.config, 0)).as_text())
  assert found
  data, fsdp, sequence, tensor = mesh
  hidden = BATCH * steps.config.model.context_length * 64
  for kind, shape in found:
    if kind in ("all-gather", "all-to-all", "collective-permute"):
      # What tensor cuts is never put together, and all else by fsdp alone.
      assert tensor == 1 or shape not in matrices(steps, "tensor"), shape
      assert fsdp > 1 or shape not in matrices(steps, "fsdp"), shape
      # No device gets every row of an activation.
      assert math.prod(shape) < hidden, (kind, shape)
  if data > 1 and fsdp == sequence == tensor == 1:
    assert {kind for kind, _ in found} == {"all-reduce"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_holds_its_share(family: str, make_config) -> None:
  whole = make(make_config, family, (1, 1, 1, 1))
  memory = [steps.compiled_train(batch(steps.config, 0)).memory_analysis()
            for steps in (whole, make(make_config, family, (1, 8, 1, 1)),
                          make(make_config, family, (1, 2, 2, 2)))]
  state, temporary = ([getattr(m, f"{kind}_size_in_bytes") for m in memory]
                      for kind in ("argument", "temp"))
  # The state: an eighth and vectors; in the other mesh the two axes that cut
  # parameters leave a quarter.
  assert state[1] < 1.25 * state[0] / 8
  assert state[2] < 1.25 * state[0] / 4
  # Activations and gradients: an eighth on both, and gathered parameters, which
  # are of as many bytes in a model as small as this.
  assert temporary[1] < 1.9 * temporary[0] / 8
  assert temporary[2] < 1.9 * temporary[0] / 8
