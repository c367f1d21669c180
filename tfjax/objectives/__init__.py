# SPDX-License-Identifier: Apache-2.0
"""What is predicted from what: tokens -> inputs, targets, weights.

Each objective is a class made from (config, vocabulary), with
`batch(windows, weights_B, generators) -> loss.Batch` of NumPy arrays whose
shapes follow from the config. Which random numbers a row gets depends on the
seed, the step and the row alone, whatever the number of hosts.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from tfjax import config as config_lib
from tfjax.data import batches as batches_lib
from tfjax.data import vocabulary as vocabulary_lib
from tfjax.objectives import causal
from tfjax.objectives import loss
from tfjax.objectives import masked
from tfjax.objectives import seq2seq

Objective = causal.Causal | masked.Masked | seq2seq.Seq2Seq

OBJECTIVES = {"causal": causal.Causal, "masked": masked.Masked,
              "seq2seq": seq2seq.Seq2Seq}


def create(config: config_lib.ExperimentConfig,
           vocabulary: vocabulary_lib.Vocabulary) -> Objective:
  """The objective that the config names."""
  return OBJECTIVES[config.objective.name](config, vocabulary)


class Generators(Sequence[np.random.Generator]):
  """One generator a row: of the batch of a training step, or, without a step,
  of the held-out windows. Made when asked for: not every objective asks."""

  def __init__(self, seed: int, step: int | None, rows: Iterable[int]):
    # A counter-based generator starts anywhere at no cost: the seed and the
    # split are its key, step and row the high words of its counter.
    self._key = np.array([seed, step is None], np.uint64)
    self._step = step or 0
    self._rows = list(rows)

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> np.random.Generator:
    counter = np.array([0, self._rows[index], self._step, 0], np.uint64)
    return np.random.Generator(np.random.Philox(
        key=self._key, counter=counter))


class TrainingBatches:
  """batches[step]: this host's rows, corrupted anew at every step."""

  def __init__(self, objective: Objective, batches: batches_lib.Batches,
               seed: int):
    self._objective = objective
    self._batches = batches
    self._seed = seed

  def __getitem__(self, step: int) -> loss.Batch:
    rows = self._batches.rows
    return self._objective.batch(
        self._batches[step], np.ones(len(rows), np.float32),
        Generators(self._seed, step, rows))


class EvaluationBatches(Sequence[loss.Batch]):
  """Held-out examples; a window is corrupted alike in every evaluation."""

  def __init__(self, objective: Objective,
               batches: batches_lib.EvaluationBatches, seed: int):
    self._objective = objective
    self._batches = batches
    self._seed = seed

  def __len__(self) -> int:
    return len(self._batches)

  def __getitem__(self, index: int) -> loss.Batch:
    windows, weights_L = self._batches[index]
    return self._objective.batch(
        windows, weights_L,
        Generators(self._seed, None, self._batches.windows(index)))
