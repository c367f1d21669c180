# SPDX-License-Identifier: Apache-2.0
"""What is known of a law's parameters before further runs: by a fit, or a
prior. What to run next is in `design`."""

import dataclasses
from typing import Mapping

import numpy as np
import pandas as pd
from scipy import stats

from tfjax.scaling import forms
from tfjax.scaling import frontier
from tfjax.scaling import result
from tfjax.scaling.forms import FloatArray


@dataclasses.dataclass(frozen=True)
class Prior:
  """What is believed before there is a run."""

  law: forms.Law
  coefficients: Mapping[str, float]  # natural, every parameter of the law
  covariance: FloatArray  # [P, P] of the natural parameters, in their order
  noise: float  # standard deviation of a run's residual, in the law's space
  cost: frontier.Cost = frontier.CONVENTION

  def __post_init__(self) -> None:
    names, size = self.law.parameters, len(self.law.parameters)
    if set(self.coefficients) != set(names):
      raise ValueError(f"the prior of law {self.law.name!r} must give "
                       f"{', '.join(names)}, not "
                       f"{', '.join(self.coefficients) or 'nothing'}")
    covariance = np.asarray(self.covariance, np.float64)
    if covariance.shape != (size, size) or not np.allclose(
        covariance, covariance.T) or not (
            np.linalg.eigvalsh(covariance) > 0).all():
      raise ValueError(f"the covariance must be symmetric, positive definite "
                       f"and {size} by {size}: {', '.join(names)}")
    if not self.noise > 0:
      raise ValueError(f"noise is {self.noise!r}; must be positive")


class Beliefs:
  """A fit or a prior as one: parameters, and what they are known by."""

  def __init__(self, source: result.Fit | Prior, noise: float | None):
    self.source = source
    self.law, self.cost = source.law, source.cost
    self.estimate = np.array([source.coefficients[name]
                              for name in self.law.parameters])
    if isinstance(source, Prior):
      self.runs = pd.DataFrame(columns=[*self.law.axes, "flops"])
      space, fixed, self.conventions = self.law.space, {}, {}
      self.noise = source.noise if noise is None else noise
    else:
      self.runs, self.conventions = source.runs, source.conventions
      space, fixed = source.settings["space"], source.settings["fixed"]
      self.noise = noise_of(source) if noise is None else noise
    self._log = space == "log"
    self.free = np.array([name not in fixed for name in self.law.parameters])

  def gradients(self, natural: FloatArray, frame: pd.DataFrame) -> FloatArray:
    """[rows, P] of what is observed, over its noise."""
    axes = {axis: frame[axis].to_numpy(np.float64) for axis in self.law.axes}
    slopes = self.law.gradient(natural, axes)
    if self._log:
      slopes = slopes / self.law.predict(natural, axes)
    return slopes.T / self.noise

  def information(self, natural: FloatArray) -> FloatArray:
    """[P, P] of what there is."""
    if isinstance(self.source, Prior):
      return np.linalg.inv(self.source.covariance)
    slopes = self.gradients(natural, self.runs)
    return (slopes.T * self.runs["weight"].to_numpy()) @ slopes

  def draw(self, count: int, seed: int) -> FloatArray:
    """[1 + count at most, P]: the estimate, then what else may be: samples of
    the fit, or lognormal with the prior's covariance, which keeps signs."""
    rng = np.random.default_rng(seed)
    if isinstance(self.source, Prior):
      size = np.abs(self.estimate)
      others = self.estimate * np.exp(rng.multivariate_normal(
          np.zeros(len(size)), self.source.covariance / np.outer(size, size),
          size=count))
    else:
      samples = self.source.samples
      others = rng.permutation(samples[np.isfinite(samples).all(axis=1)])
    return np.concatenate([self.estimate[None], others[:count]])


def noise_of(fit: result.Fit) -> float:
  """Standard deviation of one residual, for what the objective makes of it.

  From the median absolute residual of all but the P smallest, as P parameters
  can make so many zero (DuMouchel and O'Brien 1989). Where the objective does
  not square, estimates vary as if the noise were larger: for normal residuals
  by the root of E[psi^2] / E[psi']^2 with psi(z) = clip(z, -k, k), k being
  delta over the deviation (Huber 1964, doi:10.1214/aoms/1177703732).

  Raises:
    ValueError: there are too few residuals, or they are zero.
  """
  weights = fit.runs["weight"].to_numpy()
  sizes = np.sort(np.abs(fit.residuals) * np.sqrt(weights))
  free = len(fit.law.parameters) - len(fit.settings["fixed"])
  spare = sizes[free:]
  if not len(spare) or not np.median(spare) > 1e-12:
    raise ValueError(
        f"the residuals of {len(sizes)} runs under {free} free parameters do "
        "not tell how noisy a run is; give noise, the standard deviation of "
        "one run's residual")
  deviation = float(np.median(spare) / stats.norm.ppf(0.75))
  objective = fit.settings["objective"]
  if objective == "squares":
    return deviation
  if objective == "absolute":
    return deviation * float(np.sqrt(np.pi / 2))
  k = fit.settings["delta"] / deviation
  inside = 2 * stats.norm.cdf(k) - 1
  square = inside - 2 * k * stats.norm.pdf(k) + 2 * k**2 * stats.norm.sf(k)
  return deviation * float(np.sqrt(square) / inside)
