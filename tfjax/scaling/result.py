# SPDX-License-Identifier: Apache-2.0
"""What a fit is: a frozen record that predicts, and admits what it cannot."""

import dataclasses
import platform
from typing import Any

import jax
import numpy as np
import pandas as pd

from tfjax.scaling import estimate as estimate_lib
from tfjax.scaling import forms
from tfjax.scaling import frontier
from tfjax.scaling import profile as profile_lib
from tfjax.scaling import table
from tfjax.scaling.forms import FloatArray

STATUSES = ("converged", "bound_hit", "not_identifiable", "multiple_optima",
            "max_iterations")


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """A run that was left out of the fit, and what the fit says of it."""

  run: str
  axes: dict[str, float]  # of the law
  params: float | None
  tokens: float | None
  flops: float
  measured: float
  predicted: float
  # Of one measurement: surface and residuals. None where undetermined.
  interval: tuple[float, float] | None
  relative_error: float  # predicted / measured - 1; NaN where measured is 0


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fitted law. Numbers that the data do not determine are marked so.

  `coefficients` are natural parameters of the law as its form has them.
  `intervals` are percentiles of the bootstrap, `profile_intervals` those of
  the profile likelihood, of exponents and constants: None where there is no
  meaningful one, or for an end that is open. `extrapolation` is how well the
  law, fitted without the runs of the most compute, predicts them.
  """

  law: forms.Law
  status: str
  reason: str
  coefficients: dict[str, float]
  intervals: dict[str, tuple[float, float] | None]
  profile_intervals: dict[str, tuple[float | None, float | None]]
  determined: dict[str, bool]
  objective: float
  starts: int
  share_at_best: float
  optima: tuple[dict[str, Any], ...]  # others as good: coefficients, objective
  settings: dict[str, Any]
  conventions: dict[str, Any]
  runs: pd.DataFrame  # the rows used: run, axes, target, flops
  excluded: tuple[table.Excluded, ...]
  holdout: tuple[HeldOut, ...]
  extrapolation: tuple[HeldOut, ...]
  cost: frontier.Cost | None  # None where the law does not know N and D
  samples: FloatArray  # [bootstrap, parameters], natural
  residuals: FloatArray  # [rows] measured less predicted, of logs or not
  estimate: estimate_lib.Estimate = dataclasses.field(repr=False)
  theta: FloatArray = dataclasses.field(repr=False)  # the solver's parameters

  @property
  def level(self) -> float:
    return self.settings["level"]

  @property
  def has_intervals(self) -> bool:
    """False where the table's own shape leaves a parameter open, or there was
    no bootstrap."""
    return bool(len(self.samples)) and all(
        self.intervals[name] is not None for name in self.estimate.free)

  @property
  def derived(self) -> dict[str, float]:
    """What follows from the coefficients, by name (Kaplan's N_c, say)."""
    # As NumPy's, whose powers overflow to inf; Python's raise.
    values = {k: np.float64(v) for k, v in self.coefficients.items()}
    with np.errstate(over="ignore", divide="ignore"):
      return {name: float(follows(values))
              for name, follows in self.law.derived.items()}

  def predict(self, *inputs: Any, **axes: Any) -> FloatArray:
    """The target (for most laws loss, nats a token) on the fitted surface.

    Args:
      *inputs: the law's axes in the order of `law.axes`: params, tokens.
      **axes: or by name.

    Raises:
      TypeError: an axis is missing, or is not the law's.
    """
    return self.law.predict(self._natural, self._axes(inputs, axes))

  def predict_interval(
      self, *inputs: Any, noise: bool = False, **axes: Any
  ) -> tuple[FloatArray, FloatArray]:
    """Percentile interval over the bootstrap.

    With `noise` of one more measured value, residuals included (widened for
    the fitted parameters); without, of the surface itself. NaN where the
    table cannot determine the parameters: resamples do not show that.
    """
    at = {k: v[..., None] for k, v in self._axes(inputs, axes).items()}
    if not self.has_intervals:
      shape = np.broadcast_shapes(*(v.shape[:-1] for v in at.values()))
      return np.full(shape, np.nan), np.full(shape, np.nan)
    values = self.law.predict(self.samples, at)
    if noise:
      spare = max(len(self.residuals) - len(self.estimate.free), 1)
      widened = self.residuals * np.sqrt(len(self.residuals) / spare)
      drawn = np.random.default_rng(self.settings["seed"]).choice(
          widened, size=values.shape)
      values = (values * np.exp(drawn) if self.settings["space"] == "log"
                else values + drawn)
    tail = 100 * (1 - self.level) / 2
    low, high = np.percentile(values, [tail, 100 - tail], axis=-1)
    return low, high

  def profile(self, name: str, points: int = 25) -> pd.DataFrame:
    """The profile likelihood of an exponent, a constant, or any parameter of
    a law that is a function.

    Returns:
      One row a value: value, objective, deviance (the interval ends where it
      passes `deviance_limit`), and each parameter at its best for that value.

    Raises:
      ValueError: a coefficient whose exponent is free has no profile.
    """
    values = profile_lib.grid(self.estimate, self.theta, name, self.level,
                              points) if name in self.estimate.boxed else ()
    low, high = self.profile_intervals.get(name, (None, None))
    if low is not None and high is not None:  # A little wider than that.
      values = np.linspace(low - 0.5 * (high - low), high + 0.5 * (high - low),
                           points)
    natural, objective, deviance = profile_lib.curve(
        self.estimate, self.theta, name, values)
    return pd.DataFrame({
        "value": natural[:, self.law.parameters.index(name)],
        "objective": objective, "deviance": deviance,
        **{other: natural[:, k]
           for k, other in enumerate(self.law.parameters)}})

  @property
  def deviance_limit(self) -> float:
    """The F distribution's quantile at the fit's level."""
    return profile_lib.limit(self.estimate, self.level)

  def profile_interval(self, name: str) -> tuple[float | None, float | None]:
    """Ends of the profile likelihood's interval; None for one that is open."""
    if name in self.profile_intervals:
      return self.profile_intervals[name]
    return profile_lib.interval(self.estimate, self.theta, name, self.level)

  def compute_optimal(self, flops: FloatArray | float) -> pd.DataFrame:
    """One row a budget: params, tokens, tokens_per_parameter and loss on the
    frontier, each with _low and _high, and whether it is beyond the runs.
    NaN where the table cannot determine the parameters.

    Raises:
      ValueError: a budget is not positive, or the law has no trade-off.
    """
    rows = frontier.table(self.law, self._natural, self.samples, self.cost,
                          np.asarray(flops, dtype=np.float64), self.level)
    if not self._can_say:
      rows.loc[:, rows.columns != "flops"] = np.nan
    spent = self.runs["flops"]
    rows["extrapolated"] = (rows["flops"] > spent.max()) | (
        rows["flops"] < spent.min())
    return rows

  def to_dict(self) -> dict[str, Any]:
    """The frozen record for fit.json: plain values, no samples; None where a
    number is unknown or infinite, which JSON has no word for."""
    return _plain({
        "law": self.law.name, "form": self.law.form, "source": self.law.source,
        "status": self.status, "reason": self.reason,
        "coefficients": self.coefficients, "derived": self.derived,
        "intervals": self.intervals,
        "profile_intervals": self.profile_intervals,
        "determined": self.determined, "objective": self.objective,
        "starts": self.starts, "share_at_best": self.share_at_best,
        "optima": list(self.optima), "settings": self.settings,
        "conventions": self.conventions,
        "num_runs": len(self.runs), "runs": list(self.runs["run"]),
        "excluded": [dataclasses.asdict(e) for e in self.excluded],
        "holdout": [dataclasses.asdict(h) for h in self.holdout],
        "extrapolation": [dataclasses.asdict(h) for h in self.extrapolation],
        "cost": self.cost and dataclasses.asdict(self.cost),
        "versions": {"python": platform.python_version(),
                     "numpy": np.__version__, "pandas": pd.__version__,
                     "jax": jax.__version__},
    })

  @property
  def _can_say(self) -> bool:
    """False where the table's own shape leaves a parameter open; without a
    bootstrap, where an exponent is not determined."""
    if len(self.samples):
      return self.has_intervals
    return all(self.determined[name] for name in self.law.exponents)

  @property
  def _natural(self) -> FloatArray:
    return np.array([self.coefficients[k] for k in self.law.parameters])

  def _axes(self, inputs: tuple[Any, ...],
            named: dict[str, Any]) -> dict[str, FloatArray]:
    axes = dict(zip(self.law.axes, inputs)) | named
    if len(inputs) > len(self.law.axes) or set(axes) != set(self.law.axes) or (
        len(axes) < len(inputs) + len(named)):
      raise TypeError(f"law {self.law.name!r} is a function of "
                      f"{', '.join(self.law.axes)}; got {len(inputs)} by place"
                      + "".join(f", {name}" for name in named))
    return {k: np.asarray(v, dtype=np.float64) for k, v in axes.items()}


def _plain(value: Any) -> Any:
  """Without NaN, infinities, and NumPy's numbers."""
  if isinstance(value, dict):
    return {key: _plain(inner) for key, inner in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(inner) for inner in value]
  value = value.item() if isinstance(value, np.generic) else value
  return None if isinstance(value, float) and not np.isfinite(value) else value
