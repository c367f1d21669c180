# SPDX-License-Identifier: Apache-2.0
"""Figures of budgets: isoFLOP curves, and where each of the three approaches
of Hoffmann et al. 2022 (arXiv:2203.15556) would spend one."""

from typing import Sequence

from matplotlib import axes as axes_lib
import numpy as np
import pandas as pd

from tfjax.scaling import approaches as approaches_lib
from tfjax.scaling import frontier
from tfjax.scaling import isoflop
from tfjax.scaling import result
from tfjax.scaling import wording
from tfjax.scaling.figures import canvas

_MOST_BUDGETS = 9  # more curves than this hide one another
_STAR = dict(marker="*", markersize=11, markeredgecolor=canvas.INK,
             markeredgewidth=0.7, linestyle="none")
_BEYOND = 10.0  # frontiers are drawn to this many times the largest run
_DRAWN = 80  # budgets
_PALE = "#d6d6d6"
# Colours of Okabe and Ito (2008), and a line and a marker each.
_ONE = dict(color="#e69f00", linestyle=canvas.DASHED, linewidth=1.5)
_TWO = dict(color="#0072b2", linestyle="-.", linewidth=1.4)
_THREE = dict(color=canvas.INK, linestyle="-", linewidth=2.6)
_ON_ENVELOPE = dict(marker="s", color="#e69f00", markersize=5.5, alpha=1.0,
                    markeredgecolor=canvas.INK, markeredgewidth=0.9)
_MINIMUM = dict(marker="D", color="#0072b2", markersize=5)


def curves(found: isoflop.IsoFlop, fit: result.Fit) -> canvas.Picture | None:
  """Loss against N at each budget, with the minimum of each curve."""
  if not found.minima:
    return None
  minima = _spread(found.minima)
  budgets = np.array([m.flops for m in minima])
  levels = canvas.Levels(budgets, np.arange(len(budgets)), "≈")
  figure, (panel,) = canvas.panels(1, 1, height=4.4)
  surface = frontier.has_optimum(fit.law)
  for k, one in enumerate(minima):
    sizes = np.geomspace(one.runs["params"].min(), one.runs["params"].max(),
                         120)
    canvas.scatter(panel, one.runs["params"], one.runs["loss"],
                   **levels.marker(k))
    panel.plot(sizes, one.curve(sizes), **levels.line(k), linewidth=1.2)
    if surface:
      panel.plot(sizes, _on_surface(fit, sizes, one.flops), linewidth=0.9,
                 color=canvas.INK, linestyle=canvas.DOTTED)
    panel.plot(one.params, one.loss, color=levels.colour(k), **_STAR,
               zorder=4)
  canvas.log_axis(panel.xaxis, "params")
  canvas.log_axis(panel.yaxis, "loss")
  keys = levels.keys("flops", True)
  keys.append(canvas.key(**_STAR, color="white", label="minimum, N*"))
  if surface:
    keys.append(canvas.key(color=canvas.INK, linestyle=canvas.DOTTED,
                           linewidth=0.9, label="fitted law"))
  panel.legend(handles=keys, loc="center left", bbox_to_anchor=(1.01, 0.5),
               handlelength=3)
  return canvas.Picture(figure, "IsoFLOP curves", _curve_words(
      found, len(minima), surface))


def approaches(frame: pd.DataFrame, fit: result.Fit,
               compared: approaches_lib.Comparison) -> canvas.Picture | None:
  """N* and D* of a budget by each of the three approaches, drawn together."""
  if not len(compared.table):
    return None
  figure, both = canvas.panels(1, 2, height=4.3)
  low, high = frame["flops"].min(), frame["flops"].max()
  budgets = np.geomspace(low, _BEYOND * high, _DRAWN)
  for panel, name in zip(both, ("params", "tokens")):
    canvas.scatter(panel, frame["flops"], frame[name], marker="o",
                   color=_PALE, zorder=1)
    _one(panel, compared, name, budgets)
    _two(panel, compared, name, budgets)
    _three(panel, compared, name, budgets, fit)
    panel.axvline(high, color=canvas.QUIET, linestyle=canvas.DOTTED,
                  linewidth=1.0)
    canvas.log_axis(panel.xaxis, "flops")
    symbol = wording.symbol(name)
    canvas.log_axis(panel.yaxis, name, "optimal "
                    f"{wording.label(name).replace(symbol, symbol + '*')}")
    panel.legend(handles=_approach_keys(compared, name), loc="upper center",
                 bbox_to_anchor=(0.48, -0.17), handlelength=4.5)
  return canvas.Picture(
      figure, "Where a budget is best spent, by three approaches",
      _approach_words(compared))


def _one(panel: axes_lib.Axes, compared: approaches_lib.Comparison, name: str,
         budgets: np.ndarray) -> None:
  found = compared.envelope
  if found is None:
    return
  canvas.scatter(panel, found.runs["flops"], found.runs[name], **_ON_ENVELOPE,
                 zorder=3)
  panel.plot(budgets, getattr(found, name).predict(budgets), **_ONE,
             zorder=4)


def _two(panel: axes_lib.Axes, compared: approaches_lib.Comparison, name: str,
         budgets: np.ndarray) -> None:
  found = compared.isoflop
  for one in found.minima if found is not None else ():
    value, spread = getattr(one, name), None
    if name == "params" and one.params_interval is not None:
      ends = one.params_interval
      spread = [[max(value - ends[0], 0)], [max(ends[1] - value, 0)]]
    panel.errorbar(one.flops, value, yerr=spread, **_MINIMUM, capsize=2,
                   elinewidth=0.9, zorder=3)
  if found is not None and found.params is not None:
    panel.plot(budgets, getattr(found, name).predict(budgets), **_TWO,
               zorder=4)


def _three(panel: axes_lib.Axes, compared: approaches_lib.Comparison,
           name: str, budgets: np.ndarray, fit: result.Fit) -> None:
  if "3" in compared.missing:
    return
  rows = fit.compute_optimal(budgets)
  panel.plot(budgets, rows[name], **_THREE, zorder=2.5)
  if fit.has_intervals:
    panel.fill_between(budgets, rows[f"{name}_low"], rows[f"{name}_high"],
                       color=canvas.INK, alpha=0.13, linewidth=0)


def _approach_keys(compared: approaches_lib.Comparison,
                   name: str) -> list[object]:
  """One entry an approach, with its exponent; approach 2 with its bias."""
  symbol, keys = f"{wording.symbol(name)}*", []
  for approach, words, style in (
      ("1", "envelope of the runs", _ONE | _ON_ENVELOPE),
      ("2", "isoFLOP minima", _TWO | _MINIMUM),
      ("3", "fitted surface", _THREE)):
    rows = compared.table[compared.table["approach"] == approach]
    if not len(rows):
      continue
    row = rows.iloc[-1]
    ends = (row[f"exponent_{name}_low"], row[f"exponent_{name}_high"])
    band = (f" ({wording.between(ends)})" if all(map(wording.known, ends))
            else "")
    label = (f"approach {approach}, {words}: {symbol} ~ "
             f"C^{row[f'exponent_{name}']:.3f}{band}")
    if approach == "2" and compared.bias is not None:
      last = compared.bias.table.iloc[-1]
      label += (f"\nits known bias: {last[f'{name}_error']:+.1%} at "
                f"{wording.power(last['flops'])} FLOPs")
    keys.append(canvas.key(**style, label=label))
  keys.append(canvas.key(marker="o", color=_PALE, linestyle="none",
                         label="runs (dotted line: the largest)"))
  return keys


def _approach_words(compared: approaches_lib.Comparison) -> str:
  text = ("How a budget C is best split between parameters and tokens: "
          "approach 1 through the runs on the envelope (squares), approach 2 "
          "through the minima of isoFLOP curves (diamonds), approach 3 the "
          "minimum of the fitted law, with its interval.")
  for row in compared.table[
      compared.table["flops"] == compared.table["flops"].max()].itertuples():
    text += (f" By approach {row.approach}, {wording.power(row.flops)} FLOPs "
             f"go to N* {wording.count(row.params)} and D* "
             f"{wording.count(row.tokens)}.")
  if compared.bias is not None:
    words = compared.bias.text()
    text += f" {words[:1].upper()}{words[1:]}."
  for name, why in compared.missing.items():
    what = f"approach {name}" if name.isdigit() else f"{name} of approach 2"
    text += f" There is no {what}: {why}."
  return text


def _spread(minima: Sequence[isoflop.Minimum]) -> list[isoflop.Minimum]:
  """Not too many, evenly over the logs of their budgets."""
  logs = np.log([m.flops for m in minima])
  places = np.linspace(logs[0], logs[-1], _MOST_BUDGETS)
  chosen = np.unique(np.abs(logs[:, None] - places).argmin(axis=0))
  return [minima[k] for k in chosen]


def _on_surface(fit: result.Fit, sizes: np.ndarray,
                flops: float) -> np.ndarray:
  natural = np.array([fit.coefficients[name] for name in fit.law.parameters])
  return frontier.loss_at(fit.law, natural, fit.cost, sizes,
                          fit.cost.tokens(sizes, flops))


def _curve_words(found: isoflop.IsoFlop, shown: int, surface: bool) -> str:
  first, last = found.minima[0], found.minima[-1]
  text = (f"Each series is one budget; its curve ({found.method}) has its "
          "minimum at the star, ")
  if first is last:
    text += f"N* {wording.count(first.params)}."
  else:
    text += (f"from N* {wording.count(first.params)} at "
             f"{wording.power(first.flops)} FLOPs to "
             f"{wording.count(last.params)} at {wording.power(last.flops)}.")
  if shown < len(found.minima):
    text += f" {shown} of the {len(found.minima)} budgets are shown."
  if surface:
    text += " Dotted: the fitted law at the same budgets."
  tried = [r for r in found.refused if r.sizes >= isoflop.METHODS[found.method]]
  if tried:
    text += (f" {len(tried)} more budgets have no minimum between sizes that "
             "were tried, and none is made up for them.")
  return text
