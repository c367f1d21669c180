# SPDX-License-Identifier: Apache-2.0
"""A fitted law against its axes, one panel each.

The law as a surface is in `figures_surface`, how far runs lie from it in
`figures_residuals`, what it says of budgets in `figures_frontier`.
"""

import math

from matplotlib import axes as axes_lib
import numpy as np
import pandas as pd

from tfjax.scaling import result
from tfjax.scaling import wording
from tfjax.scaling.figures import canvas

_BEYOND = 10.0  # a law of one axis is drawn to this many times the largest


def against_axes(fit: result.Fit) -> canvas.Picture:
  """The target against each axis of the law, with the fitted law's band."""
  names = fit.law.axes
  if len(names) == 1:
    return _one_axis(fit)
  if len(names) == 2:
    return _two_axes(fit)
  return _many_axes(fit)


def rows_of(fit: result.Fit) -> pd.DataFrame:
  """Fitted and held-out runs: run, axes, target, flops, held_out."""
  names = list(dict.fromkeys(
      ["run", *fit.law.axes, fit.law.target, "flops"]))
  fitted = fit.runs[names].assign(held_out=False)
  held = pd.DataFrame([
      h.axes
      | {"run": h.run, fit.law.target: h.measured, "flops": h.flops,
         "held_out": True} for h in fit.holdout],
      columns=[*names, "held_out"]).dropna(subset=list(fit.law.axes))
  return pd.concat([fitted, held], ignore_index=True) if len(held) else fitted


# --- Details -----------------------------------------------------------------


def _points(panel: axes_lib.Axes, rows: pd.DataFrame, x: str, y: str,
            style: dict[str, object]) -> None:
  """Runs as markers, hollow where they were held out of the fit."""
  fitted, held = rows[~rows["held_out"]], rows[rows["held_out"]]
  canvas.scatter(panel, fitted[x], fitted[y], **style)
  canvas.scatter(panel, held[x], held[y], **style | {
      "markerfacecolor": "white", "markeredgewidth": 1.3, "zorder": 3})


def _line_and_band(panel: axes_lib.Axes, fit: result.Fit, x: str,
                   at: dict[str, np.ndarray], style: dict[str, object],
                   alpha: float) -> None:
  panel.plot(at[x], fit.predict(**at), linewidth=1.1, **style)
  if fit.has_intervals:
    panel.fill_between(at[x], *fit.predict_interval(**at), alpha=alpha,
                       color=style["color"], linewidth=0)


def _one_axis(fit: result.Fit) -> canvas.Picture:
  (x,), y, rows = fit.law.axes, fit.law.target, rows_of(fit)
  figure, (panel,) = canvas.panels(1, 1, height=4.0)
  beyond = _BEYOND if x in ("params", "tokens", "flops", "steps") else 1.15
  xs = canvas.stretch(rows[x], beyond)
  for part, line, label in (
      (xs <= rows[x].max(), "-", "fitted law"),
      (xs >= rows[x].max(), canvas.DOTTED, "beyond the runs")):
    if part.sum() > 1:
      panel.plot(xs[part], fit.predict(**{x: xs[part]}), color=canvas.INK,
                 linestyle=line, label=label)
  if fit.has_intervals:
    panel.fill_between(xs, *fit.predict_interval(**{x: xs}), color=canvas.INK,
                       alpha=0.15, linewidth=0,
                       label=f"{fit.level:.0%} interval of the law")
  for constant in fit.law.constants:
    if fit.determined[constant]:
      panel.axhline(fit.coefficients[constant], color=canvas.QUIET,
                    linestyle=canvas.DASHED, linewidth=1.0,
                    label=f"{constant} {fit.coefficients[constant]:.3g}")
  _points(panel, rows, x, y, dict(color=canvas.MAIN, marker="o"))
  handles = [*panel.get_legend_handles_labels()[0],
             canvas.key(color=canvas.MAIN, marker="o", linestyle="none",
                        label="runs")]
  canvas.log_axis(panel.xaxis, x)
  canvas.target_axis(panel.yaxis, y, fit.settings["space"])
  canvas.legend_below(figure, handles)
  return canvas.Picture(figure, _axes_title(fit), (
      f"Markers are runs{_hollow(rows)}; the line is the fitted law. "
      f"{_exponents(fit)}"))


def _two_axes(fit: result.Fit) -> canvas.Picture:
  rows, y, exact = rows_of(fit), fit.law.target, True
  figure, both = canvas.panels(1, 2, height=4.1)
  for panel, x, other, cmap in zip(
      both, fit.law.axes, fit.law.axes[::-1], ("cividis", "viridis")):
    levels = canvas.Levels.of(rows[other], cmap)
    moved = _moved(fit, rows, {other: levels.values[levels.index]})
    exact &= levels.sign == "="
    for level, value in enumerate(levels.values):
      there = levels.index == level
      xs = canvas.stretch(rows[x][there], 1.3)
      _line_and_band(panel, fit, x, {x: xs, other: np.full_like(xs, value)},
                     levels.line(level), 0.13)
      _points(panel, moved[there], x, y, levels.marker(level))
    canvas.log_axis(panel.xaxis, x)
    canvas.target_axis(panel.yaxis, y, fit.settings["space"])
    canvas.legend_under(panel, levels.keys(other, True))
  band = (f", shaded its {fit.level:.0%} interval over the bootstrap"
          if fit.has_intervals else "")
  near = "" if exact else (
      " A run whose value differs from its series' is drawn as far from the "
      "line as it lies from the law at its own value.")
  return canvas.Picture(figure, _axes_title(fit), (
      f"Each series holds the other axis at the value in the key. Lines are "
      f"the fitted law{band}; markers are runs{_hollow(rows)}.{near} "
      f"{_exponents(fit)}"))


def _many_axes(fit: result.Fit) -> canvas.Picture:
  """One panel an axis, every run moved along the law to the others' middle."""
  rows, y = rows_of(fit), fit.law.target
  columns = 2 if len(fit.law.axes) in (2, 4) else 3
  figure, all_panels = canvas.panels(
      math.ceil(len(fit.law.axes) / columns), columns, height=3.3)
  middle = {axis: float(np.exp(np.log(rows[axis]).mean()))
            for axis in fit.law.axes}
  for panel, x in zip(all_panels, fit.law.axes):
    xs = canvas.stretch(rows[x])
    at = {axis: np.full_like(xs, value) for axis, value in middle.items()}
    _line_and_band(panel, fit, x, at | {x: xs}, dict(color=canvas.INK), 0.15)
    moved = _moved(fit, rows, {
        axis: np.full(len(rows), value) for axis, value in middle.items()
        if axis != x})
    _points(panel, moved, x, y, dict(color=canvas.MAIN, marker="o"))
    canvas.log_axis(panel.xaxis, x)
    canvas.target_axis(panel.yaxis, y, fit.settings["space"])
  for panel in all_panels[len(fit.law.axes):]:
    panel.remove()
  at = ", ".join(f"{wording.symbol(axis)} {wording.amount(axis, value)}"
                 for axis, value in middle.items())
  return canvas.Picture(figure, _axes_title(fit), (
      "Partial view: in each panel one axis varies and the others are at the "
      f"runs' geometric means ({at}). The line is the fitted law, and every "
      f"run is as far from it as from the law at its own values"
      f"{_hollow(rows)}. {_exponents(fit)}"))


def _moved(fit: result.Fit, rows: pd.DataFrame,
           to: dict[str, np.ndarray]) -> pd.DataFrame:
  """Runs moved along the law to other values of some axes, residuals kept."""
  own = {axis: rows[axis].to_numpy() for axis in fit.law.axes}
  before, after = fit.predict(**own), fit.predict(**own | to)
  measured = rows[fit.law.target].to_numpy()
  return rows.assign(**{fit.law.target: (
      measured * after / before if fit.settings["space"] == "log"
      else measured + after - before)})


def _axes_title(fit: result.Fit) -> str:
  words = {"params": "model size", "tokens": "data", "flops": "compute"}
  names = [words.get(axis, axis.replace("_", " ")) for axis in fit.law.axes]
  target = fit.law.target.replace("_", " ").capitalize()
  return f"{target} against {wording.listed(names)}"


def _hollow(rows: pd.DataFrame) -> str:
  held = int(rows["held_out"].sum())
  return f" (hollow: the {held} held out of the fit)" if held else ""


def _exponents(fit: result.Fit) -> str:
  names = fit.law.exponents + fit.law.constants
  return "Fitted: " + ", ".join(
      f"{name} {wording.parameter(fit, name)}" for name in names) + "."
