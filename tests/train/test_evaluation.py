# SPDX-License-Identifier: Apache-2.0
"""Held-out loss, its error, and bits per byte."""

import dataclasses
import math
import pathlib
import types

import jax
import numpy as np
import pytest

from tfjax import objectives
from tfjax.cost import budget as budget_lib
from tfjax.data import batches as batches_lib
from tfjax.data import store as store_lib
from tfjax.data import vocabulary as vocabulary_lib
from tfjax.train import evaluation
from tfjax.train import optimizers
from tfjax.train import sharding
from tfjax.train import step as step_lib


def test_summary_by_hand() -> None:
  got = evaluation.summarise(
      np.array([10.0, 14.0, 12.0]), np.array([4.0, 4.0, 4.0]), 24.0)
  assert got.loss == 3.0 and got.tokens == 12
  # Squared deviations of the sums 4 + 4 + 0, times 3/2: 12, over 12 tokens.
  assert got.loss_stderr == pytest.approx(math.sqrt(12) / 12)
  assert got.bits_per_byte == pytest.approx(3 / math.log(2) / 2)


def test_windows_of_unequal_length_by_hand() -> None:
  got = evaluation.summarise(np.array([2.0, 12.0]), np.array([1.0, 3.0]), 1.0)
  assert got.loss == 3.5 and got.tokens == 4
  # Deviations 2 - 3.5 and 12 - 10.5.
  assert got.loss_stderr == pytest.approx(math.sqrt(2 * (2.25 + 2.25)) / 4)


def test_one_window_has_no_known_error() -> None:
  got = evaluation.summarise(np.array([8.0]), np.array([4.0]), 1.0)
  assert (got.loss, got.loss_stderr) == (2.0, None)


def test_without_known_bytes_there_are_no_bits_a_byte() -> None:
  assert evaluation.summarise(
      np.array([8.0]), np.array([4.0]), 0.0).bits_per_byte is None


def test_the_loss_does_not_depend_on_the_batch(
    make_config, cache_dir: pathlib.Path) -> None:
  config = make_config()
  store = store_lib.build(config.data)
  assert store.path.parent == cache_dir
  vocabulary = vocabulary_lib.of(config, store.tokenizer())
  config = budget_lib.with_vocabulary(config, vocabulary.size)
  objective = objectives.create(config, vocabulary)
  mesh = sharding.make_mesh(config)
  steps = step_lib.steps_for(config, mesh)
  state = steps.init(jax.random.key(0), optimizers.make_hyperparameters(
      config.optimizer, 10))
  results = []
  for batch_size in (1, 3, 8):
    batches = batches_lib.evaluation_batches(
        store, context_length=16, batch_size=batch_size, tokens=20 * 16)
    results.append(evaluation.evaluate(
        steps, state.params,
        objectives.EvaluationBatches(objective, batches, seed=0),
        lambda targets: float(targets.size)))
  for one in results:
    assert one.tokens == 320
    assert one.loss == pytest.approx(results[0].loss, rel=1e-6)
    assert one.loss_stderr == pytest.approx(results[0].loss_stderr, rel=1e-3)
    # Padding, of which a batch of 3 has some, is no text.
    assert one.bits_per_byte == pytest.approx(one.loss / math.log(2))
  # Freshly made, it knows nothing but the size of the vocabulary.
  assert results[0].loss == pytest.approx(math.log(257), rel=0.02)


@dataclasses.dataclass(frozen=True)
class Device:
  process_index: int


def test_a_row_that_two_processes_read_is_counted_by_one(
    monkeypatch: pytest.MonkeyPatch) -> None:
  """Four processes with a device each; tensor reaches from one to another."""
  parts = [slice(0, 2), slice(2, 4), slice(0, 2), slice(2, 4)]
  places = {Device(i): (part,) for i, part in enumerate(parts)}
  monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: (
      types.SimpleNamespace(devices_indices_map=lambda shape: places)))
  found = []
  for process, part in enumerate(parts):
    with monkeypatch.context() as patch:
      patch.setattr(jax, "process_index", lambda p=process: p)
      patch.setattr(sharding, "host_rows", lambda mesh, size, part=part: list(
          range(size))[part])
      found.append(evaluation._own_rows(None, 4).tolist())
  assert found == [[True, True], [True, True], [False, False], [False, False]]
