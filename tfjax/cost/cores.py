# SPDX-License-Identifier: Apache-2.0
"""The cores that this process may run on, which may be fewer than there are."""

import os


def usable() -> list[int]:
  """Their numbers, in order."""
  if hasattr(os, "sched_getaffinity"):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))
