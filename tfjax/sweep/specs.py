# SPDX-License-Identifier: Apache-2.0
"""What a planned run is, for all that plans, launches and watches runs.

How cells become specs is in `tfjax.sweep.plan`.
"""

import dataclasses
from typing import Any, Mapping

from tfjax import config as config_lib
from tfjax.cost import budget as budget_lib


@dataclasses.dataclass(frozen=True)
class RunSpec:
  """One run of a sweep: who it is, what it trains, what that amounts to."""

  run_id: str
  config: config_lib.ExperimentConfig
  overrides: Mapping[str, Any]
  budget: budget_lib.Budget


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested values by their dotted keys."""
  result = {}
  for name, value in values.items():
    if isinstance(value, Mapping):
      result.update(flat(value, f"{prefix}{name}."))
    else:
      result[f"{prefix}{name}"] = value
  return result
