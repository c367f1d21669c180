# SPDX-License-Identifier: Apache-2.0
"""One run from config to record: the order of operations.

    claim the directory -> data, budget, mesh -> state (new or restored)
    -> steps, with rows, evaluations and checkpoints -> evaluation -> result

Here it begins and ends; in between it is a `course.Run`. Many runs are
`tfjax.sweep`.
"""

import contextlib
import dataclasses
import pathlib
from typing import Any, Mapping, Sequence

from tfjax import config as config_lib
from tfjax.cost import energy
from tfjax.train import claim
from tfjax.train import clock as clock_lib
from tfjax.train import cluster
from tfjax.train import course
from tfjax.train import interrupts
from tfjax.train import records
from tfjax.train import sharding
from tfjax.train import spent as spent_lib
from tfjax.train import summary
from tfjax.train import tracking

RunDirectoryBusyError = claim.RunDirectoryBusyError


def run(
    config: config_lib.ExperimentConfig,
    workdir: str | pathlib.Path,
    *,
    sweep: str | None = None,
    run_id: str | None = None,
    on_row: course.OnRow | None = None,
    keep_steps: Sequence[int] = (),
    branch: Mapping[str, Any] | None = None,
    until_step: int | None = None,
) -> records.RunRecord:
  """Trains `config` in workdir/RUN_ID and returns its record.

  A run that has finished before is not run again; one that was interrupted
  goes on from its checkpoint and ends with the same parameters and rows. A
  loss that is not finite or spikes is dealt with as config.recovery says and
  may end the run as `diverged`; SIGTERM, SIGUSR1 or SIGINT save a checkpoint
  and end it as `interrupted`.

  Args:
    sweep: its name, for the record.
    run_id: unset: by the config.
    on_row: sees each metrics row.
    keep_steps: checkpoints of these steps are saved too, and stay.
    branch: {"run_id": ..., "step": ...}: a run without a checkpoint of its own
      begins with that of another run of `workdir` (`tfjax.train.trunk`); where
      there is none it begins at step 0, and says so.
    until_step: once that step is done it is saved and the run ends as
      `interrupted`, to be gone on with.

  Processes that a launcher has started together (config.runtime.distributed)
  train together: all call this, and all get the same record or error. The
  main one writes, and has `on_row` called.

  Raises:
    ConfigError: before any compute.
    RunDirectoryBusyError: another process has the directory.
    RecordError: the directory holds another run, or a damaged record.
    WriteError: the disk is full, say; the newest checkpoint is kept.
    LostError (tfjax.train.lease): another process has taken the directory
      since, while this one stood still; it writes nothing more there.
    Exception: whatever training raised, after it was recorded as `failed`.
  """
  clock = clock_lib.Clock()
  cluster.initialize(config.runtime)
  run_dir = pathlib.Path(workdir) / (run_id or records.run_id(config))
  with cluster.together(), contextlib.ExitStack() as held:
    finished = claim.shared(lambda: claimed(config, run_dir, held))
    if finished is not None:
      return records.RunRecord(**finished)
    started_at = records.now()
    mesh = sharding.make_mesh(config)
    meter = held.enter_context(energy.Meter(
        config.cost.measure_energy, mesh.local_devices))
    spent = spent_lib.Spent(config, mesh, run_dir, clock, meter)
    try:
      this = course.Run(
          config, run_dir, sweep, started_at, on_row, spent,
          orders=course.Orders(tuple(keep_steps), branch, until_step))
      # Only now: until there is something to save, a signal ends it at once.
      with interrupts.stop_requested() as stop:
        return this.train(stop)
    except config_lib.ConfigError:
      raise
    except Exception as error:
      if cluster.is_main():
        summary.record_failure(
            config, run_dir, sweep, started_at, error, spent)
      raise


def claimed(config: config_lib.ExperimentConfig, run_dir: pathlib.Path,
            held: contextlib.ExitStack) -> dict[str, Any] | None:
  """Takes the directory, for as long as `held` is open, unless the run has
  finished: then its record.

  Raises:
    ConfigError: what its mirrors need is not installed.
    RunDirectoryBusyError, RecordError, WriteError: as `run`.
  """
  finished = claim.finished_record(run_dir, config)
  if finished is None:
    tracking.check(config.tracking)
    held.enter_context(claim.directory(run_dir))
    # Whoever had the directory until now may have finished the run.
    finished = claim.finished_record(run_dir, config)
  if finished is None:
    claim.prepare(run_dir, config)
    return None
  return dataclasses.asdict(finished)
