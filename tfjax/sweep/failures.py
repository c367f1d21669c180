# SPDX-License-Identifier: Apache-2.0
"""What is on record of a run that failed: why, and its log's tail.

A run whose process lives records its failure itself (`tfjax.train.summary`);
here is what only its launcher can add, and what it writes for the dead.
"""

import contextlib
import dataclasses
import pathlib
from typing import Any

from tfjax import config as config_lib
from tfjax.sweep import ledger
from tfjax.sweep import process as process_lib
from tfjax.sweep.specs import RunSpec
from tfjax.train import checkpoints
from tfjax.train import claim
from tfjax.train import records


def record(workdir: pathlib.Path, spec: RunSpec, sweep: str | None,
           reason: str) -> None:
  """Records that a run has failed, unless it has ended in another way, or
  somebody has it by now.

  What the run has recorded of its failure itself stays, and gets the tail of
  its log.

  Raises:
    WriteError: the disk is full, say.
    RecordError: there is a damaged record.
  """
  run_dir = workdir / spec.run_id
  try:
    with claim.directory(run_dir):
      result = records.read_result(run_dir)
      if result is None:
        row = ledger.last_row(run_dir / "metrics.jsonl", "train") or {}
        result = dataclasses.asdict(records.RunRecord(
            run_id=spec.run_id, sweep=sweep, status="failed",
            status_reason=reason,
            config_hash=config_lib.config_hash(spec.config),
            params_total=spec.budget.params_total, steps=row.get("step"),
            tokens_seen=row.get("tokens"), finished_at=records.now()))
      if result["status"] == "failed":
        records.write_result(
            run_dir, result | dict(log_tail=log_tail(run_dir)))
  except claim.RunDirectoryBusyError:
    pass  # theirs is the last word


def add_log(run_dir: pathlib.Path, log_dir: pathlib.Path) -> None:
  """Adds the end of a log to the record of a run that diverged or failed.

  Args:
    log_dir: of the run whose log it is, in an ensemble the first one.

  Raises:
    WriteError: the disk is full, say.
    RecordError: there is a damaged record.
  """
  if not _went_wrong(records.read_result(run_dir)):
    return  # as most runs, and needs no claim
  with contextlib.suppress(claim.RunDirectoryBusyError):
    with claim.directory(run_dir):
      result = records.read_result(run_dir)
      if _went_wrong(result):  # still: nobody has taken it up since
        records.write_result(
            run_dir, result | dict(log_tail=log_tail(log_dir)))


def _went_wrong(result: dict[str, Any] | None) -> bool:
  return result is not None and result["status"] in ("diverged", "failed")


def log_tail(run_dir: pathlib.Path) -> str | None:
  """The end of what the run has printed; None: it has no log."""
  try:
    with open(run_dir / ledger.LOG, "rb") as file:
      return process_lib.tail(file)
  except FileNotFoundError:
    return None


def newest_checkpoint(run_dir: pathlib.Path) -> int:
  """The step of the newest checkpoint of a run; 0: it has none."""
  return max(checkpoints.steps_in(run_dir / "checkpoints"), default=0)
