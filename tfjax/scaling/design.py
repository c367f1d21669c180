# SPDX-License-Identifier: Apache-2.0
"""The next runs: those that tell most about a target for a budget of FLOPs.

Runs are chosen by the Fisher information that a law expects of them. With J
the gradient of a run's (log) prediction by the parameters, sigma the noise of
one run and M the information of all runs, sum of J J^T / sigma^2, a target
with gradient c is estimated with the variance c^T M^-1 c. Designs that make it
least are c-optimal (Elfving 1952, doi:10.1214/aoms/1177729442; Pukelsheim 2006,
doi:10.1137/1.9780898719109, chapter 2). The parameters that J and c depend on
are uncertain themselves, so the mean over draws of them is minimised
(pseudo-Bayesian: Chaloner and Verdinelli 1995, doi:10.1214/ss/1177009939,
section 4), of the logarithm, which no draw dominates.

What is known before is in `beliefs`, how to choose among candidates in
`exchange`; which config has so many parameters is for `tfjax.sweep.sizes`.
"""

import dataclasses
from typing import Any, Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from tfjax.scaling import beliefs as beliefs_lib
from tfjax.scaling import exchange
from tfjax.scaling import forms
from tfjax.scaling import frontier
from tfjax.scaling import result
from tfjax.scaling.forms import FloatArray

Prior = beliefs_lib.Prior
# A name, or of natural parameters [..., P] the number that is to be known.
Target = str | Callable[[FloatArray], FloatArray]
At = float | Mapping[str, float]

_ON_FRONTIER = ("params", "tokens", "tokens_per_parameter", "params_exponent")
_STEP = 1e-4  # of central differences, relative to the parameter
# What is known of a parameter whatever the runs say: its logarithm to within
# this (one standard deviation). Keeps finite what no run determines.
_WEAKEST = 10.0
_VALUES = 16  # of N, and of D, that candidates have by default
_RATIOS = 16.0  # D/N of the candidates spans at least this factor
_FURTHER = 10.0  # the target lies so many times beyond the dearest run


@dataclasses.dataclass(frozen=True)
class Design:
  """Runs to make, and how well the targets will be known thereafter.

  Attributes:
    runs: one row for each distinct run: the law's axes, flops (of one), and
      seeds, how often it is to be made.
    errors: one row a target: its value by the fit, and its standard error
      before, after these runs, and after an even grid: the same FLOPs spread
      over all candidates, every one run equally often.
    flops, budget: FLOPs that the runs cost together, and that there were.
    efficiency: no other choice among the candidates has standard errors below
      so many times these (geometric mean over targets and draws).
    noise: standard deviation of one run's residual that was assumed.
    law, conventions: whose axes they are, and which columns the fit took.
    settings: the arguments.
  """

  runs: pd.DataFrame
  errors: pd.DataFrame
  flops: float
  budget: float
  efficiency: float
  noise: float
  law: forms.Law
  conventions: dict[str, Any]
  settings: dict[str, Any]

  def to_dict(self) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
        "law": self.law.name, "runs": self.runs.to_dict("records"),
        "errors": self.errors.to_dict("records"), "flops": self.flops,
        "budget": self.budget, "efficiency": self.efficiency,
        "noise": self.noise, "conventions": self.conventions,
        "settings": self.settings}


def suggest(
    fit: result.Fit | Prior,
    flops: float,
    *,
    target: Target | Sequence[Target] = "loss",
    at: At | None = None,
    candidates: pd.DataFrame | None = None,
    noise: float | None = None,
    largest: float = 0.5,
    most_runs: int = 64,
    seeds: int = 4,
    draws: int = 16,
    seed: int = 0,
) -> Design:
  """The runs that make the targets' standard errors least for so many FLOPs.

  Every run is taken to be as noisy as another, and the law to hold for all
  candidates: leave out those for which you doubt it.

  Args:
    fit: what is believed, and the runs that there are; or a `Prior`. The
      fit's bootstrap samples are drawn from: without them nothing is.
    flops: of all runs together.
    target: what is to be known, or several, which count alike: a parameter
      or derived value of the law; its target ("loss") at `at`; "params",
      "tokens" or "tokens_per_parameter" that are compute-optimal there, or
      "params_exponent", a of N* ~ C^a; or a function of natural parameters
      [..., P], of which its name is shown.
    at: FLOPs on the compute-optimal frontier, or {axis: value}, a point for
      the law's target. Unset: ten times the dearest run's FLOPs.
    candidates: a column for each axis of the law, and flops where the fitted
      cost of params and tokens is not meant. Unset: `candidates`.
    noise: standard deviation of one run's residual; unset: as the fit's
      residuals have it.
    largest: one run may cost this share of `flops`.
    most_runs: how many there may be.
    seeds: how many of them may differ in nothing but the seed.
    draws: of the parameters, besides the estimate.
    seed: of the draws.

  Raises:
    ValueError: an argument is out of range, nothing fits into the budget, or
      the law does not have what is asked for.
  """
  _check(flops=flops, largest=largest, most_runs=most_runs, seeds=seeds,
         draws=draws, noise=noise)
  if at is not None and not isinstance(at, Mapping):
    frontier.positive("at", at)
  beliefs = beliefs_lib.Beliefs(fit, noise)
  offered = _priced(
      _default(beliefs, largest * flops) if candidates is None else candidates,
      beliefs, largest * flops)
  if at is None and len(beliefs.runs):
    at = _FURTHER * float(beliefs.runs["flops"].max())
  wanted = _functions(target, at, beliefs)
  problem = _problem(beliefs, beliefs.draw(draws, seed), offered,
                     list(wanted.values()), flops, most_runs, seeds)
  counts, bound = exchange.solve(problem)
  score = problem.score(problem.information(counts))
  chosen = offered[counts > 0].assign(seeds=counts[counts > 0])
  return Design(
      chosen.sort_values("flops", ignore_index=True, kind="stable"),
      _errors(wanted, beliefs, problem, counts),
      flops=float(counts @ problem.costs), budget=float(flops),
      efficiency=min(1.0, float(np.exp((bound - score) / 2))),
      noise=beliefs.noise, law=beliefs.law, conventions=beliefs.conventions,
      settings=dict(
          target=list(wanted), at=dict(at) if isinstance(at, Mapping) else at,
          largest=largest, most_runs=most_runs, seeds=seeds, draws=draws,
          seed=seed))


def candidates(
    fit: result.Fit,
    dearest: float,
    *,
    params: Sequence[float] | None = None,
    flops_per_token: Sequence[float] | None = None,
    most_tokens: float | None = None,
    values: int = _VALUES,
) -> pd.DataFrame:
  """A grid of N and D from the smallest run of the fit up to a run's cost.

  D/N stays in the range of the runs, or in a factor of 16 about its middle
  where they span less.

  Args:
    fit: of a law in N and D.
    dearest: FLOPs that one run may cost.
    params: sizes that can be made; unset: evenly spaced in logarithm.
    flops_per_token: of each of those; unset: by the fitted cost.
    most_tokens: that there are; unset: as the cost allows.
    values: how many of D, and of N where params is unset.

  Returns:
    Columns params, tokens and flops.

  Raises:
    ValueError: the law has other axes, or no candidate is left.
  """
  if set(fit.law.axes) != {"params", "tokens"}:
    raise ValueError(
        f"candidates of law {fit.law.name!r} must be given: a table with its "
        f"axes {', '.join(fit.law.axes)} and flops")
  there = fit.runs
  ratio = there["tokens"] / there["params"]
  middle = np.sqrt(ratio.min() * ratio.max())
  span = np.sqrt(max(_RATIOS, ratio.max() / ratio.min())) * (1 + 1e-9)
  # Where N parameters on middle / span N tokens cost as much as one run may,
  # and D tokens for D / (middle span) parameters.
  per_run, power = dearest / fit.cost.kappa, 1 / (1 + fit.cost.gamma)
  if params is None:
    params = _spaced(there["params"].min(),
                     (per_run * span / middle) ** power, values)
  tokens = _spaced(there["tokens"].min(), min(
      most_tokens or np.inf,
      per_run**power * (middle * span) ** (1 - power)), values)
  n, d = map(np.ravel, np.meshgrid(params, tokens, indexing="ij"))
  each = (fit.cost.flops(n, d) if flops_per_token is None
          else np.repeat(flops_per_token, len(tokens)) * d)
  inside = (d / n >= middle / span) & (d / n <= middle * span) & (
      each <= dearest * (1 + 1e-9))
  if not inside.any():
    raise ValueError(
        f"no run of {min(params):.3g} to {max(params):.3g} parameters on "
        f"{middle / span:.3g} to {middle * span:.3g} tokens each costs at most "
        f"{dearest:.3g} FLOPs, as one run may, within the tokens that there "
        "are; raise the budget")
  return pd.DataFrame({"params": n, "tokens": d, "flops": each})[
      inside].reset_index(drop=True)


# --- Details -----------------------------------------------------------------


def _check(flops: float, largest: float, most_runs: int, seeds: int,
           draws: int, noise: float | None) -> None:
  for name, value, good, valid in (
      ("flops", flops, np.isfinite(flops) and flops > 0, "positive"),
      ("largest", largest, 0 < largest <= 1, "above 0 and at most 1"),
      ("most_runs", most_runs, most_runs >= 1, "at least 1"),
      ("seeds", seeds, seeds >= 1, "at least 1"),
      ("draws", draws, draws >= 0, "at least 0"),
      ("noise", noise, noise is None or noise > 0, "positive")):
    if not good:
      raise ValueError(f"{name} is {value!r}; must be {valid}")


def _spaced(least: float, most: float, count: int) -> FloatArray:
  """Whole numbers, evenly spaced in logarithm."""
  return np.unique(np.round(np.geomspace(least, max(least, most), count)))


def _default(beliefs: beliefs_lib.Beliefs, dearest: float) -> pd.DataFrame:
  if isinstance(beliefs.source, Prior):
    raise ValueError("a prior has no runs to take a range from: give "
                     "candidates, a table with the axes of the law, "
                     f"{', '.join(beliefs.law.axes)}, and flops")
  return candidates(beliefs.source, dearest)


def _priced(offered: pd.DataFrame, beliefs: beliefs_lib.Beliefs,
            dearest: float) -> pd.DataFrame:
  """The law's axes, N and D where known, and flops; only what fits."""
  law = beliefs.law
  missing = [axis for axis in law.axes if axis not in offered]
  if missing:
    raise ValueError(f"candidates have no column {', '.join(missing)}, axes of "
                     f"law {law.name!r}")
  columns = list(dict.fromkeys([*law.axes, *(
      name for name in ("params", "tokens") if name in offered)]))
  frame = offered[columns].astype(np.float64)
  if "flops" in offered:
    frame["flops"] = offered["flops"].astype(np.float64)
  elif {"params", "tokens"} <= set(columns):
    frame["flops"] = beliefs.cost.flops(frame["params"], frame["tokens"])
  else:
    raise ValueError("candidates need a column flops: what a run costs does "
                     f"not follow from {', '.join(columns)}")
  bad = ~(np.isfinite(frame) & (frame > 0)).all(axis=1)
  if bad.any():
    raise ValueError(
        f"candidates must be positive and finite; row {frame.index[bad][0]} "
        f"is {frame[bad].iloc[0].to_dict()}")
  affordable = frame[frame["flops"] <= dearest * (1 + 1e-9)]
  if not len(affordable):
    raise ValueError(
        f"no candidate costs at most {dearest:.3g} FLOPs, as one run may; the "
        f"cheapest costs {frame['flops'].min():.3g}"
        if len(frame) else "there are no candidates")
  return affordable.drop_duplicates(ignore_index=True)


def _functions(
    target: Target | Sequence[Target], at: At | None,
    beliefs: beliefs_lib.Beliefs,
) -> dict[str, Callable[[FloatArray], FloatArray]]:
  """Every target by its name, as a function of natural parameters."""
  wanted = [target] if isinstance(target, str) or callable(target) else target
  named = {}
  for one in wanted:
    name = one if isinstance(one, str) else one.__name__
    if name in named:
      raise ValueError(f"two targets are called {name!r}")
    named[name] = one if callable(one) else _function(one, at, beliefs)
  if not named:
    raise ValueError("there is no target")
  return named


def _function(target: str, at: At | None, beliefs: beliefs_lib.Beliefs
              ) -> Callable[[FloatArray], FloatArray]:
  law = beliefs.law
  if target in law.parameters:
    return lambda natural: natural[..., law.parameters.index(target)]
  if target in law.derived:
    return lambda natural: law.derived[target](
        {name: natural[..., k] for k, name in enumerate(law.parameters)})
  if target != law.target and target not in _ON_FRONTIER:
    known = (*law.parameters, *law.derived, law.target, *_ON_FRONTIER)
    raise ValueError(f"no target {target!r}; known: {', '.join(known)}, or a "
                     "function of the parameters")
  if at is None:
    raise ValueError(f"target {target!r} needs at, where it is to be known")
  if isinstance(at, Mapping):
    if target != law.target or set(at) != set(law.axes):
      raise ValueError(
          f"at={dict(at)} must be FLOPs, or for {law.target!r} a point with "
          f"every axis of the law, {', '.join(law.axes)}")
    return lambda natural: law.predict(natural, at)
  if not frontier.has_optimum(law):
    raise ValueError(
        f"law {law.name!r} has no compute-optimal frontier in N and D alone; "
        f"give at as a point of {', '.join(law.axes)}")
  if target == "params_exponent":
    return lambda natural: frontier.exponents(
        law, natural, beliefs.cost, np.float64(at))[0]

  def optimal(natural: FloatArray) -> FloatArray:
    params, tokens, loss = frontier.optimum(
        law, natural, beliefs.cost, np.float64(at))
    return {"params": params, "tokens": tokens,
            "tokens_per_parameter": tokens / params}.get(target, loss)
  return optimal


def _problem(
    beliefs: beliefs_lib.Beliefs, draws: FloatArray, offered: pd.DataFrame,
    wanted: Sequence[Callable[[FloatArray], FloatArray]], flops: float,
    most_runs: int, seeds: int) -> exchange.Problem:
  """In parameters over their own size, those that are fixed left out."""
  free = beliefs.free
  start, gradients, slopes = [], [], []
  for natural in draws:
    scale = np.where(natural == 0, 1.0, np.abs(natural))
    there = beliefs.information(natural) * np.outer(scale, scale)
    start.append(there[np.ix_(free, free)] + np.eye(free.sum()) / _WEAKEST**2)
    gradients.append((beliefs.gradients(natural, offered) * scale)[:, free])
    # Central differences; one row of natural + steps moves one parameter.
    steps = _STEP * np.diag(scale)
    slopes.append([((f(natural + steps) - f(natural - steps))
                    / (2 * _STEP))[free] for f in wanted])
  slopes = np.array(slopes)
  # A draw in which the optimum lies nowhere says nothing of the target.
  sound = np.isfinite(slopes).all(axis=(1, 2)) & (
      np.abs(slopes).max(axis=2) > 0).all(axis=1)
  if not sound[0]:
    raise ValueError("a target does not depend on the fitted parameters, or "
                     "has no value at the estimate")
  return exchange.Problem(
      np.array(start)[sound], np.array(gradients)[sound], slopes[sound],
      offered["flops"].to_numpy(), flops, most_runs, seeds)


def _errors(wanted: Mapping[str, Callable[[FloatArray], FloatArray]],
            beliefs: beliefs_lib.Beliefs, problem: exchange.Problem,
            counts: FloatArray) -> pd.DataFrame:
  """By the estimate, which is the first draw."""
  evenly = np.full(len(counts), problem.budget / problem.costs.sum())
  before, after, even = (
      np.sqrt(problem.variances(np.linalg.inv(problem.information(often)))[0])
      for often in (np.zeros(len(counts)), counts, evenly))
  return pd.DataFrame({
      "target": list(wanted),
      "value": [float(f(beliefs.estimate)) for f in wanted.values()],
      "before": before, "after": after, "even": even})
