# SPDX-License-Identifier: Apache-2.0
"""What all figures share: style, panels, axes, series and their keys.

Made without pyplot, so that no global state is touched. Series differ by
marker and line as well as by colour, and the colours by lightness, so that a
figure survives a black-and-white printer and any colour vision.
"""

import dataclasses
import math
from typing import Any, Callable, Sequence

import matplotlib
from matplotlib import axes as axes_lib
from matplotlib import axis as axis_lib
from matplotlib import figure as figure_lib
from matplotlib import lines
from matplotlib import ticker
import numpy as np
import pandas as pd

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
INK, SLATE, QUIET = "#222222", "#555555", "#8a8a8a"
ALARM, MAIN = "#c0392b", "#31688e"
DOTTED, DASHED = (0, (1, 1.6)), (0, (4, 2))
_MARKERS = "osD^vP*X<>"
_LINES = ("-", (0, (6, 1.5)), (0, (3, 1.5)), (0, (1.2, 1.2)),
          (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1.5, 1.2, 1.5)),
          (0, (6, 1.5, 1.2, 1.5, 1.2, 1.5)), (0, (1.2, 3)))
_MOST_LEVELS = 8
_SAME_LEVEL = 1.05  # sizes within 5% share a colour
_VECTOR_POINTS = 2000  # more are drawn as pixels in SVG and PDF


@dataclasses.dataclass(frozen=True)
class Picture:
  """A figure, and what a reader should see in it."""

  figure: figure_lib.Figure
  title: str
  caption: str


@dataclasses.dataclass(frozen=True)
class Levels:
  """A handful of values of an axis, each a colour, a marker and a line."""

  values: np.ndarray
  index: np.ndarray  # per row, the value it is nearest to
  sign: str  # "=" where rows have these values, "≈" where they lie near
  cmap: str = "viridis"

  @classmethod
  def of(cls, column: pd.Series, cmap: str = "viridis") -> "Levels":
    ordered = np.sort(column.to_numpy(np.float64))
    starts = np.r_[True, ordered[1:] > _SAME_LEVEL * ordered[:-1]]
    values = np.array([np.median(part) for part in np.split(
        ordered, np.flatnonzero(starts)[1:])])
    if len(values) > _MOST_LEVELS:
      values = np.geomspace(values[0], values[-1], 6)
    distance = np.abs(np.log(column.to_numpy(np.float64))[:, None]
                      - np.log(values))
    used, index = np.unique(distance.argmin(axis=1), return_inverse=True)
    exact = np.isin(ordered, values).all()
    return cls(values[used], index, "=" if exact else "≈", cmap)

  def __len__(self) -> int:
    return len(self.values)

  def colour(self, level: int) -> tuple[float, ...]:
    # The palest tenth of the map is lost on white.
    place = level / max(len(self) - 1, 1)
    return matplotlib.colormaps[self.cmap](0.88 * place)

  def line(self, level: int) -> dict[str, Any]:
    return dict(color=self.colour(level),
                linestyle=_LINES[level % len(_LINES)])

  def marker(self, level: int) -> dict[str, Any]:
    return dict(color=self.colour(level), linestyle="none",
                marker=_MARKERS[level % len(_MARKERS)])

  def keys(self, name: str, with_lines: bool) -> list[lines.Line2D]:
    """Handles of a legend, one a value of the axis of that name."""
    return [lines.Line2D(
        [], [], **self.marker(k) | (self.line(k) if with_lines else {}),
        linewidth=1.1, label=f"{wording.symbol(name)} {self.sign} "
        f"{wording.amount(name, value)}")
            for k, value in enumerate(self.values)]


def panels(rows: int, columns: int, height: float = 3.7
           ) -> tuple[figure_lib.Figure, list[axes_lib.Axes]]:
  """Panels in reading order; `height` in inches, of a row."""
  width = {1: 7.6, 2: 9.2, 3: 10.4}[columns]
  figure = figure_lib.Figure((width, rows * height), layout="constrained",
                             dpi=150)
  figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.05,
                                 hspace=0.06)
  return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def scatter(panel: axes_lib.Axes, x: Any, y: Any, **style: Any) -> None:
  """Points, smaller and paler the more of them there are."""
  count = len(x)
  size = 5.0 if count < 100 else 4.0 if count < 400 else 3.0
  defaults = dict(linestyle="none", markersize=size,
                  alpha=0.9 if count < 400 else 0.55, markeredgewidth=0.6,
                  rasterized=count > _VECTOR_POINTS)
  panel.plot(x, y, **defaults | style)


def key(**style: Any) -> lines.Line2D:
  """A legend's handle that nothing is drawn with."""
  return lines.Line2D([], [], **style)


def legend_below(figure: figure_lib.Figure, handles: Sequence[Any],
                 columns: int = 5) -> None:
  figure.legend(handles=handles, loc="outside lower center",
                ncols=min(len(handles), columns), columnspacing=1.6,
                handletextpad=0.5)


def legend_under(panel: axes_lib.Axes, handles: Sequence[Any]) -> None:
  """A legend of its own under a panel."""
  count = len(handles)
  panel.legend(handles=handles, ncols=3 if count in (3, 5, 6) else 4,
               loc="upper center", bbox_to_anchor=(0.48, -0.17),
               columnspacing=1.1, handlelength=2.4, handletextpad=0.4)


def stretch(values: pd.Series, beyond: float = 1.15) -> np.ndarray:
  return np.geomspace(values.min() / 1.15, values.max() * beyond, 100)


def log_axis(axis: axis_lib.Axis, name: str, label: str | None = None) -> None:
  """A log axis of what is already drawn: 2B for counts, 2.5 for losses, and
  powers of ten for FLOPs."""
  _set_scale(axis, "log")
  axis.set_label_text(label or wording.label(name))
  low, high = axis.get_view_interval()
  if wording.is_count(name):
    _decades(axis, (low, high), wording.count)
  elif 1e-3 < low and high < 4 * low and high < 1e5:
    plain(axis)
  elif 1e-3 < low and high < 1e5:
    _decades(axis, (low, high), wording.number)
  else:
    _decades(axis, (low, high), scientific)


def target_axis(axis: axis_lib.Axis, name: str, space: str,
                prefix: str = "") -> None:
  """The axis of a law's target: log or linear, as its residuals are."""
  label = f"{prefix} {wording.label(name)}".strip()
  if space == "log":
    log_axis(axis, name, label)
  else:
    axis.set_label_text(label)


def plain(axis: axis_lib.Axis) -> None:
  """Round decimals on a log axis, as losses span much less than a decade."""
  axis.set_major_locator(ticker.MaxNLocator(9, steps=[1, 2, 5, 10]))
  axis.set_minor_locator(ticker.NullLocator())
  axis.set_major_formatter(ticker.FormatStrFormatter("%g"))


def scientific(value: float) -> str:
  """2e15 as mathtext."""
  exponent = math.floor(math.log10(value) + 1e-9)
  mantissa = round(value / 10.0**exponent)
  head = "" if mantissa == 1 else rf"{mantissa}{{\times}}"
  return rf"${head}10^{{{exponent}}}$"


def _set_scale(axis: axis_lib.Axis, scale: str) -> None:
  if axis.axis_name == "x":
    axis.axes.set_xscale(scale)
  else:
    axis.axes.set_yscale(scale)


def _decades(axis: axis_lib.Axis, limits: tuple[float, float],
             text: Callable[[float], str]) -> None:
  """Few labels on a log axis: decades, or 1, 2, 5 where there are few."""
  decades = math.log10(limits[1] / limits[0])
  subs = (1, 2, 5) if decades < 1.8 else (1, 3) if decades < 2.6 else (1,)
  axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=12))
  axis.set_minor_locator(ticker.NullLocator())
  axis.set_major_formatter(ticker.FuncFormatter(
      lambda value, _: text(value)))
