# SPDX-License-Identifier: Apache-2.0
"""Training: step, sharding, optimizer, checkpoints, loop, tracking."""

import importlib
from typing import Any

# Loaded when they are asked for: the mirrors of a run need no JAX.
_MODULES = {"run": "loop", "RunRecord": "records"}

__all__ = ["run", "RunRecord"]


def __getattr__(name: str) -> Any:
  if name not in _MODULES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
  return getattr(module, name)
