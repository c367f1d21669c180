# SPDX-License-Identifier: Apache-2.0
"""The figure of loss against what runs have cost."""

import numpy as np
import pandas as pd

from tfjax.scaling import wording
from tfjax.scaling.figures import canvas

# Energy stands in for CO2e where no grid is known.
_AXES = ("device_hours", "price_usd", "co2e_kg")
_INSTEAD = {"co2e_kg": "energy_kwh"}
_TITLES = {"device_hours": "device-hours", "price_usd": "money",
           "energy_kwh": "energy", "co2e_kg": "CO2e"}
_UNITS = {"device_hours": "device-hours", "price_usd": "US$",
          "energy_kwh": "kWh", "co2e_kg": "kg CO2e"}
_LEAST_RUNS = 2


def cost(frame: pd.DataFrame, spent: pd.DataFrame) -> canvas.Picture | None:
  """Loss against device-hours, money and CO2e, as far as they are known.

  Args:
    frame: run, params, tokens, loss.
    spent: what these and other runs have cost, or would have alone: run,
      device_hours, price_usd, energy_kwh, co2e_kg, occupied, shared.

  Returns:
    None where fewer than two runs know any of it.
  """
  paid = spent.drop_duplicates("run", keep=False).set_index("run").reindex(
      frame["run"]).reset_index(drop=True)
  frame = frame.reset_index(drop=True)
  names = [shown for name in _AXES if (shown := _shown(paid, name))]
  if not names:
    return None
  levels = canvas.Levels.of(frame["params"])
  joined = levels.sign == "="
  figure, panels = canvas.panels(1, len(names), height=3.5)
  for panel, name in zip(panels, names):
    for level in range(len(levels)):
      rows = pd.DataFrame({"x": paid[name], "loss": frame["loss"]})[
          (levels.index == level) & _charted(paid[name])].sort_values("x")
      if joined:
        panel.plot(rows["x"], rows["loss"], **levels.line(level), linewidth=1)
      canvas.scatter(panel, rows["x"], rows["loss"], **levels.marker(level))
    canvas.log_axis(panel.xaxis, name)
    canvas.log_axis(panel.yaxis, "loss")
  canvas.legend_below(figure, levels.keys("params", joined))
  title = wording.listed([_TITLES[name] for name in names])
  return canvas.Picture(figure, f"Loss against {title}", (
      f"Each of {len(frame)} runs at what it has cost"
      f"{'; lines join runs of one size' * joined}. "
      f"{_top_words(frame, paid, names)}{_caveats(paid, names)}"))


# --- Details -----------------------------------------------------------------


def _shown(paid: pd.DataFrame, name: str) -> str | None:
  """The axis, or what stands in for it; None where neither is known."""
  for candidate in (name, _INSTEAD.get(name)):
    if candidate and _charted(paid[candidate]).sum() >= _LEAST_RUNS:
      return candidate
  return None


def _charted(column: pd.Series) -> np.ndarray:
  return (column > 0).to_numpy()  # A log axis has no place for 0.


def _top_words(frame: pd.DataFrame, paid: pd.DataFrame,
               names: list[str]) -> str:
  top = frame["loss"].idxmin()
  costs = [f"{wording.number(paid[name][top], 3)} {_UNITS[name]}"
           for name in names if wording.known(paid[name][top])]
  return (f"The lowest loss, {frame['loss'][top]:.3f} nats a token, took "
          f"{wording.listed(costs)}." if costs else "")


def _caveats(paid: pd.DataFrame, names: list[str]) -> str:
  text = ""
  left_out = {name: int((~_charted(paid[name])).sum()) for name in names}
  if any(left_out.values()):
    text += " Left out where it is unknown or none: " + wording.listed([
        f"the {_TITLES[name]} of {_runs(count)}"
        for name, count in left_out.items() if count]) + "."
  branched = int((paid["shared"] > 0).sum())
  if branched:
    text += (f" {_runs(branched)} of them branched off another one's trunk, and "
             "stand at what they would have cost alone: their own and the "
             "trunk's up to there, with its start and compilation.")
  inside = int((paid["device_hours"].notna()
                & ~paid["occupied"].eq(True)).sum())
  if "device_hours" in names and inside:
    text += (f" The device-hours of {_runs(inside)} are those inside training "
             "steps: their records hold no others.")
  return text


def _runs(count: int) -> str:
  return f"{count} run{'s' * (count > 1)}"
