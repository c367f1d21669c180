# SPDX-License-Identifier: Apache-2.0
"""Numbers and fits in words, for terminals, figures and the report."""

import math

from tfjax.scaling import result

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
UNKNOWN = "unknown"


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


def power(value: float | None) -> str:
  """3.2e15 -> 3.2×10¹⁵."""
  if not known(value):
    return UNKNOWN
  mantissa, exponent = f"{value:.1e}".split("e")
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


def between(interval: tuple[float, float] | None, form: str = "{:.3g}") -> str:
  if interval is None or not all(map(known, interval)):
    return "no interval"
  return f"{form.format(interval[0])} to {form.format(interval[1])}"


def parameter(fit: result.Fit, name: str) -> str:
  """0.347 (0.316 to 0.373), or that it is not determined."""
  interval = fit.intervals[name]
  if not fit.determined[name]:
    return "not determined" + (
        f" ({between(interval)})" if interval is not None else "")
  return f"{fit.coefficients[name]:.4g} ({between(interval)})"


def cost(fit: result.Fit) -> str:
  """How FLOPs follow from N and D."""
  text = f"C = {fit.cost.kappa:.3g} N^{fit.cost.gamma:.3g} D"
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
