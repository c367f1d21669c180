# SPDX-License-Identifier: Apache-2.0
"""What a config will cost, and what a run has cost.

    cost = tfjax.cost.estimate(config, hardware="h100", num_devices=64)
    text = tfjax.cost.model_card(record)
"""

import importlib
from typing import Any

# Loaded when they are asked for: what only looks up a peak needs no model.
_MODULES = {"estimate": "estimates", "Estimate": "estimates",
            "model_card": "card"}

__all__ = ["estimate", "Estimate", "model_card"]


def __getattr__(name: str) -> Any:
  if name not in _MODULES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
  return getattr(module, name)
