# SPDX-License-Identifier: Apache-2.0
"""Loss on held-out documents, with its standard error and bits per byte."""

import dataclasses
import math
from typing import Any, Callable, Iterable

import jax
from jax.experimental import multihost_utils
import numpy as np

from tfjax.objectives import loss as loss_lib
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
    num_bytes += token_bytes(batch.targets[batch.weights > 0])
    results.append(steps.evaluate(params, step_lib.put(steps.mesh, batch)))
  # Every host has counted the bytes of its own rows.
  num_bytes = float(multihost_utils.process_allgather(
      np.float64(num_bytes)).sum()) if jax.process_count() > 1 else num_bytes
  sums, counts = (np.concatenate([np.asarray(jax.device_get(r[i]), np.float64)
                                  for r in results]) for i in (0, 1))
  return summarise(sums[counts > 0], counts[counts > 0], num_bytes)


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
