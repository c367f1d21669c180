# SPDX-License-Identifier: Apache-2.0
"""Where the rows of a run go: its metrics.jsonl, wandb, whoever listens.

Of a row's columns, `seconds` is the time inside training steps so far,
`device_seconds` all that the run has occupied devices for (lost time too),
`energy_kwh` what it has drawn: measured, else by its hardware's power.
`tokens_per_second` and `mfu` are of the time since the row before. Unknown is
null.
"""

import pathlib
from typing import Any, Callable

from tfjax import config as config_lib
from tfjax.train import records
from tfjax.train import tracking


class Rows:
  """The rows of one run, at the process that writes them.

  A row that cannot be written ends the run, but not from within: processes
  that train together must stop at the same step.

  Attributes:
    failure: why rows cannot be written any more, or None.
  """

  def __init__(self, config: config_lib.ExperimentConfig,
               run_dir: pathlib.Path, sweep: str | None,
               on_row: Callable[[dict[str, Any]], None] | None, step: int,
               kept: list[dict[str, Any]]):
    self.failure: records.WriteError | None = None
    self._on_row = on_row
    self._file = records.MetricsFile(run_dir / "metrics.jsonl", step, kept)
    self._mirror = tracking.Mirror(config, run_dir, sweep)

  def write(self, row: dict[str, Any]) -> None:
    self._try(self._file.write, row)
    self._mirror.log(row)
    if self._on_row is not None:
      self._on_row(row)

  def cut(self, step: int, kept: list[dict[str, Any]]) -> None:
    """Drops the rows after a step, but those in `kept`."""
    self._try(self._file.cut, step, kept)

  def sync(self) -> None:
    """Returns when all rows are on disk.

    Raises:
      WriteError: this or another one could not be written.
    """
    self._try(self._file.sync)
    if self.failure is not None:
      raise self.failure

  def close(self) -> None:
    self._file.close()

  def finish(self, result: dict[str, Any]) -> None:
    """Hands the run's result to wandb."""
    self._mirror.finish(result)

  def _try(self, function: Callable[..., None], *args: Any) -> None:
    if self.failure is None:
      try:
        function(*args)
      except records.WriteError as error:
        self.failure = error
