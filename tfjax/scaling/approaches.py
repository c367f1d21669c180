# SPDX-License-Identifier: Apache-2.0
"""Hoffmann's three approaches side by side, and the known bias of approach 2.

Hoffmann et al. 2022, arXiv:2203.15556, table 2. The approaches themselves are
in `envelope` (1), `isoflop` (2) and `frontier` (3).
"""

import dataclasses
from typing import Any, Callable

import numpy as np
import pandas as pd

from tfjax.scaling import envelope as envelope_lib
from tfjax.scaling import frontier
from tfjax.scaling import isoflop as isoflop_lib
from tfjax.scaling import power
from tfjax.scaling import result
from tfjax.scaling import wording
from tfjax.scaling.forms import FloatArray

_SOURCE = "Czech et al. 2026, arXiv:2603.22339"
_COLUMNS = ("approach", "method", "flops", *(
    name + end for name in ("exponent_params", "exponent_tokens", "params",
                            "tokens")
    for end in ("", "_low", "_high")), "loss")


@dataclasses.dataclass(frozen=True)
class Bias:
  """What approach 2 says of losses without noise, whose optimum is known.

  They are the fitted surface's own, at the budgets that had a minimum and the
  sizes that were tried there.
  """

  method: str  # of the isoFLOP curves
  exponent: float  # a of N* by approach 2
  true_exponent: float  # of the surface, over the same budgets
  # flops, params_error, tokens_error: approach 2 over the truth, less 1.
  table: pd.DataFrame

  def text(self) -> str:
    """One sentence to be printed beside approach 2."""
    errors = "; ".join(
        f"at {wording.power(row.flops)} FLOPs N* {row.params_error:+.1%}, D* "
        f"{row.tokens_error:+.1%}" for row in self.table.itertuples())
    return (f"known bias of approach 2 ({self.method}) on noise-free losses of "
            f"the fitted surface, at the sizes and budgets of the runs: "
            f"a {self.exponent:.4f} where it is {self.true_exponent:.4f}; "
            f"{errors} ({_SOURCE})")


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What each approach says of the same runs, or why it says nothing."""

  table: pd.DataFrame
  envelope: envelope_lib.Envelope | None
  isoflop: isoflop_lib.IsoFlop | None
  bias: Bias | None
  missing: dict[str, str]  # "1", "2", "3", "bias" -> why it is not there

  def text(self) -> str:
    """One line an approach and budget, then the bias, then what is missing."""
    lines = []
    for row in self.table.itertuples():
      said = [f"{name} {show(getattr(row, column))} ({_ends(row, column, show)}"
              ")" for name, column, show in (
                  ("a", "exponent_params", wording.decimal),
                  ("b", "exponent_tokens", wording.decimal),
                  ("N*", "params", wording.count),
                  ("D*", "tokens", wording.count))]
      lines.append(
          f"approach {row.approach} ({row.method}) at "
          f"{wording.power(row.flops)} FLOPs: {', '.join(said)}, loss "
          f"{wording.decimal(row.loss)}")
    return "\n".join([*lines, *self.caveats()])

  def caveats(self) -> list[str]:
    """The bias of approach 2, and what is missing and why."""
    bias = [self.bias.text()] if self.bias is not None else []
    return bias + [f"no {'approach ' if name.isdigit() else ''}{name}: {why}"
                   for name, why in self.missing.items()]


def compare(
    fit: result.Fit, flops: FloatArray | float, *, envelope: str = "hull",
    isoflop: str = "parabola", budget: str | None = None,
    tolerance: float = 0.1, bootstrap: int = 1000,
    given: frontier.Given | None = None,
) -> Comparison:
  """The three approaches on the runs of a fit.

  Args:
    fit: approach 3; its runs are those of approaches 1 and 2.
    flops: budgets at which N*, D* and the loss are compared.
    envelope: method of approach 1, as `envelope.fit` has them.
    isoflop: curve of approach 2, as `isoflop.fit` has them.
    budget: column of the budgets, as in `isoflop.fit`.
    tolerance: as in `isoflop.fit`.
    bootstrap: resamples of approaches 1 and 2; approach 3 has the fit's.
    given: values of further axes of the law.

  Returns:
    `table` has one row an approach and budget: approach, method, flops;
    exponent_params (a of N* ~ C^a) and exponent_tokens, params and tokens,
    each with _low and _high; and loss, the fitted surface's at that N* and
    what tokens the budget then buys, so that it shows what the difference of
    N* costs.

  Raises:
    ValueError: the law has no trade-off of N and D, its table no N and D, or
      an argument is out of range.
  """
  how = frontier.method(fit.law, given)
  budgets = frontier.positive("flops", flops)
  if fit.cost is None:
    raise ValueError("the fit's table has no params and tokens, so there is "
                     "nothing for approaches 1 and 2")
  options = dict(bootstrap=bootstrap, level=fit.level,
                 seed=fit.settings["seed"])
  parts, missing = [], {}
  envelope_found = bias_found = None
  try:
    envelope_found = envelope_lib.fit(fit.runs, method=envelope, **options)
    parts.append(_from_runs("1", envelope_found, fit, budgets, given))
  except power.NoLaw as error:
    missing["1"] = str(error)
  minima = isoflop_lib.fit(fit.runs, method=isoflop, budget=budget,
                           tolerance=tolerance, **options)
  if minima.params is None:
    missing["2"] = minima.reason
  else:
    parts.append(_from_runs("2", minima, fit, budgets, given))
  if len(fit.samples) and not fit.has_intervals:
    missing["3"] = f"the fit is {fit.status}: {fit.reason}"
  else:
    parts.append(_from_surface(fit, how, budgets, given))
    try:
      bias_found = bias(fit, minima, budgets, given)
    except power.NoLaw as error:
      missing |= {} if "2" in missing else {"bias": str(error)}
  table = (pd.concat(parts, ignore_index=True) if parts
           else pd.DataFrame(columns=_COLUMNS))
  return Comparison(table, envelope_found, minima, bias_found, missing)


def bias(fit: result.Fit, minima: isoflop_lib.IsoFlop,
         flops: FloatArray | float,
         given: frontier.Given | None = None) -> Bias:
  """Approach 2 on noise-free losses of the fitted surface, same design.

  Czech et al. 2026: a parabola is a second-order approximation, whose vertex
  is off where the grid is wide, off centre, or alpha and beta differ.

  Args:
    fit: the surface that is taken for the truth.
    minima: approach 2 on the runs, whose budgets and sizes are used.
    flops: budgets at which N* and D* are compared.
    given: values of further axes of the law.

  Raises:
    power.NoLaw: approach 2 has too few minima, there or on the runs.
    ValueError: a budget is not positive.
  """
  if minima.params is None:
    raise power.NoLaw(minima.reason)
  budgets = frontier.positive("flops", flops)
  natural = _natural(fit)
  rows = []
  for index, one in enumerate(minima.minima):
    params = np.unique(one.runs["params"])
    tokens = fit.cost.tokens(params, one.flops)
    rows.append(pd.DataFrame({
        "budget": index, "params": params, "tokens": tokens,
        "flops": one.flops, "loss": frontier.loss_at(
            fit.law, natural, fit.cost, params, tokens, given)}))
  exact = isoflop_lib.fit(pd.concat(rows), method=minima.method,
                          budget="budget", bootstrap=0)
  if exact.params is None:
    raise power.NoLaw(
        f"on noise-free losses of the fitted surface, {exact.reason}")
  tried = np.array([one.flops for one in exact.minima])
  there = frontier.optimum(fit.law, natural, fit.cost, tried, given)[0]
  params, tokens, _ = frontier.optimum(fit.law, natural, fit.cost, budgets,
                                       given)
  return Bias(
      exact.method, exact.params.exponent,
      float(np.polyfit(np.log(tried), np.log(there), 1)[0]),
      pd.DataFrame({
          "flops": budgets,
          "params_error": exact.params.predict(budgets) / params - 1,
          "tokens_error": exact.tokens.predict(budgets) / tokens - 1}))


# --- Details -----------------------------------------------------------------


def _ends(row: Any, column: str, show: Callable[[float], str]) -> str:
  low, high = (getattr(row, f"{column}_{end}") for end in ("low", "high"))
  known = wording.known(low) and wording.known(high)
  return f"{show(low)} to {show(high)}" if known else "no interval"


def _natural(fit: result.Fit) -> FloatArray:
  return np.array([fit.coefficients[name] for name in fit.law.parameters])


def _from_runs(
    approach: str, found: envelope_lib.Envelope | isoflop_lib.IsoFlop,
    fit: result.Fit, budgets: FloatArray, given: frontier.Given | None,
) -> pd.DataFrame:
  columns = {"approach": approach, "method": found.method, "flops": budgets}
  for name, law in (("params", found.params), ("tokens", found.tokens)):
    ends = law.interval or (np.nan, np.nan)
    for end, exponent, value in zip(
        ("", "_low", "_high"), (law.exponent, *ends),
        (law.predict(budgets), *law.predict_interval(budgets))):
      columns[f"exponent_{name}{end}"] = exponent
      columns[name + end] = value
  columns["loss"] = frontier.loss_at(
      fit.law, _natural(fit), fit.cost, columns["params"],
      fit.cost.tokens(columns["params"], budgets), given)
  return pd.DataFrame(columns)[list(_COLUMNS)]


def _from_surface(fit: result.Fit, how: str, budgets: FloatArray,
                  given: frontier.Given | None) -> pd.DataFrame:
  def exponents(natural: FloatArray) -> dict[str, FloatArray]:
    a, b = frontier.exponents(fit.law, natural, fit.cost, budgets, given)
    return {"exponent_params": a, "exponent_tokens": b}
  slopes = frontier.with_bands(
      exponents(_natural(fit)), exponents(fit.samples[:, None, :]), fit.level)
  optimum = frontier.table(fit.law, _natural(fit), fit.samples, fit.cost,
                           budgets, fit.level, given)
  return optimum.assign(approach="3", method=f"{fit.law.name}, {how}",
                        **slopes)[list(_COLUMNS)]
