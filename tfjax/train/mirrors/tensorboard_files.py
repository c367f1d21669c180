# SPDX-License-Identifier: Apache-2.0
"""A run's rows as TensorBoard scalars, in RUN/tensorboard/."""

import pathlib
import time
from typing import Any, Mapping, Sequence

from tfjax.train.mirrors import columns

DIRECTORY = "tensorboard"


class TensorBoardFiles:
  """One event file a run, which holds all of its rows: a run that is resumed
  or rolled back has it written anew."""

  def __init__(self, run_dir: pathlib.Path):
    self.notes: list[str] = []
    self._directory = run_dir / DIRECTORY
    self._begin()

  def update(self, rows: Sequence[Mapping[str, Any]], replaced: bool) -> None:
    """Writes what is new of `rows`, all that there are so far."""
    if replaced:
      self._writer.close()
      self._begin()
    for row in rows[self._next:]:
      self._writer.write_event(_event(row))
    self._next = len(rows)
    self._writer.flush()

  def finish(self, rows: Sequence[Mapping[str, Any]],
             result: Mapping[str, Any] | None) -> None:
    """Ends the file, which has all `rows`."""
    del rows, result  # a result is no scalar of a step
    self._writer.close()

  def where(self) -> str:
    return str(self._directory)

  def _begin(self) -> None:
    # Not its SummaryWriter: that writes a while after it is told to flush.
    # pylint: disable-next=import-outside-toplevel
    from tensorboardX import event_file_writer
    self._directory.mkdir(exist_ok=True)
    for old in self._directory.glob("events.out.tfevents.*"):
      old.unlink()
    self._next = 0
    self._writer = event_file_writer.EventsWriter(
        str(self._directory / "events"))


def _event(row: Mapping[str, Any]) -> Any:
  """The numbers of a row, at its step."""
  # pylint: disable-next=import-outside-toplevel
  from tensorboardX.proto import event_pb2
  event = event_pb2.Event(wall_time=time.time(), step=row["step"])
  for name, value in columns.of_row(row).items():
    if name != "step" and isinstance(value, (int, float)):
      event.summary.value.add(tag=name, simple_value=value)
  return event
