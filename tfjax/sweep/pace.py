# SPDX-License-Identifier: Apache-2.0
"""How fast the runs of a sweep's directory have been, from their records.

For plans of what is left of a sweep: no step is timed, which
`tfjax.sweep.calibrate` does.
"""

import dataclasses
import math
import os
import pathlib
import statistics
from typing import Any

from tfjax.sweep.specs import RunSpec
from tfjax.train import records


@dataclasses.dataclass(frozen=True)
class Pace:
  """What complete runs took.

  Attributes:
    rates: FLOPs of a step -> FLOP/s of a run in its steps, the medians.
    overhead: seconds of a run outside of its steps, the median.
    num_runs: that it was taken from.
  """

  rates: dict[float, float]
  overhead: float
  num_runs: int

  def seconds(self, spec: RunSpec) -> float:
    """Of a whole run, at the rate of the model nearest in FLOPs a step."""
    flops = spec.budget.flops_total / spec.budget.steps
    near = min(self.rates, key=lambda one: abs(math.log(one / flops)))
    return self.overhead + spec.budget.flops_total / self.rates[near]

  @property
  def basis(self) -> str:
    """How its seconds are obtained."""
    return (f"measured: the pace of {self.num_runs} complete "
            f"run{'s' * (self.num_runs > 1)} of this directory, that of the "
            "nearest in FLOPs a step")


def of(workdir: str | os.PathLike[str]) -> Pace | None:
  """The pace of the runs in a sweep's directory; None: none is known.

  Raises:
    RecordError: a record is damaged.
  """
  found: dict[float, list[float]] = {}
  overheads = []
  for path in sorted(pathlib.Path(workdir).glob("*/result.json")):
    result = records.read_result(path.parent) or {}
    if taken := _taken(result):
      rate, overhead = taken
      key = result["flops_total"] / result["steps"]
      found.setdefault(key, []).append(rate)
      overheads.append(overhead)
  if not overheads:
    return None
  return Pace({key: statistics.median(rates) for key, rates in found.items()},
              statistics.median(overheads), len(overheads))


def _taken(result: dict[str, Any]) -> tuple[float, float] | None:
  """FLOP/s in steps and seconds outside of them, of a run that was alone.

  A member of an ensemble has shared its steps, and a run that branched off
  has not done all of its own.
  """
  if (result["status"] != "complete" or result.get("branched_from")
      or (result.get("ensemble_members") or 1) > 1):
    return None
  names = ("flops_total", "steps", "device_seconds", "device_count",
           "wall_seconds")
  values = [result.get(name) for name in names]
  if not all(isinstance(value, (int, float)) and value > 0
             for value in values):
    return None
  flops, _, device_seconds, devices, wall = values
  in_steps = device_seconds / devices
  return flops / in_steps, max(0.0, wall - in_steps)
