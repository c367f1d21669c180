# SPDX-License-Identifier: Apache-2.0
"""Power laws of compute through points of a frontier, with bands.

What approaches 1 (`envelope`) and 2 (`isoflop`) share. The surface of approach
3 is in `frontier`.
"""

import dataclasses

import numpy as np
import pandas as pd

from tfjax.scaling.forms import FloatArray

# Two points lie on a line whatever they are.
LEAST_POINTS = 3
# Of the resamples, so many must give a law for its interval to mean anything.
LEAST_USABLE = 0.5


class NoLaw(ValueError):
  """Points through which no law of compute goes. The message says why."""


@dataclasses.dataclass(frozen=True)
class PowerLaw:
  """exp(intercept) C^exponent, by least squares of logs."""

  exponent: float
  intercept: float
  samples: FloatArray  # [resamples, 2]: exponent and intercept; may be empty
  level: float

  @property
  def interval(self) -> tuple[float, float] | None:
    """Of the exponent; None where there are no resamples."""
    if not len(self.samples):
      return None
    low, high = np.quantile(self.samples[:, 0], self._tails)
    return float(low), float(high)

  def predict(self, flops: FloatArray | float) -> FloatArray:
    return np.exp(self.intercept + self.exponent * np.log(flops))

  def predict_interval(
      self, flops: FloatArray | float) -> tuple[FloatArray, FloatArray]:
    """Percentiles over the resamples; NaN where there are none."""
    log_flops = np.log(np.asarray(flops, np.float64))
    if not len(self.samples):
      return (np.full(log_flops.shape, np.nan),) * 2
    logs = (self.samples[:, 1] + log_flops[..., None] * self.samples[:, 0])
    low, high = np.exp(np.quantile(logs, self._tails, axis=-1))
    return low, high

  @property
  def _tails(self) -> tuple[float, float]:
    return (1 - self.level) / 2, (1 + self.level) / 2


def line(flops: FloatArray, values: FloatArray) -> FloatArray:
  """Exponent and intercept of the least-squares line of logs."""
  x = np.log(flops)
  slope, height = np.polyfit(x - x.mean(), np.log(values), 1)
  return np.array([slope, height - slope * x.mean()])


def through(flops: FloatArray, values: FloatArray, samples: list[FloatArray],
            resamples: int, level: float) -> PowerLaw:
  """The power law through points; `samples` are `line`s of the resamples that
  gave one, which count only where enough of all `resamples` did."""
  exponent, intercept = line(flops, values)
  usable = len(samples) >= max(1, LEAST_USABLE * resamples)
  return PowerLaw(float(exponent), float(intercept),
                  np.array(samples) if usable else np.empty((0, 2)), level)


def check_options(bootstrap: int, level: float) -> None:
  """Raises ValueError for an option of the resampling out of range."""
  if bootstrap < 0:
    raise ValueError(f"bootstrap is {bootstrap}; must be at least 0")
  if not 0 < level < 1:
    raise ValueError(f"level is {level}; must be between 0 and 1")


def check_runs(runs: pd.DataFrame) -> pd.DataFrame:
  """Columns run, params, tokens, loss, flops, and whatever else there is.

  Raises:
    ValueError: a column is missing, or a value is not positive and finite.
  """
  needed = ("params", "tokens", "loss", "flops")
  missing = [name for name in needed if name not in runs]
  if missing:
    raise ValueError(
        f"the runs have no column {', '.join(missing)}; a fit's own runs have "
        f"it, and these have {', '.join(map(str, runs.columns))}")
  made = runs.reset_index(drop=True)
  if "run" not in made:
    made["run"] = [f"row {index}" for index in runs.index]
  for name in needed:
    made[name] = made[name].astype(np.float64)
    bad = ~(np.isfinite(made[name]) & (made[name] > 0))
    if bad.any():
      first = made[bad].iloc[0]
      raise ValueError(f"{name} of {first['run']} is {first[name]:g}; must be "
                       "positive and finite")
  return made
