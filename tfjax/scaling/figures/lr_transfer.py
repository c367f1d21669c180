# SPDX-License-Identifier: Apache-2.0
"""Loss against learning rate at several widths: does the best rate transfer?

Reads run records; what makes it transfer is in the models' parametrization.
"""

import json
import math
import pathlib
from typing import Any

from matplotlib import axes as axes_lib
import numpy as np
import pandas as pd

from tfjax.scaling.figures import canvas

COLUMNS = ("parametrization", "d_model", "learning_rate", "status", "loss",
           "loss_stderr", "steps", "seed")
_ENDED = ("complete", "diverged")


def losses(frame: pd.DataFrame) -> pd.DataFrame:
  """`COLUMNS` of the runs that have come to an end, sorted by the first three.

  Args:
    frame: as `tfjax.scaling.load` gives it.

  Raises:
    ValueError: no run has ended, or two have the same of the first three.
  """
  frame = frame[frame["status"].isin(_ENDED)].copy()
  if frame.empty:
    raise ValueError("no run is complete or diverged; there is nothing to show")
  frame["parametrization"] = [
      _parametrization(pathlib.Path(path)) for path in frame["directory"]]
  # A run that has diverged has no loss that counts.
  frame.loc[frame["status"] == "diverged", ["loss", "loss_stderr"]] = math.nan
  keys = list(COLUMNS[:3])
  frame = frame[list(COLUMNS)].sort_values(keys, ignore_index=True)
  if frame.duplicated(keys).any():
    twice = frame.loc[frame.duplicated(keys), keys].iloc[0].to_dict()
    raise ValueError(f"two runs have {twice}; each may have one: keep other "
                     "sweeps in other directories")
  return frame


def minima(table: pd.DataFrame) -> pd.DataFrame:
  """The best learning rate of each parametrization and width.

  Args:
    table: as `losses` gives it.

  Returns:
    parametrization, d_model, learning_rate and loss of the best run, `inside`:
    whether there are worse runs on both sides of it, and `vertex`: the rate at
    the lowest point of the parabola through it and its neighbours in the log of
    the rate; NaN where it is not inside or a neighbour has diverged.
  """
  rows = []
  for (name, width), group in table.groupby(["parametrization", "d_model"]):
    group = group.reset_index(drop=True)
    if group["loss"].isna().all():
      continue
    best = int(group["loss"].idxmin())
    inside = 0 < best < len(group) - 1
    rows.append(dict(
        parametrization=name, d_model=int(width),
        learning_rate=group["learning_rate"][best], loss=group["loss"][best],
        inside=inside, vertex=_vertex(group.iloc[best - 1:best + 2])
        if inside else math.nan))
  return pd.DataFrame(rows)


def picture(table: pd.DataFrame) -> canvas.Picture:
  """A panel a parametrization, a line a width, the minimum of each marked.

  Args:
    table: as `losses` gives it.
  """
  best = minima(table)
  names = sorted(table["parametrization"].unique(), key=(
      "standard", "mup", "complete_p").index)
  levels = canvas.Levels.of(table["d_model"])
  figure, panels = canvas.panels(1, len(names), height=4.0)
  top = _top(table)
  for panel, name in zip(panels, names):
    mine = (table["parametrization"] == name).to_numpy()
    for level, width in enumerate(levels.values):
      rows = table[mine & (levels.index == level)]
      _line(panel, rows, levels, level, top)
      for row in best[(best["parametrization"] == name) &
                      (best["d_model"] == width)].itertuples():
        panel.plot(row.learning_rate, row.loss, marker="*", markersize=15,
                   color=levels.colour(level), markeredgecolor=canvas.INK,
                   markeredgewidth=0.8, zorder=3,
                   fillstyle="full" if row.inside else "none")
    panel.set_title(name)
    panel.set_xscale("log", base=2)
    panel.set_xlabel("learning rate")
    panel.set_ylim(table["loss"].min() - 0.04 * (top - table["loss"].min()),
                   top)
  panels[0].set_ylabel("held-out loss (nats / token)")
  for panel in panels[1:]:
    panel.sharey(panels[0])
  keys = levels.keys("d_model", True) + [canvas.key(
      color=canvas.QUIET, marker="*", markersize=12, linestyle="none",
      markeredgecolor=canvas.INK, label="minimum (hollow: at the edge)")]
  if table["loss"].isna().any() or (table["loss"] > top).any():
    keys.append(canvas.key(color=canvas.QUIET, marker="^", linestyle="none",
                           label="above the panel, or diverged"))
  canvas.legend_below(figure, keys)
  return canvas.Picture(figure, "Learning rate against width", _words(best))


# --- Details -----------------------------------------------------------------


def _parametrization(directory: pathlib.Path) -> str:
  config: dict[str, Any] = json.loads(
      (directory / "config.json").read_text(encoding="utf-8"))
  return config["model"].get("parametrization", "standard")


def _vertex(three: pd.DataFrame) -> float:
  if three["loss"].isna().any():
    return math.nan
  curve, slope, _ = np.polyfit(
      np.log2(three["learning_rate"]), three["loss"], 2)
  return float(2.0 ** (-slope / (2 * curve)))


def _top(table: pd.DataFrame) -> float:
  """Most of what there is to see lies near the minima."""
  low, high = table["loss"].min(), table["loss"].max()
  worst = table.groupby(["parametrization", "d_model"])["loss"].min().max()
  return min(high + 0.04 * (high - low), low + 3 * (worst - low) + 0.2)


def _line(panel: axes_lib.Axes, rows: pd.DataFrame, levels: canvas.Levels,
          level: int, top: float) -> None:
  panel.plot(rows["learning_rate"], rows["loss"], linewidth=1.3,
             **levels.line(level))
  panel.plot(rows["learning_rate"], rows["loss"], **levels.marker(level))
  out = rows[~(rows["loss"] <= top)]
  if len(out):  # a line without points would spoil the layout
    panel.plot(out["learning_rate"], [top] * len(out), marker="^",
               clip_on=False, linestyle="none", color=levels.colour(level))


def _words(best: pd.DataFrame) -> str:
  text = []
  for name, rows in best.groupby("parametrization", sort=False):
    if rows["vertex"].notna().sum() < 2:
      text.append(f"{name}: fewer than two widths have a minimum inside the "
                  "grid.")
      continue
    inside = rows[rows["vertex"].notna()].sort_values("d_model")
    first, last = inside.iloc[0], inside.iloc[-1]
    text.append(
        f"{name}: from width {first['d_model']} to {last['d_model']} the best "
        "learning rate changes by a factor of "
        f"{last['vertex'] / first['vertex']:.2f}.")
  return ("Held-out loss of every run; the star is the best run of its width. "
          "Where it lies between two others, the lowest point of the parabola "
          "through the three tells how the best learning rate moves. "
          + " ".join(text))
