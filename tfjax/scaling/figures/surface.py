# SPDX-License-Identifier: Apache-2.0
"""A fitted law of two axes as contours, with the runs and the frontier."""

import math

from matplotlib import axes as axes_lib
from matplotlib import colors
from matplotlib import lines
from matplotlib import patheffects
import numpy as np
import pandas as pd

from tfjax.scaling import result
from tfjax.scaling import wording
from tfjax.scaling.figures import canvas
from tfjax.scaling.figures import law as figures_law
from tfjax.scaling.figures import runs as figures_runs

_GRID = 90  # points of a surface, each way
_CONTOURS = 13
_HALO = [patheffects.withStroke(linewidth=2.4, foreground="white")]


def surface(fit: result.Fit) -> canvas.Picture | None:
  """The law of two axes as contours, with the runs and the frontier."""
  if len(fit.law.axes) != 2:
    return None
  has_frontier = figures_runs.has_frontier(fit)
  x, y = ("params", "tokens") if has_frontier else fit.law.axes
  rows = figures_law.rows_of(fit)
  figure, (panel,) = canvas.panels(1, 1, height=5.2)
  xs, ys = _reach(rows[x]), _reach(rows[y])
  panel.set(xscale="log", yscale="log", xlim=(xs[0], xs[-1]),
            ylim=(ys[0], ys[-1]))  # Labels are placed by what is shown.
  grid_x, grid_y = np.meshgrid(xs, ys)
  values = fit.predict(**{x: grid_x, y: grid_y})
  levels = _contour_levels(values, fit.settings["space"])
  filled = panel.contourf(xs, ys, values, levels=levels, cmap="cividis_r",
                          norm=_norm(levels), alpha=0.55, extend="both")
  filled.set_rasterized(True)
  drawn = panel.contour(xs, ys, values, levels=levels, colors=canvas.INK,
                        linewidths=0.7)
  digits = max(2, 1 - math.floor(math.log10(np.ptp(levels))))
  panel.clabel(drawn, fmt=f"%.{digits}f", fontsize=7.5, inline_spacing=3,
               manual=_label_places(xs, ys, values, levels))
  keys = [canvas.key(color=canvas.INK, linewidth=0.7,
                       label=f"fitted {wording.label(fit.law.target)}")]
  keys += _surface_runs(panel, fit, rows, x, y)
  sentence = ""
  if has_frontier:
    keys += _surface_frontier(panel, fit, xs, ys)
    sentence = (" The heavy line is the frontier: the size and the data that "
                "a budget is best spent on, dotted beyond the fitted runs; "
                "thin dashed lines join points of equal compute.")
  canvas.log_axis(panel.xaxis, x)
  canvas.log_axis(panel.yaxis, y)
  panel.grid(False)
  canvas.legend_below(figure, keys)
  return canvas.Picture(figure, "The fitted surface", (
      f"{wording.label(fit.law.target).capitalize()} of the fitted law over "
      f"{wording.label(x)} and {wording.label(y)}; darker is worse. The "
      f"{len(rows)} runs lie where their markers are: contours away from "
      f"them are what the law says, not what was seen.{sentence}"))


# --- Details -----------------------------------------------------------------


def _reach(column: pd.Series) -> np.ndarray:
  """The runs' range and half as much again on the larger side, in logs."""
  span = math.log(column.max() / column.min())
  return np.exp(np.linspace(math.log(column.min()) - 0.06 * span - 0.1,
                            math.log(column.max()) + 0.3 * span + 0.1, _GRID))


def _contour_levels(values: np.ndarray, space: str) -> np.ndarray:
  """Closer together where the surface is flat."""
  low, high = np.nanpercentile(values, [0.5, 99])
  if space == "linear" or low <= 0 or not low < high:
    return np.linspace(low, high + 1e-12, _CONTOURS)
  depth = 0.1 * (high - low)
  return low - depth + np.geomspace(depth, high - low + depth, _CONTOURS)


def _label_places(xs: np.ndarray, ys: np.ndarray, values: np.ndarray,
                  levels: np.ndarray) -> list[tuple[float, float]]:
  """Where contours cross a line from the lower left to the upper right, beside
  the diagonal, where the frontier lies."""
  steps = np.arange(int(0.68 * _GRID))
  along = values[steps + int(0.28 * _GRID), steps + int(0.02 * _GRID)]
  places = []
  for level in levels:
    crossing = np.flatnonzero(np.diff(np.sign(along - level)))
    for k in crossing[:1]:
      places.append((float(xs[k + int(0.02 * _GRID)]),
                     float(ys[k + int(0.28 * _GRID)])))
  return places


def _norm(levels: np.ndarray) -> colors.Normalize:
  return colors.BoundaryNorm(levels, 256, extend="both")


def _surface_runs(panel: axes_lib.Axes, fit: result.Fit, rows: pd.DataFrame,
                  x: str, y: str) -> list[lines.Line2D]:
  style = dict(marker="o", color=canvas.INK, markersize=3.6, alpha=1.0,
               markerfacecolor="white", markeredgewidth=0.8)
  held_style = dict(marker="D", color=canvas.ALARM, alpha=1.0, markersize=5,
                    markerfacecolor="white", markeredgewidth=1.3)
  held = rows["held_out"]
  canvas.scatter(panel, rows[x][~held], rows[y][~held], **style)
  keys = [canvas.key(linestyle="none", **style, label="fitted runs")]
  if held.any():
    canvas.scatter(panel, rows[x][held], rows[y][held], **held_style)
    keys.append(canvas.key(linestyle="none", **held_style,
                           label="held-out runs"))
  return keys


def _surface_frontier(panel: axes_lib.Axes, fit: result.Fit, xs: np.ndarray,
                      ys: np.ndarray) -> list[lines.Line2D]:
  """The frontier and lines of equal compute, over N and D."""
  spent = fit.cost.flops(*np.meshgrid(xs, ys))
  decades = 10.0 ** np.arange(math.ceil(math.log10(spent.min())),
                              math.log10(spent.max()))
  panel.contour(xs, ys, spent, levels=decades, colors=canvas.SLATE,
                linewidths=0.8, linestyles="dashed")
  for budget in decades:
    _label_budget(panel, fit, xs, ys, budget)
  keys = [canvas.key(color=canvas.SLATE, linewidth=0.8,
                       linestyle="--", label="equal compute (FLOPs)")]
  rows = fit.compute_optimal(np.geomspace(spent.min(), spent.max(), 120))
  at = [rows[name].to_numpy() for name in ("params", "tokens")]
  inside = ~rows["extrapolated"].to_numpy()
  for part, style, label in ((inside, "-", "frontier"),
                             (~inside, canvas.DOTTED, None)):
    shown = [np.where(part, values, np.nan) for values in at]
    panel.plot(*shown, color=canvas.INK, linewidth=2.2, linestyle=style,
               path_effects=_HALO if style == "-" else None)
    if label:
      keys.append(canvas.key(color=canvas.INK, linewidth=2.2,
                               label=label))
  return keys


def _label_budget(panel: axes_lib.Axes, fit: result.Fit, xs: np.ndarray,
                  ys: np.ndarray, budget: float) -> None:
  """FLOPs of a line of equal compute, where it leaves the panel."""
  style = dict(fontsize=7.5, color=canvas.SLATE, annotation_clip=False,
               textcoords="offset points")
  text = canvas.scientific(budget)
  heights = fit.cost.tokens(xs, budget)
  if ys[0] < heights[-1] < ys[-1]:
    panel.annotate(text, (xs[-1], heights[-1]), (4, -3), **style)
  elif heights[-1] < ys[-1] < heights[0]:
    x = float(np.interp(-ys[-1], -heights, xs))
    panel.annotate(text, (x, ys[-1]), (0, 4), ha="center", **style)
