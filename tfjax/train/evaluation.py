# SPDX-License-Identifier: Apache-2.0
"""Loss on held-out documents, with its standard error and bits per byte."""

import dataclasses
import math
from typing import Any, Iterable

import jax
import numpy as np

from tfjax.train import sharding
from tfjax.train import step as step_lib


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """`loss` and `loss_stderr` in nats a token; the error is over windows."""

  loss: float
  loss_stderr: float | None
  bits_per_byte: float
  tokens: int


def evaluate(steps: step_lib.Steps, params: Any,
             batches: Iterable[tuple[np.ndarray, np.ndarray]],
             bytes_per_token: float) -> Evaluation:
  """Measures `params` on all windows of `batches` whose weight is not 0."""
  target = sharding.batch_sharding(steps.mesh)
  results = []
  for windows, weights in batches:
    batch = step_lib.put(target, windows, weights)
    results.append(steps.evaluate(params, batch.windows, batch.weights))
  sums, counts = (np.concatenate([np.asarray(jax.device_get(r[i]), np.float64)
                                  for r in results]) for i in (0, 1))
  return summarise(sums[counts > 0], counts[counts > 0], bytes_per_token)


def summarise(sums: np.ndarray, counts: np.ndarray,
              bytes_per_token: float) -> Evaluation:
  """From each window's summed loss and number of tokens.

  The standard error is that of a ratio of sums over windows (Cochran 1977,
  eq. 2.47), which does not take the tokens of a window for independent; with
  one window it is unknown. Bits per byte divide by the whole split's bytes a
  token.
  """
  loss = sums.sum() / counts.sum()
  stderr = None
  if len(sums) > 1:
    squares = np.square(sums - loss * counts).sum()
    stderr = math.sqrt(squares * len(sums) / (len(sums) - 1)) / counts.sum()
  return Evaluation(float(loss), stderr,
                    float(loss / math.log(2) / bytes_per_token),
                    int(counts.sum()))
