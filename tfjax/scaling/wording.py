# SPDX-License-Identifier: Apache-2.0
"""Numbers and fits in words, for terminals, figures and the report."""

import math
from typing import Any, Callable, Sequence

from tfjax.scaling import result

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
UNKNOWN = "unknown"

# Axes and targets of laws: symbol, words with the unit, whether it is counted
# (1.2M, 3B). Any other name is shown as it is.
_NAMES = {
    "params": ("N", "parameters N", True),
    "tokens": ("D", "training tokens D", True),
    "flops": ("C", "training compute C (FLOPs)", False),
    "loss": ("L", "loss (nats / token)", False),
    "hours": ("h", "hours", False),
    "device_hours": ("h", "device-hours", False),
    "price_usd": ("$", "price (US$)", False),
    "energy_kwh": ("kWh", "energy (kWh)", False),
    "co2e_kg": ("CO2e", "CO2e (kg)", False),
    "width": ("w", "width w (d_model)", True),
    "depth": ("d", "depth d (layers)", True),
    "steps": ("S", "optimizer steps S", True),
    "unique_tokens": ("U", "unique tokens U", True),
    "tokens_per_parameter": ("M", "tokens per parameter M", True),
    "batch_tokens": ("B", "batch size B (tokens)", True),
    "critical_batch": ("B_crit", "critical batch size (tokens)", True),
    "learning_rate": ("lr", "peak learning rate", False),
    "finetuning_tokens": ("D_F", "fine-tuning tokens D_F", True),
    "transferred_tokens": ("D_T", "effective tokens transferred D_T", True),
    "error": ("Err", "error (share of tasks)", False),
    "accuracy": ("Acc", "accuracy (share of tasks)", False),
}


def known(value: float | None) -> bool:
  return value is not None and math.isfinite(value)


def count(value: float | None) -> str:
  """1234567 -> 1.23M; B is 10^9, as parameters and tokens are counted."""
  if not known(value):
    return UNKNOWN
  for scale, prefix in _PREFIXES:
    if abs(value) >= 0.9995 * scale:
      return f"{_three_digits(value / scale)}{prefix}"
  return _three_digits(value)


def symbol(name: str) -> str:
  """The letter of an axis or a target; its own name where it has none."""
  return _NAMES[name][0] if name in _NAMES else name


def label(name: str) -> str:
  """What stands beside an axis: words, letter and unit."""
  return _NAMES[name][1] if name in _NAMES else name.replace("_", " ")


def is_count(name: str) -> bool:
  return name in _NAMES and _NAMES[name][2]


def number(value: float | None, digits: int = 4) -> str:
  """0.3473, 477.8, 5.2×10⁶: a coefficient of any size."""
  if not known(value):
    return UNKNOWN
  if value and not 1e-3 <= abs(value) < 1e5:
    return power(value, digits - 1)
  text = f"{value:.{digits}g}"
  return f"{value:.0f}" if "e" in text else text


def amount(name: str, value: float | None) -> str:
  """A value of an axis: 1.2M parameters, 3.4×10¹⁵ FLOPs, 2.345."""
  if is_count(name):
    return count(value)
  return power(value) if name == "flops" else number(value)


def power(value: float | None, digits: int = 1) -> str:
  """3.2e15 -> 3.2×10¹⁵."""
  if not known(value):
    return UNKNOWN
  mantissa, exponent = f"{value:.{digits}e}".split("e")
  return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def duration(seconds: float | None) -> str:
  """150 -> 2.5 min, 4000 -> 1 h 7 min."""
  if not known(seconds):
    return UNKNOWN
  if seconds < 100:
    return f"{seconds:.3g} s"
  if seconds < 600:
    return f"{seconds / 60:.1f} min"
  minutes = round(seconds / 60)
  if minutes < 60:
    return f"{minutes} min"
  return f"{minutes // 60} h {minutes % 60} min"


def decimal(value: float | None, digits: int = 4) -> str:
  return f"{value:.{digits}f}" if known(value) else UNKNOWN


def listed(items: Sequence[str]) -> str:
  """a, b and c."""
  return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def between(interval: tuple[float, float] | None, form: str = "") -> str:
  """0.316 to 0.373, or that there is none; `form` as of str.format."""
  if interval is None or not all(map(known, interval)):
    return "no interval"
  low, high = (form.format(end) if form else number(end, 3)
               for end in interval)
  return f"{low} to {high}"


def open_interval(interval: tuple[float | None, float | None]) -> str:
  """0.316 to 0.373; an end that the data leave open is named as such."""
  low, high = interval
  if low is None and high is None:
    return "open at both ends"
  if low is None:
    return f"below {number(high, 3)}"
  if high is None:
    return f"above {number(low, 3)}"
  return between((low, high))


def parameter(fit: result.Fit, name: str) -> str:
  """0.347 (0.316 to 0.373), or that it is not determined."""
  interval = fit.intervals[name]
  if not fit.determined[name]:
    return "not determined" + (
        f" ({between(interval)})" if interval is not None else "")
  return f"{number(fit.coefficients[name])} ({between(interval)})"


def banded(row: Any, name: str, show: Callable[[float], str]) -> str:
  """12.3 (11 to 14): `name` of a row with its _low and _high, where known."""
  ends = (getattr(row, f"{name}_low"), getattr(row, f"{name}_high"))
  band = f" ({show(ends[0])} to {show(ends[1])})" if all(
      map(known, ends)) else ""
  return show(getattr(row, name)) + band


def worst(runs: Sequence[result.HeldOut]) -> str:
  """The largest relative error of predicted runs, with its sign."""
  errors = [h.relative_error for h in runs if known(h.relative_error)]
  return error(max(errors, key=abs, default=None))


def error(value: float | None) -> str:
  """+1.17%: a relative error."""
  return f"{value:+.2%}" if known(value) else UNKNOWN


def cost(fit: result.Fit) -> str:
  """How FLOPs follow from N and D."""
  size = "N" if round(fit.cost.gamma, 3) == 1 else f"N^{fit.cost.gamma:.3g}"
  text = f"C = {fit.cost.kappa:.3g} {size} D"
  if fit.cost.worst_error is None:
    return f"{text} ({fit.cost.source})"
  low, high = fit.cost.per_parameter_token
  return (f"{text} ({fit.cost.source}; worst error "
          f"{fit.cost.worst_error:.1%}; C / (N D) is {low:.2f} to {high:.2f})")


def _three_digits(value: float) -> str:
  digits = max(0, 2 - max(0, math.floor(math.log10(abs(value))))
               ) if value else 0
  text = f"{value:.{digits}f}"
  return text.rstrip("0").rstrip(".") if "." in text else text
