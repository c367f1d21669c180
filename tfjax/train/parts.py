# SPDX-License-Identifier: Apache-2.0
"""What a run is made of, from its config: data, budget, mesh, compiled step.

All of it follows from the config and the corpus; nothing here changes while
training goes on.
"""

import dataclasses
import logging

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int
import numpy as np

from tfjax import config as config_lib
from tfjax import objectives
from tfjax.cost import budget as budget_lib
from tfjax.data import batches as batches_lib
from tfjax.data import corpora
from tfjax.data import store as store_lib
from tfjax.data import vocabulary as vocabulary_lib
from tfjax.train import claim
from tfjax.train import cluster
from tfjax.train import compilation
from tfjax.train import optimizers
from tfjax.train import sharding
from tfjax.train import step as step_lib

_LOG = logging.getLogger("tfjax")


@dataclasses.dataclass(frozen=True)
class Parts:
  """`config` has the vocabulary's size filled in, `given` may not."""

  given: config_lib.ExperimentConfig
  config: config_lib.ExperimentConfig
  store: store_lib.TokenStore
  vocabulary: vocabulary_lib.Vocabulary
  budget: budget_lib.Budget
  mesh: Mesh
  hyperparameters: optimizers.Hyperparameters
  steps: step_lib.Steps
  objective: objectives.Objective
  batches: objectives.TrainingBatches
  evaluation_batches: objectives.EvaluationBatches
  compiled_before: compilation.Counts  # by this process, before the run

  def num_bytes(self, targets: Int[np.ndarray, "P"]) -> float:
    """Bytes of text that targets stand for."""
    table = self.vocabulary.token_bytes
    if table is not None:
      return float(table[targets].sum())
    # The tokenizer does not tell: the split's mean, of all that is text, which
    # an unknown token is too.
    separators = np.isin(targets, [self.vocabulary.separator,
                                   *self.vocabulary.sentinels]).sum()
    return float((targets.size - separators) *
                 self.store.validation_bytes_per_text_token)


def make(given: config_lib.ExperimentConfig) -> Parts:
  """Builds or opens the token store, and everything from there.

  Raises:
    ConfigError: the config does not fit the data or the devices.
    DataError: the corpus cannot be used, or processes see different ones.
  """
  compilation.use_cache(given.runtime)
  compiled_before = compilation.counts()
  store = _open_store(given.data)
  vocabulary = vocabulary_lib.of(given, store.tokenizer())
  config = budget_lib.with_vocabulary(given, vocabulary.size)
  train, length = config.train, config.model.context_length
  source_length = config.objective.source_length
  windows = batches_lib.open_windows(store, "train", length, source_length)
  _warn_of_cut_pairs(windows)
  budget = budget_lib.plan(config, windows)
  evaluation_size = config.evaluation.batch_size or train.batch_size
  mesh = sharding.make_mesh(config)
  objective = objectives.create(config, vocabulary)
  batches = batches_lib.training_batches(
      store, config.data, context_length=length, batch_size=train.batch_size,
      rows=sharding.host_rows(mesh, train.batch_size),
      source_length=source_length)
  evaluation_batches = batches_lib.evaluation_batches(
      store, context_length=length, batch_size=evaluation_size,
      tokens=config.evaluation.tokens,
      rows=sharding.host_rows(mesh, evaluation_size),
      source_length=source_length)
  return Parts(
      given=given, config=config, store=store, vocabulary=vocabulary,
      budget=budget, mesh=mesh,
      hyperparameters=optimizers.make_hyperparameters(
          config.optimizer, budget.steps),
      steps=step_lib.steps_for(config, mesh), objective=objective,
      batches=objectives.TrainingBatches(
          objective, batches, config.objective.seed),
      evaluation_batches=objectives.EvaluationBatches(
          objective, evaluation_batches, config.objective.seed),
      compiled_before=compiled_before)


def _open_store(data: config_lib.DataConfig) -> store_lib.TokenStore:
  """The token store, the same at every process.

  The main process goes first: on a file system that all share it builds the
  store for all, and locks need not reach from host to host.
  """
  if jax.process_count() == 1:
    return store_lib.build(data)
  name = claim.shared(lambda: store_lib.build(data).path.name)
  store = store_lib.build(data)
  cluster.barrier()  # without a shared file system each has built its own
  same = multihost_utils.process_allgather(np.array(store.path.name == name))
  if not same.all():
    raise corpora.DataError(
        "the processes do not see the same corpus: its token store is not "
        f"{name}, as at process 0, at {np.flatnonzero(~same).tolist()}; give "
        "every host the same files with the same times, or the corpus on a "
        "file system that they share")
  return store


def _warn_of_cut_pairs(windows: batches_lib.TextWindows |
                       batches_lib.PairWindows) -> None:
  for side in ("source", "target"):
    if count := getattr(windows, f"cut_{side}s", 0):
      key = ("model.context_length" if side == "target"
             else "objective.source_length")
      _LOG.warning(
          "%s of %s training pairs have a %s longer than %s; what is over is "
          "cut off", f"{count:,}", f"{len(windows):,}", side, key)
