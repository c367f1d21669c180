# SPDX-License-Identifier: Apache-2.0
"""Figures of how far runs lie from a fitted law, seen and unseen."""

import math
from typing import Any, Sequence

from matplotlib import axes as axes_lib
import numpy as np
import pandas as pd
from scipy import stats

from tfjax.scaling import result
from tfjax.scaling import wording
from tfjax.scaling.figures import canvas
from tfjax.scaling.figures import law as figures_law

_LEAST_FOR_TREND = 24
_NORMAL_MAD = stats.norm.ppf(0.75)  # median |x| of a standard normal
_FITTED = dict(color=canvas.MAIN, marker="o")
_HELD = dict(color=canvas.ALARM, marker="D", markersize=5.5, alpha=1.0,
             markerfacecolor="white", markeredgewidth=1.3)
_LEFT_OUT = dict(color=canvas.INK, marker="^", markersize=6, alpha=1.0,
                 markerfacecolor="white", markeredgewidth=1.2)


def prediction(fit: result.Fit) -> canvas.Picture:
  """Predicted against measured, and the error by compute."""
  rows, target = _with_errors(fit), fit.law.target
  figure, (left, right) = canvas.panels(1, 2)
  x = "flops" if rows["flops"].notna().all() else fit.law.axes[0]
  fitted = rows[~rows["held_out"]]
  canvas.scatter(left, fitted[target], fitted["predicted"], **_FITTED)
  canvas.scatter(right, fitted[x], fitted["error"], **_FITTED)
  keys = [canvas.key(**_FITTED, linestyle="none", label="fitted runs")]
  if fit.holdout:
    keys.append(_unseen(left, right, fit, fit.holdout, x, _HELD, "held-out"))
  if fit.extrapolation and not fit.holdout:
    keys.append(_unseen(left, right, fit, fit.extrapolation, x, _LEFT_OUT,
                        "largest runs, left out once"))
  seen = [*rows[target], *rows["predicted"],
          *(h.predicted for h in fit.extrapolation)]
  low, high = min(seen), max(seen)
  ends = ((low * 0.985, high * 1.015) if fit.settings["space"] == "log" else
          (low - 0.03 * (high - low), high + 0.03 * (high - low)))
  left.plot(ends, ends, color=canvas.QUIET, linewidth=1, zorder=0)
  right.axhline(0, color=canvas.QUIET, linewidth=1, zorder=0)
  canvas.target_axis(left.xaxis, target, fit.settings["space"], "measured")
  canvas.target_axis(left.yaxis, target, fit.settings["space"], "predicted")
  canvas.log_axis(right.xaxis, x)
  right.set_ylabel(f"predicted above measured ({_unit(fit)})")
  canvas.legend_below(figure, keys)
  return canvas.Picture(figure, "Predicted against measured", (
      "Left: the diagonal is a perfect prediction. Right: the same as error, "
      f"by {wording.label(x)}. {_fitted_words(fit, fitted)}"
      f"{_unseen_words(fit)}"))


def residuals(fit: result.Fit) -> canvas.Picture:
  """Errors against the prediction, every axis and compute, and a normal."""
  rows = _with_errors(fit)
  names = list(dict.fromkeys(
      name for name in ("predicted", *fit.law.axes, "flops")
      if rows[name].notna().all()))
  columns = 2 if len(names) in (1, 3) else 3
  figure, all_panels = canvas.panels(
      math.ceil((len(names) + 1) / columns), columns, height=2.75)
  for panel, name in zip(all_panels, names):
    _against(panel, fit, rows, name)
  fitted = rows["residual"][~rows["held_out"]].to_numpy()
  beyond = _quantiles(all_panels[len(names)], fit, fitted)
  for panel in all_panels[len(names) + 1:]:
    panel.remove()
  keys = [canvas.key(**_FITTED, linestyle="none", label="fitted runs")]
  if fit.holdout:
    keys.append(canvas.key(**_HELD, linestyle="none", label="held-out runs"))
  keys += [line for line in all_panels[0].lines
           if line.get_label() == "running median"]
  keys += [line for line in all_panels[len(names)].lines
           if not line.get_label().startswith("_")]
  canvas.legend_below(figure, keys)
  return canvas.Picture(figure, "Residuals", (
      f"How far each run lies above the law, against the prediction and each "
      f"axis: a law that fits leaves no slope and no bend. "
      f"Half of the fitted runs lie within "
      f"{_amount(fit, np.median(np.abs(fitted)))}, the worst is "
      f"{_amount(fit, np.abs(fitted).max())} off. Last panel: the same in "
      f"order, against a normal distribution of the same median and median "
      f"absolute deviation; {beyond} of {len(fitted)} lie beyond three of its "
      f"standard deviations, where a normal has {0.0027 * len(fitted):.1f}."))


# --- Details -----------------------------------------------------------------


def _with_errors(fit: result.Fit) -> pd.DataFrame:
  """Runs with predicted, error (predicted above measured) and residual (the
  opposite, in logs or the target's unit)."""
  rows = figures_law.rows_of(fit)
  predicted = fit.predict(**{axis: rows[axis].to_numpy()
                             for axis in fit.law.axes})
  measured = rows[fit.law.target].to_numpy()
  if fit.settings["space"] == "log":
    residual = 100 * (np.log(measured) - np.log(predicted))
    error = 100 * (predicted / measured - 1)
  else:
    residual, error = measured - predicted, predicted - measured
  return rows.assign(predicted=predicted, residual=residual, error=error)


def _unseen(left: axes_lib.Axes, right: axes_lib.Axes, fit: result.Fit,
            runs: Sequence[result.HeldOut], x: str, style: dict[str, Any],
            label: str) -> Any:
  """Runs that a fit had not seen, with their intervals; their key."""
  bars = dict(capsize=3, elinewidth=1, linestyle="none") | style
  scale = np.array([100 / h.measured if fit.settings["space"] == "log" else 1.0
                    for h in runs])
  measured = np.array([h.measured for h in runs])
  predicted = np.array([h.predicted for h in runs])
  ends = np.array([h.interval or (h.predicted, h.predicted) for h in runs]).T
  # A percentile interval need not hold the estimate.
  spread = np.maximum([predicted - ends[0], ends[1] - predicted], 0)
  at = [h.axes.get(x, h.flops) for h in runs]
  left.errorbar(measured, predicted, yerr=spread, **bars)
  right.errorbar(at, (predicted - measured) * scale, yerr=spread * scale,
                 **bars)
  has_bars = any(h.interval for h in runs)
  return canvas.key(**style, linestyle="none", label=label + (
      f", {fit.level:.0%} interval" if has_bars else ""))


def _against(panel: axes_lib.Axes, fit: result.Fit, rows: pd.DataFrame,
             name: str) -> None:
  held = rows["held_out"]
  canvas.scatter(panel, rows[name][~held], rows["residual"][~held],
                 **_FITTED)
  if held.any():
    canvas.scatter(panel, rows[name][held], rows["residual"][held], **_HELD)
  panel.axhline(0, color=canvas.QUIET, linewidth=1, zorder=0)
  fitted = rows[~held].sort_values(name)
  if len(fitted) >= _LEAST_FOR_TREND:
    part = np.arange(len(fitted)) * min(9, len(fitted) // 8) // len(fitted)
    middle = fitted[[name, "residual"]].groupby(part).median()
    panel.plot(middle[name], middle["residual"],
               color=canvas.INK, marker="s", markersize=3.2, linewidth=1.3,
               linestyle=canvas.DASHED, label="running median")
  if name == "predicted":
    canvas.target_axis(panel.xaxis, fit.law.target, fit.settings["space"],
                       "predicted")
  else:
    canvas.log_axis(panel.xaxis, name)
  panel.set_ylabel(f"measured above law ({_unit(fit)})")


def _quantiles(panel: axes_lib.Axes, fit: result.Fit,
               residual: np.ndarray) -> int:
  """Residuals in order against a normal's; how many are beyond three sigma."""
  ordered = np.sort(residual)
  normal = stats.norm.ppf((np.arange(len(ordered)) + 0.5) / len(ordered))
  middle = np.median(ordered)
  sigma = np.median(np.abs(ordered - middle)) / _NORMAL_MAD
  canvas.scatter(panel, normal, ordered, **_FITTED)
  ends = normal[[0, -1]]
  panel.plot(ends, middle + sigma * ends, color=canvas.INK, linewidth=1.2,
             label=f"normal, σ {_amount(fit, sigma)}")
  panel.set_xlabel("normal quantile (standard deviations)")
  panel.set_ylabel(f"measured above law ({_unit(fit)})")
  return int((np.abs(ordered - middle) > 3 * sigma).sum())


def _unit(fit: result.Fit) -> str:
  if fit.settings["space"] == "log":
    return "%"
  return "nats / token" if fit.law.target == "loss" else (
      f"of {fit.law.target.replace('_', ' ')}")


def _amount(fit: result.Fit, value: float) -> str:
  if fit.settings["space"] == "log":
    return f"{value:.2g}%"
  return f"{value:.2g} {'nats a token' if fit.law.target == 'loss' else ''}"


def _fitted_words(fit: result.Fit, fitted: pd.DataFrame) -> str:
  size = np.median(np.abs(fitted["error"]))
  return (f"Half of the {len(fitted)} fitted runs are predicted to within "
          f"{_amount(fit, size)}.")


def _unseen_words(fit: result.Fit) -> str:
  text = ""
  if fit.holdout:
    text += (f" The {len(fit.holdout)} held-out runs played no part in the "
             f"fit; the worst is {wording.worst(fit.holdout)} off.")
  elif fit.extrapolation:
    text += (" Triangles are the largest runs as a fit of the smaller ones "
             f"predicts them; the worst is {wording.worst(fit.extrapolation)} "
             "off.")
  return text
