# SPDX-License-Identifier: Apache-2.0
"""Where the rows of a run go: its metrics.jsonl, and whoever listens.

wandb and TensorBoard are fed from that file (`tfjax.train.tracking`).

Of a row's columns, `seconds` is the time inside training steps so far,
`device_seconds` all that the run has occupied devices for (lost time too),
`energy_kwh` what it has drawn: measured, else by its hardware's power;
`shared_device_seconds` what its trunk had occupied before it branched off.
`tokens_per_second` and `mfu` are of the time since the row before. Of a member
of an ensemble all times and energy are its share of them, but its
`tokens_per_second` are by the time on the wall. Unknown is null.
"""

import pathlib
from typing import Any, Callable

from tfjax import config as config_lib
from tfjax.cost import budget as budget_lib
from tfjax.train import records
from tfjax.train import tracking
from tfjax.train.mirrors import columns


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
               kept: list[dict[str, Any]],
               budget: budget_lib.Budget | None = None):
    """Opens the files as they are at a step.

    Args:
      step: the last step that the run has done; later rows are dropped, but
        those in `kept`.
      budget: the run's plan, which its mirrors show; None: not known.

    Raises:
      ConfigError: what a mirror needs is not installed.
      WriteError: metrics.jsonl cannot be written.
    """
    self.failure: records.WriteError | None = None
    self._on_row = on_row
    self._file = records.MetricsFile(run_dir / "metrics.jsonl", step, kept)
    self._mirror = tracking.Mirror(
        config, run_dir, sweep,
        None if budget is None else columns.plan_of(budget))

  def write(self, row: dict[str, Any]) -> None:
    self._try(self._file.write, row)
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
    """No more rows; the result may follow."""
    self._file.close()
    self._mirror.close()

  def finish(self) -> None:
    """The run's result is written."""
    self._mirror.finish()

  def _try(self, function: Callable[..., None], *args: Any) -> None:
    if self.failure is None:
      try:
        function(*args)
      except records.WriteError as error:
        self.failure = error
