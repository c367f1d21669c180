# SPDX-License-Identifier: Apache-2.0
"""Profile likelihood of a fit's parameters, one panel each."""

import math

from matplotlib import axes as axes_lib
from matplotlib import patches

from tfjax.scaling import result
from tfjax.scaling import wording
from tfjax.scaling.figures import canvas

_POINTS = 25


def profiles(fit: result.Fit) -> canvas.Picture | None:
  """Profile likelihood of every parameter that has one, a panel each."""
  names = list(fit.profile_intervals)
  if not names:
    return None
  columns = 3 if len(names) > 2 else 2
  figure, all_panels = canvas.panels(math.ceil(len(names) / columns), columns,
                                     height=2.75)
  threshold = fit.deviance_limit
  open_ends = []
  for panel, name in zip(all_panels, names):
    interval = fit.profile_intervals[name]
    _profile(panel, fit, name, interval, threshold)
    if None in interval:
      open_ends.append(name)
  for panel in all_panels[len(names):]:
    panel.remove()
  canvas.legend_below(figure, _profile_keys(fit, threshold), columns=5)
  text = (
      "How much worse the fit becomes as one parameter is held at a value and "
      "the others are fitted again; at the dashed line, "
      f"{threshold:.2f}, the {fit.level:.0%} interval ends (the F "
      "distribution's quantile). A narrow valley is a parameter that the runs "
      "determine; a flat one, a parameter that others can make up for.")
  others = [name for name in fit.law.parameters if name not in names
            and name not in fit.settings["fixed"]]
  if others:
    text += (f" {wording.listed(others)} {'have' if len(others) > 1 else 'has'}"
             " no panel: a coefficient follows its exponent.")
  if open_ends:
    text += (f" The curve of {', '.join(open_ends)} does not rise to the line "
             "on every side: the runs leave that end open.")
  return canvas.Picture(figure, "Profile likelihood", text)


# --- Details -----------------------------------------------------------------


def _profile(panel: axes_lib.Axes, fit: result.Fit, name: str,
             interval: tuple[float | None, float | None],
             threshold: float) -> None:
  rows = fit.profile(name, points=_POINTS).sort_values("value")
  value, deviance = rows["value"].to_numpy(), rows["deviance"].to_numpy()
  top = 2.2 * threshold
  panel.plot(value, deviance, color=canvas.INK, marker=".", markersize=4)
  panel.axhline(threshold, color=canvas.ALARM, linestyle=canvas.DASHED,
                linewidth=1.1)
  panel.axvline(fit.coefficients[name], color=canvas.QUIET,
                linestyle=canvas.DOTTED, linewidth=1.2)
  low = value[0] if interval[0] is None else interval[0]
  high = value[-1] if interval[1] is None else interval[1]
  panel.axvspan(low, high, color=canvas.MAIN, alpha=0.13, linewidth=0)
  bootstrap = fit.intervals[name]
  if bootstrap is not None:
    centre = fit.coefficients[name]
    panel.errorbar(centre, 0.9 * top, fmt="D", color=canvas.MAIN, capsize=3,
                   xerr=[[max(centre - bootstrap[0], 0)],
                         [max(bootstrap[1] - centre, 0)]], markersize=3.5,
                   elinewidth=1.3)
  if value[0] > 0 and value[-1] > 5 * value[0]:
    canvas.log_axis(panel.xaxis, name, name)
  else:
    panel.set_xlabel(name)
  panel.set_ylim(-0.04 * top, top)
  panel.set_ylabel("deviance")
  panel.set_title(f"{name}: {wording.open_interval(interval)}", fontsize=9)


def _profile_keys(fit: result.Fit, threshold: float) -> list[object]:
  return [
      canvas.key(color=canvas.INK, marker=".", markersize=4,
                   label="profile"),
      canvas.key(color=canvas.ALARM, linestyle=canvas.DASHED,
                   linewidth=1.1,
                   label=f"limit, {fit.level:.0%}: {threshold:.2f}"),
      patches.Patch(color=canvas.MAIN, alpha=0.13, linewidth=0,
                    label="profile interval (in the title)"),
      canvas.key(color=canvas.MAIN, marker="D", markersize=3.5,
                   linewidth=1.3, label="bootstrap interval"),
      canvas.key(color=canvas.QUIET, linestyle=canvas.DOTTED,
                   linewidth=1.2, label="estimate")]
