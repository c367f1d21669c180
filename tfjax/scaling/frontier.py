# SPDX-License-Identifier: Apache-2.0
"""Compute-optimal N and D of a fitted surface, and the envelope of runs.

Takes coefficients, not fits: `fit.Fit.compute_optimal` is the usual way in.
"""

import dataclasses

import numpy as np
import pandas as pd

from tfjax.scaling import laws

FloatArray = np.ndarray

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


def optimum(
    law: laws.Law, natural: FloatArray, cost: Cost, flops: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
  """N*, D* and the loss there, in closed form.

  Where A/N^alpha + B/D^beta is least along C = kappa N^gamma D:
    N* = (alpha A / (beta gamma B) * (C/kappa)^beta)^(1/(alpha + beta gamma)),
  which is Hoffmann et al. 2022, equation 4, for gamma 1 and kappa 6.

  Args:
    law: a law with one term in N and one in D.
    natural: [..., parameters], broadcast against flops.
    cost: FLOPs of N and D.
    flops: budgets.
  """
  size_term, data_term = _terms(law)
  at = law.parameters.index
  a, alpha = (natural[..., at(name)] for name in size_term)
  b, beta = (natural[..., at(name)] for name in data_term)
  log_ratio = np.log(alpha * a) - np.log(beta * cost.gamma * b)
  log_params = (log_ratio + beta * np.log(flops / cost.kappa)) / (
      alpha + beta * cost.gamma)
  params = np.exp(log_params)
  tokens = cost.tokens(params, flops)
  return params, tokens, law.predict(
      natural, {"params": params, "tokens": tokens})


def has_optimum(law: laws.Law) -> bool:
  """Whether N and D trade off in this law."""
  try:
    _terms(law)
  except ValueError:
    return False
  return True


def table(law: laws.Law, natural: FloatArray, samples: FloatArray, cost: Cost,
          flops: FloatArray, level: float) -> pd.DataFrame:
  """Columns flops, then params, tokens, tokens_per_parameter, loss, each also
  as _low and _high: percentiles over samples [S, parameters]."""
  budgets = np.atleast_1d(np.asarray(flops, dtype=np.float64))
  if not (np.isfinite(budgets) & (budgets > 0)).all():
    raise ValueError(f"flops must be positive and finite, not {flops}")
  columns = {"flops": budgets}
  centre = _quantities(law, natural, cost, budgets)
  spread = _quantities(law, samples[:, None, :], cost, budgets)
  tail = 100 * (1 - level) / 2
  for name, value in centre.items():
    columns[name] = value
    columns[f"{name}_low"], columns[f"{name}_high"] = np.percentile(
        spread[name], [tail, 100 - tail], axis=0)
  return pd.DataFrame(columns)


def envelope(flops: FloatArray, loss: FloatArray) -> np.ndarray:
  """Indices, by cost, of the runs on the lower convex hull of log loss against
  log FLOPs, up to the lowest loss: the runs that spent their compute best."""
  x, y = np.log(flops), np.log(loss)
  hull: list[int] = []
  for k in np.lexsort((y, x)):
    if hull and x[k] == x[hull[-1]]:
      continue  # Of runs that cost the same, the first is the best.
    while len(hull) > 1:
      a, b = hull[-2:]
      if (y[b] - y[a]) * (x[k] - x[a]) < (y[k] - y[a]) * (x[b] - x[a]):
        break  # b lies below the line from a to k.
      hull.pop()
    hull.append(int(k))
  return np.array(hull[:int(np.argmin(loss[hull])) + 1])


def _quantities(law: laws.Law, natural: FloatArray, cost: Cost,
                flops: FloatArray) -> dict[str, FloatArray]:
  params, tokens, loss = optimum(law, natural, cost, flops)
  return {"params": params, "tokens": tokens,
          "tokens_per_parameter": tokens / params, "loss": loss}


def _terms(law: laws.Law) -> tuple[tuple[str, str], tuple[str, str]]:
  """(A, alpha) and (B, beta) under whatever names the law has."""
  found = {}
  for term in law.terms:
    if len(term.exponents) == 1:
      (axis, exponent), = term.exponents.items()
      found.setdefault(axis, []).append((term.coefficient, exponent))
    elif term.exponents:
      raise ValueError(f"law {law.name!r} has no closed-form frontier")
  if sorted(found) != ["params", "tokens"] or max(map(len, found.values())) > 1:
    raise ValueError(f"law {law.name!r} has no closed-form frontier")
  return found["params"][0], found["tokens"][0]
