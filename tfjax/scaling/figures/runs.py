# SPDX-License-Identifier: Apache-2.0
"""Figures of runs, with or without a fit: their curves, and their loss against
size, data and compute."""

import math
from typing import Mapping

from matplotlib import lines
import numpy as np
import pandas as pd

from tfjax.scaling import envelope as envelope_lib
from tfjax.scaling import frontier
from tfjax.scaling import result
from tfjax.scaling import wording
from tfjax.scaling.figures import canvas

_BEYOND = 10.0  # the frontier is drawn to this many times the largest run
_CURVE_POINTS = 120


def curves(frame: pd.DataFrame, rows_of: Mapping[str, pd.DataFrame]
           ) -> canvas.Picture | None:
  """Training loss, averaged over windows, against tokens and FLOPs."""
  levels = canvas.Levels.of(frame["params"])
  figure, (left, right) = canvas.panels(1, 2)
  lowest, highest = math.inf, -math.inf
  for row, level in zip(frame.itertuples(), levels.index):
    rows = rows_of[row.run]
    rows = rows[(rows["kind"] == "train") & np.isfinite(rows["loss"])]
    rows = rows[(rows["tokens"] > 0) & (rows["flops"] > 0)]
    if not len(rows):
      continue
    mean = _windowed(rows)
    for panel, name in ((left, "tokens"), (right, "flops")):
      panel.plot(mean[name], mean["loss"], **levels.line(level), linewidth=1,
                 alpha=0.85)
      panel.plot(getattr(row, name), row.loss, **levels.marker(level))
    highest = max(highest, float(mean["loss"].iloc[0]))
    lowest = min(lowest, row.loss, float(mean["loss"].min()))
  if math.isinf(lowest):
    return None
  for panel, name, label in (
      (left, "tokens", "tokens seen"),
      (right, "flops", "training compute so far (FLOPs)")):
    panel.set_ylim(lowest / 1.03, highest * 1.03)
    canvas.log_axis(panel.xaxis, name, label)
    canvas.log_axis(panel.yaxis, "loss", "training loss (nats / token)")
  canvas.legend_below(figure, levels.keys("params", True))
  return canvas.Picture(figure, "Loss curves", (
      f"Training loss of {len(frame)} runs against tokens and compute, "
      "averaged over windows of equal length in log tokens. Markers are the "
      f"held-out loss at the end of each run; the lowest is "
      f"{frame['loss'].min():.3f} nats a token."))


def against_sizes(frame: pd.DataFrame) -> canvas.Picture:
  """Loss against N and D of runs without a fit."""
  figure, both = canvas.panels(1, 2, height=4.1)
  for panel, (name, other, cmap) in zip(both, (
      ("params", "tokens", "cividis"), ("tokens", "params", "viridis"))):
    levels = canvas.Levels.of(frame[other], cmap)
    for level in range(len(levels)):
      rows = frame[levels.index == level]
      canvas.scatter(panel, rows[name], rows["loss"], **levels.marker(level))
    canvas.log_axis(panel.xaxis, name)
    canvas.log_axis(panel.yaxis, "loss")
    canvas.legend_under(panel, levels.keys(other, False))
  return canvas.Picture(figure, "Loss against model and data size", (
      f"The loss of {len(frame)} runs at the end of training; no law is "
      "fitted."))


def compute(frame: pd.DataFrame, fit: result.Fit | None,
            entropy_rate: float | None) -> canvas.Picture:
  """Loss against FLOPs with the envelope of runs and the fitted frontier."""
  figure, (panel,) = canvas.panels(1, 1)
  levels = canvas.Levels.of(frame["params"])
  best = frame.iloc[envelope_lib.hull(frame["flops"].to_numpy(),
                                      frame["loss"].to_numpy())]
  keys = [panel.plot(best["flops"], best["loss"], color=canvas.QUIET,
                     linestyle=canvas.DASHED, linewidth=1.2,
                     label="envelope of the runs")[0]]
  top = frame.loc[frame["loss"].idxmin()]
  text = (f"Every run at its training FLOPs; the dashed line joins those that "
          f"spent theirs best, down to {top['loss']:.3f} nats a token at "
          f"{wording.power(top['flops'])} FLOPs.")
  if has_frontier(fit):
    keys += _fitted_frontier(panel, frame, fit)
    text += _compute_words(frame, fit)
  if entropy_rate is not None:
    keys.append(panel.axhline(
        entropy_rate, color=canvas.ALARM, linestyle="-.", linewidth=1.1,
        label=f"entropy rate of the source, {entropy_rate:.3f}"))
  held = {h.run for h in fit.holdout} if fit is not None else set()
  hollow = frame["run"].isin(held).to_numpy()
  for level in range(len(levels)):
    for part, style in ((~hollow, {}), (hollow, {
        "markerfacecolor": "white", "markeredgewidth": 1.3})):
      rows = frame[(levels.index == level) & part]
      canvas.scatter(panel, rows["flops"], rows["loss"],
                     **levels.marker(level) | style)
  canvas.log_axis(panel.xaxis, "flops")
  canvas.log_axis(panel.yaxis, "loss")
  panel.legend(handles=keys + levels.keys("params", False), loc="center left",
               bbox_to_anchor=(1.01, 0.5))
  return canvas.Picture(figure, "Loss against compute", text)


def has_frontier(fit: result.Fit | None) -> bool:
  """Whether the fitted law says where a budget is best spent."""
  return fit is not None and fit.cost is not None and frontier.has_optimum(
      fit.law)


# --- Details -----------------------------------------------------------------


def _fitted_frontier(panel, frame: pd.DataFrame,
                     fit: result.Fit) -> list[lines.Line2D]:
  """The least loss that the law gives a budget, with its band."""
  rows = fit.compute_optimal(_budgets(frame))
  budgets, inside = rows["flops"], ~rows["extrapolated"]
  keys = []
  for part, line, label in ((inside, "-", "fitted frontier"),
                            (~inside, canvas.DOTTED, "extrapolated")):
    keys += panel.plot(budgets, rows["loss"].where(part), color=canvas.INK,
                       linestyle=line, label=label)
  if fit.has_intervals:
    keys.append(panel.fill_between(
        budgets, rows["loss_low"], rows["loss_high"], color=canvas.INK,
        alpha=0.12, linewidth=0, label=f"{fit.level:.0%} interval"))
  return keys


def _compute_words(frame: pd.DataFrame, fit: result.Fit) -> str:
  row = fit.compute_optimal(_BEYOND * frame["flops"].max()).iloc[0]
  if not wording.known(row["loss"]):
    return ""
  return (f" The solid line is the least loss that the fitted law gives a "
          f"budget; at {_BEYOND:g} times the largest run, "
          f"{wording.power(row['flops'])} FLOPs, it is {row['loss']:.3f} ("
          f"{wording.between((row['loss_low'], row['loss_high']), '{:.3f}')}"
          ").")


def _budgets(frame: pd.DataFrame) -> np.ndarray:
  low, high = frame["flops"].min(), frame["flops"].max()
  return np.geomspace(low, _BEYOND * high, 120)


def _windowed(rows: pd.DataFrame) -> pd.DataFrame:
  """Means over windows of equal length in log tokens."""
  logs = np.log(rows["tokens"].to_numpy())
  width = max(np.ptp(logs) / _CURVE_POINTS, 1e-12)
  window = np.floor((logs - logs.min()) / width)
  return rows[["tokens", "flops", "loss"]].groupby(window).mean()
