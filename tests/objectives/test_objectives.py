# SPDX-License-Identifier: Apache-2.0
"""All objectives: random numbers by seed, step and row, whatever the hosts."""

import itertools
import json
import pathlib

import jax
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax import objectives
from tfjax.cost import lengths as lengths_lib
from tfjax.data import batches as batches_lib
from tfjax.data import store as store_lib
from tfjax.data import vocabulary as vocabulary_lib
from tfjax.objectives import loss

CHANGES = {
    "causal": {"objective.prefix_lm": True},
    "masked": {"model.family": "bert"},
    "spans": {"model.family": "t5", "model.context_length": 48},
    "infilling": {"model.family": "bart", "objective.corruption": "infilling",
                  "objective.permute_sentences": True},
    "pairs": {"model.family": "t5", "objective.corruption": "pairs",
              "data.corpus": "files", "data.target_field": "target",
              "objective.source_length": 24},
}


def resolved(make_config, name: str, directory: pathlib.Path
             ) -> config_lib.ExperimentConfig:
  changes = dict(CHANGES[name])
  if name == "pairs":
    path = directory / "pairs.jsonl"
    path.write_text("".join(json.dumps({
        "text": f"source {i} " * (1 + i % 4), "target": f"target {i}"}) + "\n"
                            for i in range(99)))
    changes["data.files"] = (str(path),)
  return make_config(changes)


def read(config: config_lib.ExperimentConfig, seed: int = 0,
         rows: list[int] | None = None, evaluation_size: int = 8
         ) -> tuple[list[loss.Batch], objectives.EvaluationBatches]:
  """Four training batches, and all for evaluation."""
  store = store_lib.build(config.data)
  objective = objectives.create(
      config, vocabulary_lib.of(config, store.tokenizer()))
  common = dict(
      context_length=config.model.context_length,
      source_length=config.objective.source_length, rows=rows)
  train = objectives.TrainingBatches(objective, batches_lib.training_batches(
      store, config.data, batch_size=8, **common), seed)
  return (
      [train[step] for step in range(4)],
      objectives.EvaluationBatches(objective, batches_lib.evaluation_batches(
          store, batch_size=evaluation_size, tokens=200, **common), seed))


def equal(one: loss.Batch, other: loss.Batch) -> bool:
  return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def joined(parts: list[loss.Batch]) -> loss.Batch:
  return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def test_generators_differ_by_seed_split_step_and_row() -> None:
  drawn = {}
  for seed, step, row in itertools.product((0, 1), (None, 0, 1), (0, 1, 7)):
    drawn[seed, step, row] = tuple(
        objectives.Generators(seed, step, [row])[0].random(8))
  assert len(set(drawn.values())) == len(drawn)
  # No stream is another one shifted.
  assert len(set(itertools.chain(*drawn.values()))) == 8 * len(drawn)
  together = objectives.Generators(1, 1, range(8))
  assert tuple(together[7].random(8)) == drawn[1, 1, 7]


@pytest.mark.parametrize("name", CHANGES)
def test_batches_are_functions_of_seed_and_step(
    make_config, tmp_path: pathlib.Path, name: str) -> None:
  config = resolved(make_config, name, tmp_path)
  lengths = lengths_lib.of(config)
  train, evaluation = read(config)
  shapes = jax.tree.map(np.shape, train[0])
  assert train[0].targets.shape == (8, lengths.predicted)
  assert train[0].weights.dtype == np.float32
  for batch in (*train, *evaluation):
    assert jax.tree.map(np.shape, batch) == shapes
  again, evaluation_again = read(config)
  assert equal(again[3], train[3]) and equal(again[0], train[0])
  assert not equal(train[0], train[1])
  assert all(map(equal, evaluation, evaluation_again))
  assert not evaluation[len(evaluation) - 1].weights[-1].any()  # padding
  if name != "pairs":  # where nothing is random
    other, evaluation_other = read(config, seed=1)
    assert not equal(other[0], train[0])
    assert not equal(evaluation_other[0], evaluation[0])


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_same_examples(
    make_config, tmp_path: pathlib.Path, name: str, hosts: int) -> None:
  config = resolved(make_config, name, tmp_path)
  parts = [read(config, rows=list(rows)) for rows in
           np.split(np.arange(8), hosts)]
  for split, whole in enumerate(read(config)):
    for index in range(len(whole)):
      assert equal(joined([part[split][index] for part in parts]),
                   whole[index])


def test_evaluation_does_not_depend_on_the_batch_size(make_config) -> None:
  config = make_config(CHANGES["masked"])
  one, other = (joined(list(read(config, evaluation_size=size)[1]))
                for size in (5, 8))
  count = int((one.weights[:, 0] > 0).sum())
  assert count == 13 and equal(jax.tree.map(lambda x: x[:count], one),
                               jax.tree.map(lambda x: x[:count], other))
