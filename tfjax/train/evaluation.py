# SPDX-License-Identifier: Apache-2.0
"""Loss on held-out documents, with its standard error and bits per byte."""

import dataclasses
import math
from typing import Any, Callable, Iterable, Sequence

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Bool
import numpy as np

from tfjax.objectives import loss as loss_lib
from tfjax.train import ensemble_step
from tfjax.train import sharding
from tfjax.train import step as step_lib


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """`loss` and `loss_stderr` in nats a predicted token; the error is over
  examples. Unknown is None."""

  loss: float
  loss_stderr: float | None
  bits_per_byte: float | None
  tokens: int


def evaluate(steps: step_lib.Steps, params: Any,
             batches: Iterable[loss_lib.Batch],
             token_bytes: Callable[[np.ndarray], float]) -> Evaluation:
  """Measures `params` on all targets of `batches` whose weight is not 0.

  `token_bytes`: the bytes of text that some targets (an array of ids) stand
  for.
  """
  results, num_bytes = [], 0.0
  for batch in batches:
    placed = step_lib.put(steps.mesh, batch)
    results.append(steps.evaluate(params, placed))
    counted = (batch.weights > 0) & _own_rows(
        steps.mesh, placed.targets.shape[0])[:, None]
    num_bytes += token_bytes(batch.targets[counted])
  return _summary(results, _over_processes(num_bytes))


def evaluate_members(
    steps: ensemble_step.EnsembleSteps, params: Any,
    batches: Iterable[loss_lib.Batch],
    token_bytes: Callable[[np.ndarray], float], members: Sequence[int],
) -> list[Evaluation]:
  """The same of some members of an ensemble; `params` are stacked."""
  active = steps.active(members)
  results, num_bytes = [], 0.0
  for batch in batches:
    results.append(steps.evaluate(params, batch, active))
    num_bytes += token_bytes(batch.targets[batch.weights > 0])
  results = [jax.device_get(result) for result in results]
  return [_summary([(sums[index], counts[index]) for sums, counts in results],
                   num_bytes) for index in members]


def _summary(results: Sequence[tuple[Any, Any]],
             num_bytes: float) -> Evaluation:
  """From the summed losses and weights of all examples, batch by batch."""
  sums, counts = (np.concatenate([np.asarray(jax.device_get(r[i]), np.float64)
                                  for r in results]) for i in (0, 1))
  return summarise(sums[counts > 0], counts[counts > 0], num_bytes)


def _own_rows(mesh: Mesh, batch_size: int) -> Bool[np.ndarray, "L"]:
  """Of the rows that this process reads, those that no process before it
  reads too."""
  first = {}
  places = sharding.batch_sharding(mesh).devices_indices_map((batch_size,))
  for device, (part,) in places.items():
    for row in range(*part.indices(batch_size)):
      first[row] = min(first.get(row, device.process_index),
                       device.process_index)
  return np.array([first[row] == jax.process_index()
                   for row in sharding.host_rows(mesh, batch_size)])


def _over_processes(value: float) -> float:
  """The sum of every process's value, in double precision."""
  if jax.process_count() == 1:
    return value
  # As words: JAX would make it a single.
  words = np.array([value]).view(np.uint32)
  return float(np.ascontiguousarray(
      multihost_utils.process_allgather(words)).view(np.float64).sum())


def summarise(sums: np.ndarray, counts: np.ndarray,
              num_bytes: float) -> Evaluation:
  """From each example's summed loss and number of tokens, and all bytes.

  The standard error is that of a ratio of sums over examples (Cochran 1977,
  eq. 2.47), which does not take the tokens of one for independent; with a
  single one it is unknown. Bits a byte are of the text that was predicted.
  """
  loss = sums.sum() / counts.sum()
  stderr = None
  if len(sums) > 1:
    squares = np.square(sums - loss * counts).sum()
    stderr = math.sqrt(squares * len(sums) / (len(sums) - 1)) / counts.sum()
  bits = sums.sum() / math.log(2)
  return Evaluation(float(loss), stderr,
                    float(bits / num_bytes) if num_bytes else None,
                    int(counts.sum()))
