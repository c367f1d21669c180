# SPDX-License-Identifier: Apache-2.0
"""Waits for the mirrors of a run, as training does not."""

import pathlib

from tfjax.train import tracking


def wait(run_dir: pathlib.Path, seconds: float) -> bool:
  """Whether the mirrors of a run that has ended are done within `seconds`."""
  current = tracking._current  # pylint: disable=protected-access
  return current is not None and current.wait(
      str(run_dir.absolute()), seconds) is not None
