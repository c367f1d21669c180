# SPDX-License-Identifier: Apache-2.0
"""What a fit is: a frozen record that predicts, and admits what it cannot."""

import dataclasses
import platform
from typing import Any

import numpy as np
import pandas as pd

from tfjax.scaling import frontier
from tfjax.scaling import laws
from tfjax.scaling import table

FloatArray = np.ndarray

STATUSES = ("converged", "bound_hit", "not_identifiable", "multiple_optima",
            "max_iterations")


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """A run that was left out of the fit, and what the fit says of it."""

  run: str
  params: float
  tokens: float
  flops: float
  measured: float
  predicted: float
  # Of one measurement: surface and residuals. None where undetermined.
  interval: tuple[float, float] | None
  relative_error: float  # predicted / measured - 1


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fitted law. Numbers that the data do not determine are marked so."""

  law: laws.Law
  status: str
  reason: str
  coefficients: dict[str, float]
  intervals: dict[str, tuple[float, float] | None]  # None: meaningless
  determined: dict[str, bool]
  objective: float
  starts: int
  share_at_best: float
  settings: dict[str, Any]
  conventions: dict[str, Any]
  runs: pd.DataFrame  # the rows used: run, params, tokens, loss, flops
  excluded: tuple[table.Excluded, ...]
  holdout: tuple[HeldOut, ...]
  cost: frontier.Cost
  samples: FloatArray  # [bootstrap, parameters], natural
  residuals: FloatArray  # [rows] log measured - log predicted

  @property
  def level(self) -> float:
    return self.settings["level"]

  @property
  def has_intervals(self) -> bool:
    """False where the table's own shape leaves a parameter open."""
    return all(self.intervals[name] is not None for name in self.intervals)

  def predict(self, params: FloatArray, tokens: FloatArray) -> FloatArray:
    """Loss (nats a token) of the fitted surface."""
    return self.law.predict(self._natural, axes(params, tokens))

  def predict_interval(
      self, params: FloatArray, tokens: FloatArray, *, noise: bool = False
  ) -> tuple[FloatArray, FloatArray]:
    """Percentile interval over the bootstrap.

    With `noise` of one more measured loss, residuals included (widened for
    the fitted parameters); without, of the surface itself. NaN where the
    table cannot determine the parameters: resamples do not show that.
    """
    at = {k: v[..., None] for k, v in axes(params, tokens).items()}
    losses = self.law.predict(self.samples, at)
    if noise:
      spare = max(len(self.residuals) - len(self.law.parameters), 1)
      widened = self.residuals * np.sqrt(len(self.residuals) / spare)
      rng = np.random.default_rng(self.settings["seed"])
      losses = losses * np.exp(rng.choice(widened, size=losses.shape))
    tail = 100 * (1 - self.level) / 2
    low, high = np.percentile(losses, [tail, 100 - tail], axis=-1)
    if not self.has_intervals:
      return np.full_like(low, np.nan), np.full_like(high, np.nan)
    return low, high

  def compute_optimal(self, flops: FloatArray | float) -> pd.DataFrame:
    """One row a budget: params, tokens, tokens_per_parameter and loss on the
    frontier, each with _low and _high, and whether it is beyond the runs.
    NaN where the table cannot determine the parameters.

    Raises:
      ValueError: a budget is not positive, or the law has no trade-off.
    """
    rows = frontier.table(self.law, self._natural, self.samples, self.cost,
                          np.asarray(flops, dtype=np.float64), self.level)
    if not self.has_intervals:
      rows.loc[:, rows.columns != "flops"] = np.nan
    spent = self.runs["flops"]
    rows["extrapolated"] = (rows["flops"] > spent.max()) | (
        rows["flops"] < spent.min())
    return rows

  def to_dict(self) -> dict[str, Any]:
    """The frozen record for fit.json: plain values, no samples."""
    return {
        "law": self.law.name, "form": self.law.form, "source": self.law.source,
        "status": self.status, "reason": self.reason,
        "coefficients": self.coefficients, "intervals": self.intervals,
        "determined": self.determined, "objective": self.objective,
        "starts": self.starts, "share_at_best": self.share_at_best,
        "settings": self.settings, "conventions": self.conventions,
        "num_runs": len(self.runs), "runs": list(self.runs["run"]),
        "excluded": [dataclasses.asdict(e) for e in self.excluded],
        "holdout": [dataclasses.asdict(h) for h in self.holdout],
        "cost": dataclasses.asdict(self.cost),
        "versions": {"python": platform.python_version(),
                     "numpy": np.__version__, "pandas": pd.__version__},
    }

  @property
  def _natural(self) -> FloatArray:
    return np.array([self.coefficients[k] for k in self.law.parameters])


def axes(params: Any, tokens: Any) -> dict[str, FloatArray]:
  """The axes of a law, float64."""
  return {"params": np.asarray(params, dtype=np.float64),
          "tokens": np.asarray(tokens, dtype=np.float64)}
