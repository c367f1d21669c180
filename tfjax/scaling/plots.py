# SPDX-License-Identifier: Apache-2.0
"""Figures of runs and fits, one function each; `draw` makes all of them.

Readable in black and white: sizes differ by marker as well as by colour. The
figures are made without pyplot, so that no global state is touched.
"""

import math
from typing import Callable, Mapping, Sequence

import matplotlib
from matplotlib import axes as axes_lib
from matplotlib import axis as axis_lib
from matplotlib import figure as figure_lib
from matplotlib import ticker
import numpy as np
import pandas as pd

from tfjax.scaling import frontier
from tfjax.scaling import result
from tfjax.scaling import wording

STYLE = {
    "font.size": 9.5, "axes.titlesize": 10, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#888888", "axes.labelcolor": "#222222",
    "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.7,
    "axes.axisbelow": True, "xtick.color": "#444444",
    "ytick.color": "#444444", "legend.frameon": False,
    "legend.fontsize": 8.5, "lines.linewidth": 1.4, "lines.markersize": 5,
    "svg.fonttype": "path", "svg.hashsalt": "tfjax",
}
_MARKERS = "osD^vP*X<>"
_INK, _QUIET, _ALARM = "#222222", "#8a8a8a", "#c0392b"
_MOST_LEVELS = 8
_SAME_LEVEL = 1.05  # sizes within 5% share a colour
_CURVE_POINTS = 120
_BEYOND = 10.0  # the frontier is drawn to this many times the largest run

_LOSS = "held-out loss (nats / token)"
_PARAMS, _TOKENS = "parameters N", "training tokens D"
_FLOPS = "training compute C (FLOPs)"


def draw(
    frame: pd.DataFrame,
    curves: Mapping[str, pd.DataFrame],
    fit: result.Fit | None,
    entropy_rate: float | None = None,
) -> dict[str, figure_lib.Figure]:
  """Every figure that the data allow, by name.

  Args:
    frame: complete runs: run, params, tokens, loss, flops.
    curves: metrics rows by run.
    fit: None where there is none; then only curves and points are drawn.
    entropy_rate: the known irreducible loss (nats a token), if any.
  """
  if not len(frame):
    return {}
  with matplotlib.rc_context(STYLE):
    figures = {"curves": _curves(frame, curves),
               "size": _against_size(frame, fit),
               "compute": _against_compute(frame, fit, entropy_rate)}
    if fit is not None:
      figures["prediction"] = _prediction(fit)
      if frontier.has_optimum(fit.law) and fit.has_intervals:
        figures["optimal"] = _optimal(frame, fit)
    figures = {name: figure for name, figure in figures.items()
               if figure is not None}
    for figure in figures.values():
      figure.draw_without_rendering()
      figure.set_layout_engine("none")  # Laid out once, not for each format.
  return figures


def save(figure: figure_lib.Figure, path: str, **options: object) -> None:
  """Writes a figure in the format of the path's ending."""
  with matplotlib.rc_context(STYLE):
    figure.savefig(path, **options)


# --- Figures -----------------------------------------------------------------


def _curves(frame: pd.DataFrame,
            curves: Mapping[str, pd.DataFrame]) -> figure_lib.Figure | None:
  """Training loss, averaged over windows, against tokens and FLOPs."""
  levels, index, near = _levels(frame["params"])
  figure, (left, right) = _panels(2)
  drawn, lowest, highest = False, math.inf, -math.inf
  for row, level in zip(frame.itertuples(), index):
    rows = curves[row.run]
    rows = rows[(rows["kind"] == "train") & np.isfinite(rows["loss"])]
    rows = rows[(rows["tokens"] > 0) & (rows["flops"] > 0)]
    if not len(rows):
      continue
    mean, drawn = _windowed(rows), True
    style = dict(color=_colour(level, levels), linewidth=1, alpha=0.85)
    for panel, name in ((left, "tokens"), (right, "flops")):
      panel.plot(mean[name], mean["loss"], **style)
      panel.plot(getattr(row, name), row.loss, linestyle="none",
                 **_marker(level, levels))
    highest = max(highest, float(mean["loss"].iloc[0]))
    lowest = min(lowest, row.loss, float(mean["loss"].min()))
  if not drawn:
    return None
  for panel in (left, right):
    _loss_axis(panel, "training loss (nats / token)", lowest, highest)
  _scaled(left, "tokens seen", wording.count)
  _scaled(right, "training compute so far (FLOPs)", None)
  _legend(figure, _keys(left, levels, f"N {near}"))
  return figure


def _against_size(frame: pd.DataFrame,
                  fit: result.Fit | None) -> figure_lib.Figure:
  """Loss against N, one series a D, and against D, one series an N."""
  figure, panels = _panels(2, height=4.1)
  for panel, (x, other, label, letter, cmap) in zip(panels, (
      ("params", "tokens", _PARAMS, "D", "cividis"),
      ("tokens", "params", _TOKENS, "N", "viridis"))):
    levels, index, near = _levels(frame[other])
    for level, value in enumerate(levels):
      rows = frame[index == level]
      if fit is not None:
        xs = _stretch(frame[x])
        pair = {x: xs, other: np.full_like(xs, value)}
        colour = _colour(level, levels, cmap)
        panel.plot(xs, fit.predict(**pair), color=colour, linewidth=1.1)
        panel.fill_between(xs, *fit.predict_interval(**pair), color=colour,
                           alpha=0.13, linewidth=0)
      _points(panel, rows, x, "loss", level, levels, cmap, fit)
    _scaled(panel, label, wording.count)
    _loss_axis(panel, _LOSS)
    panel.legend(handles=_keys(panel, levels, f"{letter} {near}", cmap),
                 ncols=5 if len(levels) == 5 else 4, loc="upper center",
                 bbox_to_anchor=(0.48, -0.17), columnspacing=0.9,
                 handlelength=1.2, handletextpad=0.2)
  return figure


def _against_compute(frame: pd.DataFrame, fit: result.Fit | None,
                     entropy_rate: float | None) -> figure_lib.Figure:
  """Loss against FLOPs with the envelope of runs and the fitted frontier."""
  figure, (panel,) = _panels(1)
  levels, index, near = _levels(frame["params"])
  best = frame.iloc[frontier.envelope(frame["flops"].to_numpy(),
                                      frame["loss"].to_numpy())]
  keys = [panel.plot(best["flops"], best["loss"], color=_QUIET,
                     linestyle=(0, (4, 2)), linewidth=1.2,
                     label="envelope of the runs")[0]]
  if fit is not None and frontier.has_optimum(fit.law) and fit.has_intervals:
    rows = fit.compute_optimal(_budgets(frame))
    budgets = rows["flops"]
    inside = ~rows["extrapolated"]
    keys += panel.plot(budgets[inside], rows["loss"][inside], color=_INK,
                       label="fitted frontier")
    keys += panel.plot(budgets[~inside], rows["loss"][~inside], color=_INK,
                       linestyle=":", label="extrapolated")
    keys.append(panel.fill_between(
        budgets, rows["loss_low"], rows["loss_high"], color=_INK, alpha=0.12,
        linewidth=0, label=f"{fit.level:.0%} interval"))
  if entropy_rate is not None:
    keys.append(panel.axhline(
        entropy_rate, color=_ALARM, linestyle="-.", linewidth=1.1,
        label=f"entropy rate of the source, {entropy_rate:.3f}"))
  for level in range(len(levels)):
    _points(panel, frame[index == level], "flops", "loss", level, levels,
            "viridis", fit)
  _scaled(panel, _FLOPS, None)
  _loss_axis(panel, _LOSS)
  keys += _keys(panel, levels, f"N {near}")
  panel.legend(handles=keys, loc="center left", bbox_to_anchor=(1.01, 0.5))
  return figure


def _prediction(fit: result.Fit) -> figure_lib.Figure:
  """Predicted against measured loss, and the relative error by compute."""
  figure, (left, right) = _panels(2)
  runs = fit.runs.assign(predicted=fit.predict(fit.runs["params"],
                                               fit.runs["tokens"]))
  runs["error"] = 100 * (runs["predicted"] / runs["loss"] - 1)
  fitted = dict(color="#31688e", marker="o", linestyle="none", alpha=0.85,
                label="fitted runs")
  held = dict(color=_ALARM, marker="D", linestyle="none", fillstyle="none",
              markersize=6, capsize=3, elinewidth=1,
              label=f"held-out runs, {fit.level:.0%} interval")
  left.plot(runs["loss"], runs["predicted"], **fitted)
  right.plot(runs["flops"], runs["error"], **fitted)
  for position, run in enumerate(fit.holdout):
    style = held if not position else held | {"label": None}
    low, high = run.interval or (run.predicted, run.predicted)
    spread = np.array([[run.predicted - low], [high - run.predicted]])
    # A percentile interval need not hold the estimate.
    spread = np.maximum(spread, 0)
    left.errorbar(run.measured, run.predicted, yerr=spread, **style)
    right.errorbar(run.flops, 100 * run.relative_error,
                   yerr=100 * spread / run.measured, **style)
  losses = [*runs["loss"], *runs["predicted"],
            *(h.measured for h in fit.holdout)]
  ends = np.array([min(losses) * 0.985, max(losses) * 1.015])
  left.plot(ends, ends, color=_QUIET, linewidth=1, zorder=0)
  right.axhline(0, color=_QUIET, linewidth=1, zorder=0)
  _loss_axis(left, "predicted loss (nats / token)")
  left.set_xscale("log")
  _plain(left.xaxis)
  left.set_xlabel("measured loss (nats / token)")
  right.set_ylabel("predicted above measured (%)")
  _scaled(right, _FLOPS, None)
  _legend(figure, left.get_legend_handles_labels()[0])
  return figure


def _optimal(frame: pd.DataFrame, fit: result.Fit) -> figure_lib.Figure:
  """N* and D* against the budget, with the runs on the envelope."""
  figure, panels = _panels(2)
  rows = fit.compute_optimal(_budgets(frame))
  budgets = rows["flops"]
  best = frame.iloc[frontier.envelope(frame["flops"].to_numpy(),
                                      frame["loss"].to_numpy())]
  for panel, name, label in ((panels[0], "params", "optimal parameters N*"),
                             (panels[1], "tokens", "optimal tokens D*")):
    inside = ~rows["extrapolated"]
    panel.fill_between(budgets, rows[f"{name}_low"], rows[f"{name}_high"],
                       color=_INK, alpha=0.12, linewidth=0,
                       label=f"{fit.level:.0%} interval")
    panel.plot(budgets[inside], rows[name][inside], color=_INK,
               label="fitted frontier")
    panel.plot(budgets[~inside], rows[name][~inside], color=_INK,
               linestyle=":", label="extrapolated")
    panel.plot(frame["flops"], frame[name], marker="o", linestyle="none",
               color="#c8c8c8", markersize=4, zorder=1, label="runs")
    panel.plot(best["flops"], best[name], marker="D", linestyle="none",
               color="#31688e", markersize=5,
               label="runs on the envelope")
    _scaled(panel, _FLOPS, None)
    panel.set_ylabel(label)
    panel.set_yscale("log")
    shown = np.r_[rows[name], frame[name]]
    panel.set_ylim(shown.min() / 3, shown.max() * 3)
    _decades(panel.yaxis, panel.get_ylim(), wording.count)
  _legend(figure, panels[0].get_legend_handles_labels()[0])
  return figure


# --- Parts -------------------------------------------------------------------


def _panels(count: int, height: float = 3.7
            ) -> tuple[figure_lib.Figure, Sequence[axes_lib.Axes]]:
  width = 9.2 if count == 2 else 7.6
  figure = figure_lib.Figure((width, height), layout="constrained", dpi=150)
  figure.get_layout_engine().set(w_pad=0.08, wspace=0.05)
  return figure, figure.subplots(1, count, squeeze=False)[0]


def _levels(values: pd.Series) -> tuple[np.ndarray, np.ndarray, str]:
  """At most a handful of values, which of them each row is nearest to, and
  whether the rows are (=) or only lie near (≈) them."""
  ordered = np.sort(values.to_numpy(np.float64))
  starts = np.r_[True, ordered[1:] > _SAME_LEVEL * ordered[:-1]]
  levels = np.array([np.median(part) for part in np.split(
      ordered, np.flatnonzero(starts)[1:])])
  if len(levels) > _MOST_LEVELS:
    levels = np.geomspace(levels[0], levels[-1], 6)
  distance = np.abs(np.log(values.to_numpy(np.float64))[:, None]
                    - np.log(levels))
  exact = np.isin(ordered, levels).all()
  return levels, distance.argmin(axis=1), "=" if exact else "≈"


def _colour(level: int, levels: np.ndarray, cmap: str = "viridis") -> tuple:
  # The palest tenth of the map is lost on white.
  place = level / max(len(levels) - 1, 1)
  return matplotlib.colormaps[cmap](0.9 * place)


def _marker(level: int, levels: np.ndarray, cmap: str = "viridis") -> dict:
  return dict(marker=_MARKERS[level % len(_MARKERS)],
              color=_colour(level, levels, cmap))


def _points(panel: axes_lib.Axes, rows: pd.DataFrame, x: str, y: str,
            level: int, levels: np.ndarray, cmap: str,
            fit: result.Fit | None) -> None:
  """Runs as markers, hollow where they were held out of the fit."""
  held = {run.run for run in fit.holdout} if fit is not None else set()
  hollow = rows["run"].isin(held)
  style = _marker(level, levels, cmap) | {"linestyle": "none"}
  panel.plot(rows[x][~hollow], rows[y][~hollow], **style)
  panel.plot(rows[x][hollow], rows[y][hollow], **style,
             markerfacecolor="white", markeredgewidth=1.3)


def _keys(panel: axes_lib.Axes, levels: np.ndarray, prefix: str,
          cmap: str = "viridis") -> list:
  return [panel.plot([], [], linestyle="none", **_marker(k, levels, cmap),
                     label=f"{prefix} {wording.count(value)}")[0]
          for k, value in enumerate(levels)]


def _legend(figure: figure_lib.Figure, handles: Sequence) -> None:
  figure.legend(handles=handles, loc="outside lower center",
                ncols=min(len(handles), 6), columnspacing=1.6,
                handletextpad=0.5)


def _stretch(values: pd.Series) -> np.ndarray:
  low, high = values.min(), values.max()
  return np.geomspace(low / 1.15, high * 1.15, 100)


def _budgets(frame: pd.DataFrame) -> np.ndarray:
  low, high = frame["flops"].min(), frame["flops"].max()
  return np.geomspace(low, _BEYOND * high, 120)


def _windowed(rows: pd.DataFrame) -> pd.DataFrame:
  """Means over windows of equal length in log tokens."""
  logs = np.log(rows["tokens"].to_numpy())
  width = max(np.ptp(logs) / _CURVE_POINTS, 1e-12)
  window = np.floor((logs - logs.min()) / width)
  return rows[["tokens", "flops", "loss"]].groupby(window).mean()


def _scaled(panel: axes_lib.Axes, label: str,
            text: Callable[[float], str] | None) -> None:
  panel.set_xscale("log")
  panel.set_xlabel(label)
  _decades(panel.xaxis, panel.get_xlim(), text)


def _decades(axis: axis_lib.Axis, limits: tuple[float, float],
             text: Callable[[float], str] | None) -> None:
  """Few labels on a log axis: decades, or 1, 2, 5 where there are few."""
  decades = math.log10(limits[1] / limits[0])
  subs = (1, 2, 5) if decades < 1.8 else (1, 3) if decades < 2.6 else (1,)
  axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=12))
  axis.set_minor_locator(ticker.NullLocator())
  axis.set_major_formatter(ticker.FuncFormatter(
      lambda value, _: text(value) if text else _scientific(value)))


def _scientific(value: float) -> str:
  exponent = math.floor(math.log10(value) + 1e-9)
  mantissa = round(value / 10.0**exponent)
  head = "" if mantissa == 1 else rf"{mantissa}{{\times}}"
  return rf"${head}10^{{{exponent}}}$"


def _loss_axis(panel: axes_lib.Axes, label: str, low: float | None = None,
               high: float | None = None) -> None:
  panel.set_yscale("log")
  if low is not None and high is not None:
    panel.set_ylim(low / 1.03, high * 1.03)
  _plain(panel.yaxis)
  panel.set_ylabel(label)


def _plain(axis: axis_lib.Axis) -> None:
  """Round decimals on a log axis, as losses span much less than a decade."""
  axis.set_major_locator(ticker.MaxNLocator(9, steps=[1, 2, 5, 10]))
  axis.set_minor_locator(ticker.NullLocator())
  axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
