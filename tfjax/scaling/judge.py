# SPDX-License-Identifier: Apache-2.0
"""What a fit may claim: status, intervals, and which parameters are known."""

from typing import Any

import numpy as np

from tfjax.scaling import estimate as estimate_lib
from tfjax.scaling import forms
from tfjax.scaling import profile
from tfjax.scaling.forms import FloatArray

# An exponent or constant with an interval wider than this is not determined.
WIDEST_INTERVAL = 2.0
# An exponent is not determined by an axis that spans less than a decade.
LEAST_SPAN = 10.0
# A term whose axis takes fewer values than it has unknowns cannot be found:
# a curve E + A / N^alpha needs three.
_LEAST_VALUES = 3
_COLLINEAR = 0.999  # |correlation| of the logs of two axes
_OTHER_OPTIMUM = 1.5  # a factor in a parameter that makes an optimum another

_LETTERS = {"params": "N", "tokens": "D", "flops": "C", "steps": "S"}


def judge(estimate: estimate_lib.Estimate, best: estimate_lib.Best,
          samples: FloatArray, level: float) -> dict[str, Any]:
  """status, reason, intervals, profile_intervals and determined."""
  law = estimate.law
  found: list[tuple[str, str]] = []
  determined = dict.fromkeys(law.parameters, True)
  intervals = _percentiles(law, samples, level)
  structural = _structural(estimate)
  for problem, names in structural.items():
    found.append(("not_identifiable", problem))
    for name in names & set(estimate.free):
      determined[name], intervals[name] = False, None
  if not best.converged:
    found.append(("max_iterations", "no start settled within the iterations"))
  for name, end in estimate.at_bound(best.theta).items():
    determined[name] = False
    found.append(("bound_hit", f"{name} is at the {end} end of its range" + (
        ": the runs show no irreducible loss"
        if end == "lower" and name in law.constants else "")))
  profiles: dict[str, tuple[float | None, float | None]] = {}
  if not structural:
    profiles = {name: profile.interval(estimate, best.theta, name, level)
                for name in estimate.boxed if _shape(law, name)}
    found += _rivals(estimate, best)
    for name, problem in _narrow(estimate).items():
      determined[name] = False
      found.append(("not_identifiable", problem))
    found += _wide(estimate, best, intervals, profiles, determined, level)
  for term in law.terms:
    if not all(determined[e] for e in term.exponents.values()):
      determined[term.coefficient] = False
  for name in law.parameters:
    if name not in estimate.free:
      determined[name], intervals[name] = True, None
  status = found[0][0] if found else "converged"
  reason = "; ".join(text for _, text in found) or (
      "every parameter is determined")
  return dict(status=status, reason=reason, intervals=intervals,
              profile_intervals=profiles, determined=determined)


# --- Details -----------------------------------------------------------------


def _shape(law: forms.Law, name: str) -> bool:
  return name in law.exponents or name in law.constants


def _percentiles(law: forms.Law, samples: FloatArray, level: float
                 ) -> dict[str, tuple[float, float] | None]:
  if not len(samples):
    return dict.fromkeys(law.parameters)
  tail = 100 * (1 - level) / 2
  low, high = np.percentile(samples, [tail, 100 - tail], axis=0)
  return {name: (float(low[k]), float(high[k]))
          for k, name in enumerate(law.parameters)}


def _structural(estimate: estimate_lib.Estimate) -> dict[str, set[str]]:
  """Why the table cannot determine some parameters -> which those are."""
  law, rows = estimate.law, estimate.rows
  problems: dict[str, set[str]] = {}
  free = set(estimate.free)
  if len(rows) <= len(free):
    problems[f"{len(rows)} runs cannot determine {len(free)} parameters; at "
             f"least {len(free) + 1} are needed"] = free
  for axis in law.axes:
    letter = _LETTERS.get(axis, axis)
    touched = law.touched_by(axis) & free
    if not touched & set(law.exponents):
      continue
    values = estimate.axes[axis]
    count = len(np.unique(values))
    # Without a constant a straight line in logs is found from two values, and
    # an exponent that another axis shares needs no more of this one.
    alone = touched & set(law.exponents) - set().union(*(
        law.touched_by(other) for other in law.axes if other != axis))
    needed = _LEAST_VALUES if alone and set(law.constants) & free else 2
    if count < needed:
      problems[f"{count} distinct value{'s' * (count > 1)} of {letter}; at "
               f"least {needed} are needed"] = touched | (
                   set(law.constants) & free)
  if law.terms and len(law.axes) > 1 and not problems:
    problems |= _collinear(estimate)
  return problems


def _narrow(estimate: estimate_lib.Estimate) -> dict[str, str]:
  """Exponents whose axes all span less than a decade -> what they span."""
  law, found = estimate.law, {}
  # A loss never spans a decade: there the intervals alone decide.
  spans = {axis: np.inf if axis == "loss" else v.max() / v.min()
           for axis, v in estimate.axes.items()}
  for name in set(law.exponents) & set(estimate.free) if law.terms else ():
    own = [axis for axis in law.axes if name in law.touched_by(axis)]
    widest = max(own, key=spans.get)
    if spans[widest] < 0.99 * LEAST_SPAN:
      found[name] = (f"{_LETTERS.get(widest, widest)} spans a factor of "
                     f"{spans[widest]:.3g}; {name} needs at least "
                     f"{LEAST_SPAN:g}")
  return dict(sorted(found.items()))


def _collinear(estimate: estimate_lib.Estimate) -> dict[str, set[str]]:
  """Axes that move together in every run, where each has its own exponent."""
  law, problems = estimate.law, {}
  for j, one in enumerate(law.axes):
    for other in law.axes[j + 1:]:
      touched = (law.touched_by(one) | law.touched_by(other)) & set(
          estimate.free)
      logs = [np.log(estimate.axes[axis]) for axis in (one, other)]
      if (touched & set(law.exponents) and all(np.ptp(x) > 0 for x in logs)
          and abs(np.corrcoef(*logs)[0, 1]) > _COLLINEAR):
        names = [_LETTERS.get(axis, axis) for axis in (other, one)]
        problems[f"{names[0]} is a power of {names[1]} throughout, so their "
                 "effects cannot be told apart" + (
                     " (one ratio of tokens to parameters, say)"
                     if {one, other} == {"params", "tokens"} else "")
                 ] = touched | (set(law.constants) & set(estimate.free))
  return problems


def _rivals(estimate: estimate_lib.Estimate, best: estimate_lib.Best
            ) -> list[tuple[str, str]]:
  """Other optima, as good, in which a parameter is clearly another."""
  law = estimate.law
  at = [law.parameters.index(name) for name in estimate.boxed
        if _shape(law, name)]
  own = estimate.natural(best.theta)[at]
  for theta, value in zip(best.rivals, best.rival_objectives):
    other = estimate.natural(theta)[at]
    ratio = np.maximum(np.abs(other / own), np.abs(own / other))
    if (ratio > _OTHER_OPTIMUM).any() or (other * own < 0).any():
      text = ", ".join(f"{law.parameters[k]} {v:.3g}"
                       for k, v in zip(at, other))
      excess = value / best.objective - 1 if best.objective else 0.0
      return [("multiple_optima",
               f"another optimum fits as well ({excess:+.2%}): {text}")]
  return []


def _wide(
    estimate: estimate_lib.Estimate, best: estimate_lib.Best,
    intervals: dict[str, tuple[float, float] | None],
    profiles: dict[str, tuple[float | None, float | None]],
    determined: dict[str, bool], level: float) -> list[tuple[str, str]]:
  """Marks shape parameters whose intervals are too wide, and says why."""
  found = []
  for name, likely in profiles.items():
    if not determined[name]:
      continue
    for kind, interval in (("interval", intervals[name]),
                           ("profile interval", likely)):
      if interval is None or not _too_wide(interval):
        continue
      determined[name] = False
      low, high = ("open" if end is None else f"{end:.3g}" for end in interval)
      found.append((
          "not_identifiable", f"the {level:.0%} {kind} of {name}, "
          f"{low} to {high}, spans more than a factor of "
          f"{WIDEST_INTERVAL:g}"))
      break
  return found


def _too_wide(interval: tuple[float | None, float | None]) -> bool:
  low, high = interval
  if low is None or high is None or low * high <= 0:
    return True
  return max(abs(low), abs(high)) > WIDEST_INTERVAL * min(abs(low), abs(high))
