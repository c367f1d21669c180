# SPDX-License-Identifier: Apache-2.0
"""Compute-optimal N and D of a fitted surface (Hoffmann's approach 3).

Takes coefficients, not fits: `result.Fit.compute_optimal` is the usual way in.
Runs alone give a frontier in `envelope` (approach 1) and `isoflop` (approach
2); questions that start from a loss are in `inverse`.
"""

import dataclasses
from typing import Mapping

import numpy as np
import pandas as pd

from tfjax.scaling import laws
from tfjax.scaling import search
from tfjax.scaling.forms import FloatArray

Given = Mapping[str, float]  # axes other than N, D and what follows from them

# Axes that follow from N, D and their cost.
_KNOWN_AXES = ("params", "tokens", "flops", "tokens_per_parameter")

# Sizes that span less than this say nothing of how cost grows with N.
_LEAST_RANGE = 2.0


@dataclasses.dataclass(frozen=True)
class Cost:
  """What training costs: C = kappa N^gamma D FLOPs.

  gamma is 1 and kappa about 6 for large models (Kaplan et al. 2020,
  arXiv:2001.08361, section 2.1). In small ones attention and embedding move
  FLOPs per parameter and token with size, hence a power of N.
  """

  kappa: float
  gamma: float
  source: str
  worst_error: float | None  # largest relative error over the runs
  per_parameter_token: tuple[float, float] | None  # range of C / (N D)

  def flops(self, params: FloatArray, tokens: FloatArray) -> FloatArray:
    return self.kappa * params**self.gamma * tokens

  def tokens(self, params: FloatArray, flops: FloatArray) -> FloatArray:
    return flops / (self.kappa * params**self.gamma)


CONVENTION = Cost(6.0, 1.0, "C = 6 N D by convention: no FLOPs recorded", None,
                  None)


def fit_cost(params: FloatArray, tokens: FloatArray,
             flops: FloatArray) -> Cost:
  """Least squares of log C/D on log N over the runs that know their FLOPs."""
  known = np.isfinite(flops) & (flops > 0)
  if not known.any():
    return CONVENTION
  params, tokens, flops = params[known], tokens[known], flops[known]
  log_cost, log_params = np.log(flops / tokens), np.log(params)
  if params.max() < _LEAST_RANGE * params.min():
    gamma = 1.0
    kappa = np.exp(np.mean(log_cost - log_params))
    source = "mean of C / (N D) over the runs"
  else:
    gamma, intercept = np.polyfit(log_params, log_cost, 1)
    kappa = np.exp(intercept)
    source = "least squares of log C/D on log N over the runs"
  error = np.abs(kappa * params**gamma * tokens / flops - 1)
  ratio = flops / (params * tokens)
  return Cost(float(kappa), float(gamma), source, float(error.max()),
              (float(ratio.min()), float(ratio.max())))


def method(law: laws.Law, given: Given | None = None) -> str:
  """How `optimum` finds the frontier: "closed form" or "numeric".

  Raises:
    ValueError: N and D do not trade off in this law.
  """
  given = given or {}
  if law.target != "loss":
    raise ValueError(f"law {law.name!r} gives {law.target}, not a loss: it has "
                     "no compute-optimal N and D")
  missing = [a for a in law.axes if a not in (*_KNOWN_AXES, *given)]
  if missing:
    raise ValueError(
        f"law {law.name!r} also depends on {', '.join(missing)}: its frontier "
        "in N and D needs given={" + ", ".join(
            f"{axis!r}: value" for axis in missing) + "}")
  unused = [a for a in given if a not in law.axes or a in _KNOWN_AXES]
  if unused:
    raise ValueError(f"given: {', '.join(unused)} is not an axis of law "
                     f"{law.name!r} to be held fixed")
  if "tokens_per_parameter" not in law.axes and not {
      "params", "tokens"} <= set(law.axes):
    raise ValueError(f"law {law.name!r} has no compute-optimal N and D: it "
                     f"depends on {', '.join(law.axes)} alone")
  return "closed form" if power_terms(law, given) else "numeric"


def has_optimum(law: laws.Law, given: Given | None = None) -> bool:
  """Whether N and D trade off in this law."""
  try:
    method(law, given)
  except ValueError:
    return False
  return True


def power_terms(law: laws.Law, given: Given
                ) -> tuple[tuple[str, str], tuple[str, str]] | None:
  """(A, alpha) and (B, beta) under whatever names the law has, or None where
  it is more than one term in N alone, one in D alone, and constants."""
  found: dict[str, list[tuple[str, str]]] = {"params": [], "tokens": []}
  for term in law.terms:
    moved = [axis for axis in term.exponents if axis not in given]
    if not moved:
      continue
    if len(term.exponents) > 1 or moved[0] not in found or (
        term.factors.get(moved[0], 1.0) != 1.0):
      return None
    found[moved[0]].append((term.coefficient, term.exponents[moved[0]]))
  if not all(len(terms) == 1 for terms in found.values()):
    return None
  return found["params"][0], found["tokens"][0]


def loss_at(law: laws.Law, natural: FloatArray, cost: Cost, params: FloatArray,
            tokens: FloatArray, given: Given | None = None) -> FloatArray:
  """The law's loss at N and D, whichever axes it is written in."""
  flops = cost.flops(params, tokens)
  return law.predict(natural, {
      "params": params, "tokens": tokens, "flops": flops,
      "tokens_per_parameter": tokens / params, **(given or {})})


def optimum(
    law: laws.Law, natural: FloatArray, cost: Cost, flops: FloatArray,
    given: Given | None = None,
) -> tuple[FloatArray, FloatArray, FloatArray]:
  """N*, D* and the loss there.

  In closed form where A/N^alpha + B/D^beta is least on C = kappa N^gamma D:
    N* = (alpha A / (beta gamma B) * (C/kappa)^beta)^(1/(alpha + beta gamma)),
  which is Hoffmann et al. 2022, equation 4, for gamma 1 and kappa 6. For any
  other law by golden-section search over N (`method` says which), NaN where
  no split between one parameter and one token is the best.

  Args:
    law: a law in which N and D trade off.
    natural: [..., parameters], broadcast against flops.
    cost: FLOPs of N and D.
    flops: budgets.
    given: values of further axes of the law, held fixed.

  Raises:
    ValueError: N and D do not trade off in this law.
  """
  given = given or {}
  if method(law, given) == "closed form":
    params = _closed_form(law, natural, cost, flops, given)
  else:
    params = _numeric(law, natural, cost, flops, given)
  tokens = cost.tokens(params, flops)
  return params, tokens, loss_at(law, natural, cost, params, tokens, given)


def exponents(
    law: laws.Law, natural: FloatArray, cost: Cost, flops: FloatArray,
    given: Given | None = None,
) -> tuple[FloatArray, FloatArray]:
  """a of N* ~ C^a and b of D* ~ C^b, with b = 1 - gamma a.

  Where the frontier is a power law, a = beta / (alpha + beta gamma) (Hoffmann
  et al. 2022, equation 4); elsewhere the slope over a factor of two about
  each budget.
  """
  root = 2**0.5
  above, below = (optimum(law, natural, cost, flops * factor, given)[0]
                  for factor in (root, 1 / root))
  slope = np.log(above / below) / np.log(2)
  return slope, 1 - cost.gamma * slope


def table(law: laws.Law, natural: FloatArray, samples: FloatArray, cost: Cost,
          flops: FloatArray, level: float,
          given: Given | None = None) -> pd.DataFrame:
  """Columns flops, then params, tokens, tokens_per_parameter, loss, each also
  as _low and _high: percentiles over samples [S, parameters]."""
  budgets = positive("flops", flops)
  def quantities(natural: FloatArray) -> dict[str, FloatArray]:
    params, tokens, loss = optimum(law, natural, cost, budgets, given)
    return {"params": params, "tokens": tokens,
            "tokens_per_parameter": tokens / params, "loss": loss}
  return pd.DataFrame({"flops": budgets} | with_bands(
      quantities(natural), quantities(samples[:, None, :]), level))


def with_bands(centre: Mapping[str, FloatArray],
               spread: Mapping[str, FloatArray],
               level: float) -> dict[str, FloatArray]:
  """Each quantity, then its _low and _high over the samples, axis 0."""
  columns = {}
  for name, value in centre.items():
    columns[name] = value
    columns[f"{name}_low"], columns[f"{name}_high"] = band(spread[name], level)
  return columns


def band(samples: FloatArray, level: float) -> tuple[FloatArray, FloatArray]:
  """Percentile interval over axis 0; NaN without samples or where one is NaN.

  Where a sample is infinite the ends are samples themselves, the next ones
  outwards: between a number and infinity there is nothing to interpolate.
  """
  if not len(samples):
    return (np.full(samples.shape[1:], np.nan),) * 2
  tail = (1 - level) / 2
  if np.isinf(samples).any():
    return (np.quantile(samples, tail, axis=0, method="lower"),
            np.quantile(samples, 1 - tail, axis=0, method="higher"))
  low, high = np.percentile(samples, [100 * tail, 100 - 100 * tail], axis=0)
  return low, high


def positive(name: str, values: FloatArray | float) -> FloatArray:
  """One-dimensional float64, or a ValueError that says which is not > 0."""
  made = np.atleast_1d(np.asarray(values, np.float64))
  if made.ndim != 1 or not len(made) or not (
      np.isfinite(made) & (made > 0)).all():
    raise ValueError(f"{name} must be positive and finite, not {values}")
  return made


def _closed_form(law: laws.Law, natural: FloatArray, cost: Cost,
                 flops: FloatArray, given: Given) -> FloatArray:
  at = law.parameters.index
  (a, alpha), (b, beta) = ((natural[..., at(name)] for name in term)
                           for term in power_terms(law, given))
  log_ratio = np.log(alpha * a) - np.log(beta * cost.gamma * b)
  return np.exp((log_ratio + beta * np.log(flops / cost.kappa)) / (
      alpha + beta * cost.gamma))


def _numeric(law: laws.Law, natural: FloatArray, cost: Cost, flops: FloatArray,
             given: Given) -> FloatArray:
  flops = np.broadcast_to(
      flops, np.broadcast_shapes(np.shape(flops), natural.shape[:-1]))
  def loss(log_params: FloatArray) -> FloatArray:
    params = np.exp(log_params)
    return loss_at(law, natural, cost, params, cost.tokens(params, flops),
                   given)
  # From one parameter to so many that the budget buys one token.
  one_token = np.log(flops / cost.kappa) / cost.gamma
  return np.exp(search.minimise(loss, np.zeros_like(one_token), one_token))
