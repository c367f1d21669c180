# SPDX-License-Identifier: Apache-2.0
"""What has been done of a sweep, read from its directory alone.

A run's state is in its own directory: result.json once it has ended, the tail
of metrics.jsonl while it runs, and the lock that training holds. `sweep.json`
in the sweep's directory lists the runs that are planned. Nothing is parsed
out of names or of printed text.
"""

import dataclasses
import fcntl
import json
import os
import pathlib
from typing import Any, Sequence

from tfjax.sweep.plan import RunSpec
from tfjax.train import records

LOG = "log.txt"  # in a run's directory: what its worker printed
_PLAN = "sweep.json"
_TAIL_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class RunState:
  """Where a run stands; what is not known is None.

  `status` is pending, running, complete, diverged, failed, or interrupted
  (begun, with nobody at it, and to be resumed).
  """

  run_id: str
  status: str
  reason: str | None = None
  step: int | None = None
  loss: float | None = None  # held-out once it has ended, else in training
  tokens_per_second: float | None = None
  result: dict[str, Any] | None = None


def run_state(workdir: str | os.PathLike[str], run_id: str) -> RunState:
  """The state of one run of the sweep in `workdir`."""
  run_dir = pathlib.Path(workdir) / run_id
  state = progress(workdir, run_id)
  # The lock comes first: a run that is taken up again has its old result for
  # a moment.
  if is_locked(run_dir):
    return state
  result = records.read_result(run_dir)
  if result is not None:
    steps = result.get("steps")
    return RunState(
        run_id, result["status"], result.get("status_reason"),
        step=state.step if steps is None else steps, loss=result.get("loss"),
        tokens_per_second=result.get("tokens_per_second"), result=result)
  if (run_dir / "config.json").exists():
    return dataclasses.replace(
        state, status="interrupted",
        reason="its process ended without recording why")
  return RunState(run_id, "pending")


def progress(workdir: str | os.PathLike[str], run_id: str) -> RunState:
  """How far a run is that is known to be running."""
  row = last_row(pathlib.Path(workdir) / run_id / "metrics.jsonl",
                 "train") or {}
  return RunState(run_id, "running", step=row.get("step"),
                  loss=row.get("loss"),
                  tokens_per_second=row.get("tokens_per_second"))


def is_finished(run_dir: str | os.PathLike[str], config_hash: str) -> bool:
  """Whether the run of that config has ended for good."""
  result = records.read_result(run_dir)
  return (result is not None and result["status"] in records.FINISHED
          and result.get("config_hash") == config_hash)


def sweep_state(workdir: str | os.PathLike[str]) -> list[RunState]:
  """The state of every planned run, in the plan's order."""
  return [run_state(workdir, row["run_id"])
          for row in read_plan(workdir)["runs"]]


def write_plan(workdir: str | os.PathLike[str], sweep: str,
               specs: Sequence[RunSpec]) -> None:
  """Records what is planned, so that a report can show what is missing."""
  rows = [dict(run_id=spec.run_id, overrides=dict(spec.overrides),
               params_total=spec.budget.params_total,
               tokens=spec.budget.tokens, steps=spec.budget.steps,
               flops_total=spec.budget.flops_total) for spec in specs]
  records.write_json(pathlib.Path(workdir) / _PLAN,
                     dict(sweep=sweep, runs=rows))


def read_plan(workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """The plan: `sweep`, its name, and `runs`, a row a run."""
  path = pathlib.Path(workdir) / _PLAN
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise FileNotFoundError(
        f"no sweep was launched in {workdir}: there is no {_PLAN}") from None


def last_row(path: str | os.PathLike[str], kind: str) -> dict[str, Any] | None:
  """The last whole row of that kind in the tail of a metrics.jsonl."""
  try:
    with open(path, "rb") as file:
      size = file.seek(0, os.SEEK_END)
      start = max(0, size - _TAIL_BYTES)
      file.seek(start)
      lines = file.read().split(b"\n")
  except (FileNotFoundError, NotADirectoryError):
    return None
  # The writer ends a row with its newline, so that what follows the last one
  # is half a row; so may be what the tail begins with.
  for line in reversed(lines[1 if start else 0:-1]):
    try:
      row = json.loads(line)
    except ValueError:
      continue
    if isinstance(row, dict) and row.get("kind") == kind:
      return row
  return None


def is_locked(run_dir: str | os.PathLike[str]) -> bool:
  """Whether a process is at work on the run.

  Looking takes the lock for a moment: do not look at a run that may be about
  to start, its worker would have to try again.
  """
  try:
    file = open(pathlib.Path(run_dir) / records.LOCK, "rb")
  except (FileNotFoundError, NotADirectoryError):
    return False
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
  return False
